"""One monotone spline per feature: what the shape of the marginals alone explains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.linearization import run_weight_hooks
from nflows_iresnet.precision import like_weights
from nflows_iresnet.settings import SettingsInState
from nflows_iresnet.transforms.channels import as_rows, like_inputs, require_channels, sum_of_each
from nflows_iresnet.transforms.normalization import (
    StartsFromData,
    infinite_if_nan,
    note_start,
    quantiles,
    require_own,
    rows_of_all_processes,
)
from nflows_iresnet.transforms.rational_quadratic import (
    MAX_LOG_SLOPE,
    MIN_SIZE,
    Bins,
    bins_of,
    knots_of,
    rational_quadratic_spline,
    split,
    table_of,
)
from nflows_iresnet.validation import validated_bound, validated_size

Initialization = Literal["identity", "quantiles"]

_PIECES = 128
"""Into how many pieces a bin is cut for the bounds of its slope."""
_ROUNDING_MARGIN = 1e-9
"""Of these bounds; widths and heights err by some 100 K eps in float64."""
_MIN_WIDTH_AT_START = 0.04
"""Smallest width of a bin that quantiles give, as a part of the mean: 0.02 for 16 bins to 4."""
_MAX_LOG_SLOPE_AT_START = 4.9
_KNOTS_AT_START = 2.6 / 3.5
"""How far the knots that quantiles are mapped to reach, so that those of 16 bins end at 2.6."""
_FARTHEST_AT_START = 4.0
"""Beyond, normal probabilities are too close to 0 and 1 to have empirical quantiles."""
_ROWS_PER_BIN = 8
"""Quantiles of fewer rows are mixed with those of a normal."""
_ROWS_TO_JUDGE = 4096
"""Of the rows that are given, so many (up to twice that) tell whether the spline is a gain."""


class ElementwiseRationalQuadraticSpline(SettingsInState, StartsFromData):
    r"""y_j = S_j(x_j): a monotone rational-quadratic spline per feature.

    Knots -b = x_0 < ... < x_K = b are mapped to -b = y_0 < ... < y_K = b, with learned slopes
    d_k > 0 there (1 at both ends); outside, y = x. Within a bin of width w, height h and mean slope
    s = h / w, with t = (x - x_k) / w,

        y = y_k + h (s t^2 + d_0 t (1 - t)) / (s + (d_0 + d_1 - 2 s) t (1 - t)),

    continuously differentiable, and inverted by solving a quadratic equation. It expects features
    of about unit scale, as `ActNorm(features, bound=b)` returns them: put one in front. Images
    (B, C, H, W) have a spline for each channel, as they have a scale in `ActNorm`;
    `PixelwiseSpline` has one for each value.

    A network that starts with a dense layer has to build a function of one coordinate out of
    projections of all, which with few rows it learns by heart. Where marginals are far from normal
    (peaks, gaps, limits) one such map takes over what needs no other feature.

    **Start.** With "identity" y = x. With "quantiles" the first batch in training mode gives each
    feature a normal marginal, or nearly: for outputs y_k, equally spaced (from -2.6 to 2.6 for 16
    bins to 4), x_k is the empirical quantile of the probability Phi(y_k), and log d_k the mean of
    log(h / w) of the bins on both sides. `initialize` does so from rows that are given, for either
    kind: a few thousand are a better estimate than a batch. It is no worse than none, on the
    rows by construction, on others but for chance:

    * bins are at least 0.04 of their mean width wide: among knots that are, those closest to the
      quantiles (isotonic regression) are taken, symmetric about a value that is repeated often;
    * quantiles of n rows, n < 8 K, are mixed with those of a standard normal, by n / (8 K);
    * a feature keeps the identity unless the mean log-density of the rows under a standard normal
      becomes larger by more than K / n (as Akaike's criterion counts K parameters): normal ones
      keep it, all where there are few rows, and those that span less than one such bin, constants;
    * what lies beyond the bound passes unchanged; an empty batch starts nothing; NaN and infinity
      are refused, and nothing is stored;
    * where several processes train one model, they start from the rows of all (`all_gather`).

    Only parameters that are all still zero are started by a batch: what was restored without its
    flag, or was learned through the inverse, stays. What `torch.func` lends, and parameters that
    are computed from others (`parametrize`, `prune`), start as those of `ActNorm` do, or not. Once
    started, no call waits for the device; the start itself looks twice.

    Cost: some thirty operations per value, in float64, as one node of the graph. Value, inverse and
    log-determinant are exact but for the rounding of what goes in and comes out; the inverse
    amplifies that of y by 1 / S_j', which `lipschitz_constants` bounds.

    References:
        Gregory, Delbourgo. Piecewise rational quadratic interpolation to monotonic data, 1982.
        Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.

    Args:
        features: number of features, or channels, of x.
        num_bins: K.
        bound: b.
        initialization: "identity", or "quantiles" of the first batch in training mode.

    Raises:
        ValueError: if a size is not positive, `bound` is not positive and finite, or
            `initialization` is unknown; in use, if inputs have another shape or precision than the
            parameters, the first batch is not finite, or a start cannot be stored; from
            `load_state_dict` a RuntimeError, if the state is that of another `bound`.

    Example:
        >>> inputs = torch.randn(5, 3)
        >>> outputs, logabsdet = ElementwiseRationalQuadraticSpline(3)(inputs)
        >>> torch.allclose(outputs, inputs, atol=1e-5), logabsdet.shape
        (True, torch.Size([5]))
        >>> spline = ElementwiseRationalQuadraticSpline(1, 16, initialization="quantiles")
        >>> uniform = torch.linspace(-1.7, 1.7, 1000)[:, None]
        >>> normal = torch.special.ndtri((torch.arange(1000) + 0.5) / 1000)[:, None]
        >>> bool((spline(uniform)[0] - normal)[50:-50].abs().max() < 0.1)
        True
    """

    def __init__(
        self,
        features: int,
        num_bins: int = 8,
        bound: float = 4.0,
        *,
        initialization: Initialization = "identity",
    ) -> None:
        super().__init__()
        features = validated_size("features", features)
        num_bins = validated_size("num_bins", num_bins)
        self.bound = validated_bound(bound, 4.0)
        self.sizes = nn.Parameter(torch.zeros(2, features, num_bins))
        self.log_slopes = nn.Parameter(torch.zeros(features, num_bins - 1))
        self._wait_for_rows(initialization, get_args(Initialization))

    def settings(self) -> Mapping[str, object]:
        """Return what the spline depends on beside its parameters."""
        return {"bound": self.bound}

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, sum_j log S_j'(x_j)), shapes (B, *) and (B,)."""
        inputs = self._checked(inputs)
        rows = as_rows(inputs)
        if self.training and not self._has_started:
            self._start(rows)
        outputs, logs = rational_quadratic_spline(rows, self.sizes, self.log_slopes, self.bound)
        return like_inputs(outputs, inputs), sum_of_each(logs, inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, -sum_j log S_j'(x_j)), shapes (B, *) and (B,)."""
        run_weight_hooks(self)
        inputs = self._checked(inputs)
        inside, beyond = split(as_rows(inputs), self.bound)
        knots = self._knots()
        bins = self._bins(inside, knots, knots[1])
        part = bins.part_at(inside)
        outputs = bins.left + bins.width * part + beyond
        logs = -bins.value_and_log_slope(part)[1].sum(1)
        outputs, logs = outputs.to(inputs.dtype), logs.to(inputs.dtype)
        return like_inputs(outputs, inputs), sum_of_each(logs, inputs)

    @torch.no_grad()
    def lipschitz_constants(self) -> tuple[float, float]:
        r"""Return bounds of the Lipschitz constants of forward and inverse.

        They are the largest S_j' and 1 / S_j' over all features and x. In a bin, and in Bernstein
        polynomials, whose coefficients stand here,

            S' = s^2 N / D^2,    N = (d_0, s, d_1),    D = (s, (d_0 + d_1) / 2, s).

        On a piece of the bin N and D are such polynomials again, and lie between the smallest and
        the largest coefficient there. All coefficients are averages of positive numbers, so the
        bounds are positive too, and nothing cancels. Outside the knots S' = 1. They exceed
        the true extremes by some percent where neighbouring slopes differ a hundredfold. Where
        a parameter is NaN, both are infinite.

        Cost: some 128 times the table of bins.
        """
        run_weight_hooks(self)
        *_, first, last, mean, _ = table_of(self._knots(), self.log_slopes)
        slope = _bernstein_pieces(first, mean, last)
        denominator = _bernstein_pieces(mean, (first + last) / 2, mean)
        largest = mean.square() * slope.amax(0) / denominator.amin(0).square()
        smallest = mean.square() * slope.amin(0) / denominator.amax(0).square()
        steepest = float(largest.max().clamp_min(1.0)) * (1 + _ROUNDING_MARGIN)
        flattest = float(smallest.min().clamp_max(1.0))
        return infinite_if_nan(steepest), infinite_if_nan((1 + _ROUNDING_MARGIN) / flattest)

    def initialize(self, rows: Tensor) -> None:
        """Start from the quantiles of rows that are given, whatever the parameters are.

        Args:
            rows: shape (N, features) or (N, features, H, W), of any dtype, of about unit scale.
                Where several processes train one model, each gives its own, at the same time.

        Raises:
            ValueError: if the shape is another, there is no row, or a value is not finite.
        """
        require_channels(rows, self.sizes.shape[1])
        if not self._start_from(as_rows(rows)):
            raise ValueError(f"at least one row is needed to start from, got {tuple(rows.shape)}")

    def has_learned(self) -> Tensor:
        """Return whether a parameter is not zero, as all are until it starts: shape ()."""
        return self.sizes.any() | self.log_slopes.any()

    @torch.no_grad()
    def _start_from(self, rows: Tensor) -> bool:
        """Start from rows (N, features), and return whether there were any."""
        require_own(self, "sizes", "log_slopes")
        rows = rows_of_all_processes(rows.to(self.sizes.device, torch.float64))
        if rows.shape[0] == 0:
            return False
        _require_finite(rows)
        num_bins = self.sizes.shape[2]
        knots = _quantile_knots(rows, num_bins, self.bound)
        widths = knots.diff(dim=2)
        slopes = (widths[1] / widths[0]).log()
        middle = ((slopes[:, 1:] + slopes[:, :-1]) / 2).clamp(
            -_MAX_LOG_SLOPE_AT_START, _MAX_LOG_SLOPE_AT_START
        )
        shares = widths / (2 * self.bound)
        self.sizes.copy_((shares - MIN_SIZE / num_bins).log())
        self.log_slopes.copy_(MAX_LOG_SLOPE * (middle / MAX_LOG_SLOPE).atanh())
        judges = rows[:: max(1, rows.shape[0] // _ROWS_TO_JUDGE)]
        is_wide = rows.amax(0) - rows.amin(0) > _gap(num_bins, self.bound)
        is_gain = is_wide & (self._gain(judges) > num_bins / judges.shape[0])
        self.sizes.mul_(is_gain[:, None])
        self.log_slopes.mul_(is_gain[:, None])
        note_start(self)
        return True

    def _gain(self, rows: Tensor) -> Tensor:
        """Return by how much the spline raises the mean log-density of each feature, a normal."""
        inside, beyond = split(rows, self.bound)
        knots = self._knots()
        bins = self._bins(inside, knots, knots[0])
        outputs, log_slope = bins.value_and_log_slope((inside - bins.left) / bins.width)
        squares = (outputs - inside) * (outputs + inside + 2 * beyond)
        return (log_slope - squares / 2).mean(0)

    def _load_from_state_dict(
        self, state: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *lists: Any
    ) -> None:
        super()._load_from_state_dict(state, prefix, metadata, strict, *lists)
        missing_keys: list[str] = lists[0]
        if f"{prefix}initialized" in missing_keys:  # of a version without a start
            missing_keys.remove(f"{prefix}initialized")

    def _checked(self, inputs: Tensor) -> Tensor:
        require_channels(inputs, self.sizes.shape[1])
        return like_weights(inputs, self)

    def _knots(self) -> Tensor:
        """Return the knots and their images, (2, features, K + 1)."""
        return knots_of(self.sizes, self.bound)

    def _bins(self, values: Tensor, knots: Tensor, along: Tensor) -> Bins:
        """Return the bins of `values`, (B, features), between the knots `along`."""
        return bins_of(values, along, table_of(knots, self.log_slopes))[0]

    def extra_repr(self) -> str:
        """Show the sizes."""
        _, features, num_bins = self.sizes.shape
        return f"features={features}, num_bins={num_bins}, bound={self.bound}"


def _quantile_knots(rows: Tensor, num_bins: int, bound: float) -> Tensor:
    """Return knots and their images, (2, features, K + 1), as the start describes them.

    Args:
        rows: shape (N, features), N at least 1, in float64.
        num_bins: K.
        bound: b.
    """
    index = torch.arange(1, num_bins, dtype=rows.dtype, device=rows.device)
    reach = _KNOTS_AT_START * min(bound, _FARTHEST_AT_START)
    images = reach * (2 * index / num_bins - 1)
    trust = min(1.0, rows.shape[0] / (_ROWS_PER_BIN * num_bins))
    empirical = quantiles(rows, torch.special.ndtr(images)).mT
    wanted = (trust * empirical + (1 - trust) * images).clamp(-bound, bound)
    gap = _gap(num_bins, bound)
    shifted = _isotonic(wanted - gap * index).clamp(-bound, bound - gap * num_bins)
    inner = torch.stack([shifted + gap * index, images.expand_as(shifted)])
    return F.pad(F.pad(inner, (1, 0), value=-bound), (0, 1), value=bound)


def _gap(num_bins: int, bound: float) -> float:
    """Return the smallest width of a bin that quantiles give."""
    return _MIN_WIDTH_AT_START * 2 * bound / num_bins


def _isotonic(values: Tensor) -> Tensor:
    """Return the increasing sequences closest to values (features, P) in least squares.

    The k-th number is the largest over i <= k of the smallest over j >= k of the means from i to j.

    References:
        Robertson, Wright, Dykstra. Order restricted statistical inference, 1988 (max-min formula).
    """
    if values.shape[-1] == 0:
        return values
    sums = F.pad(values.cumsum(-1), (1, 0))
    first, last = torch.arange(values.shape[-1], device=values.device).expand(2, -1)
    length = last - first[:, None] + 1
    means = (sums[:, None, 1:] - sums[:, :-1, None]) / length
    smallest = means.flip(-1).cummin(-1).values.flip(-1)
    return torch.where(length > 0, smallest, -math.inf).amax(-2)


def _require_finite(rows: Tensor) -> None:
    is_bad = ~rows.isfinite()
    if bool(is_bad.any()):
        features = is_bad.any(0).nonzero().flatten().tolist()
        raise ValueError(
            f"the rows that ElementwiseRationalQuadraticSpline starts from hold NaN or infinite "
            f"values in features {features}, in {int(is_bad.any(1).sum())} of {rows.shape[0]} "
            "rows; remove or replace them. Nothing was stored"
        )


def _bernstein_pieces(first: Tensor, middle: Tensor, last: Tensor) -> Tensor:
    """Return the coefficients of a quadratic on each of the pieces of [0, 1].

    Args:
        first, middle, last: its three coefficients there, each of one shape (N,).

    Returns:
        Shape (3, pieces, N).
    """
    ends = torch.linspace(0, 1, _PIECES + 1, dtype=first.dtype, device=first.device)[:, None]
    left, right = ends[:-1], ends[1:]

    def blossom(a: Tensor, b: Tensor) -> Tensor:
        mixed = a * (1 - b) + b * (1 - a)
        return first * ((1 - a) * (1 - b)) + middle * mixed + last * (a * b)

    return torch.stack([blossom(left, left), blossom(left, right), blossom(right, right)])
