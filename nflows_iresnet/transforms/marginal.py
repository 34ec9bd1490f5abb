"""One monotone spline per feature: what the shape of the marginals alone explains."""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.nn import functional as F

_MIN_SIZE = 0.01
"""Smallest width and height of a bin, as a part of the mean."""
_MAX_LOG_SLOPE = 5.0
"""Bound of log d_k, so that no step of an optimiser makes a slope zero or infinite."""


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


class MarginalSpline(Transform):
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
    at most e^5 / 0.01 times.

    Args:
        features: number of features of x.
        num_bins: K.
        bound: b.

    Raises:
        ValueError: if a size is not positive, or `bound` is not positive and finite.

    References:
        Gregory, Delbourgo. Piecewise rational quadratic interpolation to monotonic data, 1982.
        Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.

    Example:
        >>> inputs = torch.randn(5, 3)
        >>> outputs, logabsdet = MarginalSpline(3)(inputs)
        >>> torch.allclose(outputs, inputs, atol=1e-5), logabsdet.shape
        (True, torch.Size([5]))
    """

    def __init__(self, features: int, num_bins: int = 8, bound: float = 4.0) -> None:
        super().__init__()
        _validate(features, num_bins, bound)
        self.bound = float(bound)
        self.sizes = nn.Parameter(torch.zeros(2, features, num_bins))
        self.log_slopes = nn.Parameter(torch.zeros(features, num_bins - 1))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, sum_j log S_j'(x_j)), shapes (B, features) and (B,)."""
        inside, beyond = self._split(inputs)
        knots = self._knots()
        bins = self._bins(inside, knots, knots[0])
        outputs, log_slope = bins.value_and_log_slope((inside - bins.left) / bins.width)
        return (outputs + beyond).to(inputs.dtype), log_slope.sum(1).to(inputs.dtype)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, -sum_j log S_j'(x_j)), shapes (B, features) and (B,)."""
        inside, beyond = self._split(inputs)
        knots = self._knots()
        bins = self._bins(inside, knots, knots[1])
        part = bins.part_at(inside)
        outputs = bins.left + bins.width * part + beyond
        logabsdet = -bins.value_and_log_slope(part)[1].sum(1)
        return outputs.to(inputs.dtype), logabsdet.to(inputs.dtype)

    def _split(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest values within the knots, and what they lack, in float64."""
        features = self.sizes.shape[1]
        if inputs.dim() != 2 or inputs.shape[1] != features:
            raise ValueError(
                f"expected inputs of shape (batch, {features}), got {tuple(inputs.shape)}"
            )
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
        first = torch.arange(len(along), device=values.device) * (along.shape[1] - 1)
        chosen = self._table(knots).index_select(1, (index + first).flatten())
        return _Bins(*chosen.reshape(len(chosen), *values.shape).unbind(0))

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


def _validate(features: int, num_bins: int, bound: float) -> None:
    for name, size in (("features", features), ("num_bins", num_bins)):
        if operator.index(size) < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not 0 < bound < math.inf:
        raise ValueError(f"bound must be positive and finite, got {bound}; try 4.0")
