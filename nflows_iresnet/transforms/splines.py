"""One monotone spline per feature: what the shape of the marginals alone explains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.precision import like_weights
from nflows_iresnet.settings import SettingsInState
from nflows_iresnet.validation import validated_size

_MIN_SIZE = 0.01
"""Smallest width and height of a bin, as a part of the mean."""
_MAX_LOG_SLOPE = 5.0
"""Bound of log d_k, so that no step of an optimiser makes a slope zero or infinite."""
_PIECES = 128
"""Into how many pieces a bin is cut for the bounds of its slope."""
_ROUNDING_MARGIN = 1e-9
"""Of these bounds; widths and heights err by some 100 K eps in float64."""


class _Bins(NamedTuple):
    """The bins that values fall into, each field of the shape of the values.

    Attributes:
        left: where the bin starts, x_k.
        width: w.
        bottom: what its start is mapped to, y_k.
        height: h.
        first: slope at its start, d_0.
        last: slope at its end, d_1.
        mean: s = h / w.
        bend: d_0 + d_1 - 2 s.
    """

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    first: Tensor
    last: Tensor
    mean: Tensor
    bend: Tensor

    def value_and_log_slope(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx at a part t of the width."""
        rest = 1 - part
        mixed, square = part * rest, part * part
        denominator = self.mean + self.bend * mixed
        rise = (self.mean * square + self.first * mixed) / denominator
        slope = self.last * square + 2 * self.mean * mixed + self.first * rest * rest
        log_slope = ((self.mean / denominator).square() * slope).log()
        return self.bottom + self.height * rise, log_slope

    def part_at(self, value: Tensor) -> Tensor:
        """Return the t whose value is given, (l - s) t^2 - l t + u s = 0, without cancellation."""
        share = (value - self.bottom) / self.height
        linear = self.first - share * self.bend
        constant = share * self.mean
        discriminant = linear * linear - 4 * (linear - self.mean) * constant
        root = discriminant.clamp_min(0).sqrt()
        is_late = linear < 0
        above = torch.where(is_late, root - linear, 2 * constant)
        return above / torch.where(is_late, 2 * (self.mean - linear), linear + root)


class ElementwiseRationalQuadraticSpline(SettingsInState, Transform):
    r"""y_j = S_j(x_j): a monotone rational-quadratic spline per feature, the identity at the start.

    Knots -b = x_0 < ... < x_K = b are mapped to -b = y_0 < ... < y_K = b, with learned slopes
    d_k > 0 there (1 at both ends); outside, y = x. Within a bin of width w, height h and mean slope
    s = h / w, with t = (x - x_k) / w,

        y = y_k + h (s t^2 + d_0 t (1 - t)) / (s + (d_0 + d_1 - 2 s) t (1 - t)),

    continuously differentiable, and inverted by solving a quadratic equation. It expects features
    of about unit scale, as `ActNorm` returns them.

    A network that starts with a dense layer has to build a function of one coordinate out of
    projections of all, which with few rows it learns by heart. Where marginals are far from normal
    (peaks, gaps, limits) one such map takes over what needs no other feature.

    Cost: some thirty operations per value, in float64. Value, inverse and log-determinant are exact
    but for the rounding of what goes in and comes out; the inverse amplifies that of y by 1 / S_j',
    which `lipschitz_constants` bounds.

    Args:
        features: number of features of x.
        num_bins: K.
        bound: b.

    Raises:
        ValueError: if a size is not positive, or `bound` is not positive and finite; in use, if
            inputs have another shape or precision than the parameters; from `load_state_dict` a
            RuntimeError, if the state is that of another `bound`.

    References:
        Gregory, Delbourgo. Piecewise rational quadratic interpolation to monotonic data, 1982.
        Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.

    Example:
        >>> inputs = torch.randn(5, 3)
        >>> outputs, logabsdet = ElementwiseRationalQuadraticSpline(3)(inputs)
        >>> torch.allclose(outputs, inputs, atol=1e-5), logabsdet.shape
        (True, torch.Size([5]))
    """

    def __init__(self, features: int, num_bins: int = 8, bound: float = 4.0) -> None:
        super().__init__()
        features = validated_size("features", features)
        num_bins = validated_size("num_bins", num_bins)
        if not 0 < bound < math.inf:
            raise ValueError(f"bound must be positive and finite, got {bound}; try 4.0")
        self.bound = float(bound)
        self.sizes = nn.Parameter(torch.zeros(2, features, num_bins))
        self.log_slopes = nn.Parameter(torch.zeros(features, num_bins - 1))

    def settings(self) -> Mapping[str, object]:
        """Return what the spline depends on beside its parameters."""
        return {"bound": self.bound}

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, sum_j log S_j'(x_j)), shapes (B, features) and (B,)."""
        inputs = self._checked(inputs)
        inside, beyond = self._split(inputs)
        knots = self._knots()
        bins = self._bins(inside, knots, knots[0])
        outputs, log_slope = bins.value_and_log_slope((inside - bins.left) / bins.width)
        return (outputs + beyond).to(inputs.dtype), log_slope.sum(1).to(inputs.dtype)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, -sum_j log S_j'(x_j)), shapes (B, features) and (B,)."""
        inputs = self._checked(inputs)
        inside, beyond = self._split(inputs)
        knots = self._knots()
        bins = self._bins(inside, knots, knots[1])
        part = bins.part_at(inside)
        outputs = bins.left + bins.width * part + beyond
        logabsdet = -bins.value_and_log_slope(part)[1].sum(1)
        return outputs.to(inputs.dtype), logabsdet.to(inputs.dtype)

    @torch.no_grad()
    def lipschitz_constants(self) -> tuple[float, float]:
        r"""Return bounds of the Lipschitz constants of forward and inverse.

        They are the largest S_j' and 1 / S_j' over all features and x. In a bin, and in Bernstein
        polynomials, whose coefficients stand here,

            S' = s^2 N / D^2,    N = (d_0, s, d_1),    D = (s, (d_0 + d_1) / 2, s).

        On a piece of the bin N and D are such polynomials again, and lie between the smallest and
        the largest coefficient there. All coefficients are averages of positive numbers, so the
        bounds are positive too, and nothing cancels. Outside the knots S' = 1. They exceed
        the true extremes by some percent where neighbouring slopes differ a hundredfold.

        Cost: some 128 times the table of bins.
        """
        *_, first, last, mean, _ = self._table(self._knots())
        slope = _bernstein_pieces(first, mean, last)
        denominator = _bernstein_pieces(mean, (first + last) / 2, mean)
        largest = mean.square() * slope.amax(0) / denominator.amin(0).square()
        smallest = mean.square() * slope.amin(0) / denominator.amax(0).square()
        steepest, flattest = max(1.0, float(largest.max())), min(1.0, float(smallest.min()))
        return steepest * (1 + _ROUNDING_MARGIN), (1 + _ROUNDING_MARGIN) / flattest

    def _checked(self, inputs: Tensor) -> Tensor:
        features = self.sizes.shape[1]
        if inputs.dim() != 2 or inputs.shape[1] != features:
            raise ValueError(
                f"expected inputs of shape (batch, {features}), got {tuple(inputs.shape)}"
            )
        return like_weights(inputs, self)

    def _split(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest values within the knots, and what they lack, in float64."""
        double = inputs.double()
        inside = double.clamp(-self.bound, self.bound)
        return inside, double - inside

    def _knots(self) -> Tensor:
        """Return the knots and their images, (2, features, K + 1)."""
        num_bins = self.sizes.shape[2]
        shares = _MIN_SIZE / num_bins + (1 - _MIN_SIZE) * self.sizes.double().softmax(2)
        inner = self.bound * (2 * shares[..., :-1].cumsum(2) - 1)
        return F.pad(F.pad(inner, (1, 0), value=-self.bound), (0, 1), value=self.bound)

    def _bins(self, values: Tensor, knots: Tensor, along: Tensor) -> _Bins:
        """Return the bins of `values`, (B, features), between the knots `along`."""
        index = (values[..., None] >= along[:, 1:-1]).sum(-1)
        first = torch.arange(along.shape[0], device=values.device) * (along.shape[1] - 1)
        chosen = self._table(knots).index_select(1, (index + first).flatten())
        return _Bins(*chosen.reshape(chosen.shape[0], *values.shape).unbind(0))

    def _table(self, knots: Tensor) -> Tensor:
        """Return the eight numbers of each bin, (8, features * K)."""
        bounded = _MAX_LOG_SLOPE * (self.log_slopes.double() / _MAX_LOG_SLOPE).tanh()
        slopes = F.pad(bounded.exp(), (1, 1), value=1.0)
        (left, bottom), (width, height) = knots[..., :-1], knots.diff(dim=2)
        first, last, mean = slopes[:, :-1], slopes[:, 1:], height / width
        bend = first + last - 2 * mean
        columns = [left, width, bottom, height, first, last, mean, bend]
        return torch.stack(columns).flatten(1)

    def extra_repr(self) -> str:
        """Show the sizes."""
        _, features, num_bins = self.sizes.shape
        return f"features={features}, num_bins={num_bins}, bound={self.bound}"


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
