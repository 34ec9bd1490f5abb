r"""Monotone rational-quadratic splines, another one for each value, as ONE node of the graph.

A network returns 3 K - 1 numbers for each value x: K for widths, K for heights, and K - 1 for the
slopes between bins. With shares p, the softmax of c times the first K, widths are
2 b (l + (1 - K l) p_j) for the least share l; likewise heights. Knots are what they sum up to from
-b, the last one b; slopes there are d + softplus, and 1 at the ends. One bin is needed, that which
x falls into: its x_k, y_k, w, h and slopes are picked first, and what follows is the arithmetic of
`rational_quadratic` on numbers of the shape of x.

Backwards, a cotangent U of the left end and V of the width are U for each share before the k-th and
V for the k-th itself, times g = 2 b (1 - K l). Through the softmax the K numbers receive

    c g p_j (U [j < k] + V [j = k] - U sum_{i < k} p_i - V p_k).

Values beyond the bounds stay as they are: nothing comes back to their splines. Automatic
differentiation keeps every knot and walks back through it instead. The slow twin, which second
derivatives are those of, is `Family.differentiable`.

References:
    Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_iresnet.linearization import is_traced, pulled_back
from nflows_iresnet.precision import at_least_single
from nflows_iresnet.transforms.rational_quadratic import Bins, Point, of_values


class Choice(NamedTuple):
    """Which bin each value falls into, and what it is made from.

    Attributes:
        which: k, shape (B, F).
        shares: those of widths and of heights, shape (2, K, B, F).
        starts: x_k and y_k, shape (2, B, F).
        sizes: w and h, shape (2, B, F).
        slopes: the numbers of the network for the slopes at both ends, shape (2, B, F); anything
            at the bounds.
    """

    which: Tensor
    shares: Tensor
    starts: Tensor
    sizes: Tensor
    slopes: Tensor


@dataclass(frozen=True)
class Family:
    """The splines that the numbers of a network stand for.

    Args:
        num_bins: K.
        bound: b; beyond [-b, b] a spline is the identity.
        scale: c, what the numbers for widths and heights are multiplied by.
        least_size: l, the smallest width and height of a bin as a share of 2 b.
        least_slope: d, the smallest slope between bins.

    Raises:
        ValueError: if so many bins of the least size do not fit.
    """

    num_bins: int
    bound: float
    scale: float
    least_size: float
    least_slope: float

    def __post_init__(self) -> None:
        if self.num_bins * self.least_size >= 1:
            raise ValueError(
                f"num_bins must be less than {1 / self.least_size:g}, as no bin is smaller than "
                f"{self.least_size:g} of all, got {self.num_bins}"
            )

    def forward(self, inputs: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the splines of values and the sums of their log-slopes, (B, F) and (B,).

        Args:
            inputs: x, shape (B, F).
            numbers: of the network, shape (B, F (3 K - 1)).
        """
        numbers, values = self.numbers_first(numbers, inputs), at_least_single(inputs)
        if is_traced():
            outputs, logabsdet = self.differentiable(values, numbers)
        else:
            outputs, logabsdet = _Splines.apply(values, numbers, self)
        return outputs.to(inputs.dtype), logabsdet.to(inputs.dtype)

    def inverse(self, outputs: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values whose splines are y, and the sums of minus their log-slopes.

        Args:
            outputs: y, shape (B, F).
            numbers: of the network, shape (B, F (3 K - 1)).
        """
        numbers, values = self.numbers_first(numbers, outputs), at_least_single(outputs)
        inside = values.clamp(-self.bound, self.bound)
        bins = self.bins_of(self.choose(inside, numbers, by_height=True))
        part = bins.part_at(inside)
        log_slopes = -bins.value_and_log_slope(part)[1]
        found, logabsdet = self._joined(values, bins.left + part * bins.width, log_slopes)
        return found.to(outputs.dtype), logabsdet.to(outputs.dtype)

    def numbers_first(self, numbers: Tensor, values: Tensor) -> Tensor:
        """Return (3 K - 1, B, F) of (B, F (3 K - 1)): what is done along bins is faster then.

        In float32 at least: bins may be smaller than what half precision tells apart.
        """
        numbers = at_least_single(numbers).reshape(*values.shape, 3 * self.num_bins - 1)
        return numbers.movedim(-1, 0).contiguous()

    def differentiable(self, inputs: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `forward` does, by operations that are differentiated any number of times.

        Args:
            inputs: x, shape (B, F).
            numbers: of the network, shape (3 K - 1, B, F).
        """
        inside = inputs.clamp(-self.bound, self.bound)
        bins = self.bins_of(self.choose(inside, numbers))
        values, log_slopes = bins.value_and_log_slope((inside - bins.left) / bins.width)
        return self._joined(inputs, values, log_slopes)

    def _joined(self, given: Tensor, found: Tensor, log_slopes: Tensor) -> tuple[Tensor, Tensor]:
        is_inside = given.abs() <= self.bound
        logabsdet = torch.where(is_inside, log_slopes, 0.0).sum(dim=1)
        return torch.where(is_inside, found, given), logabsdet

    def choose(self, values: Tensor, numbers: Tensor, *, by_height: bool = False) -> Choice:
        """Find the bins of x, or of y, within the bounds.

        Starts and ends are the very knots that values are compared with, and the last one is b, so
        that no value is outside of its bin by rounding.

        Args:
            values: x, or y if `by_height`, shape (B, F).
            numbers: of the network, shape (3 K - 1, B, F).
            by_height: whether the bins along y are looked at.
        """
        split = 2 * self.num_bins
        sizes = (self.scale * numbers[:split]).reshape(2, self.num_bins, *values.shape)
        shares = sizes.softmax(dim=1)
        knots = self._knots(shares)
        which = (values >= knots[int(by_height), 1:-1]).sum(dim=0)
        ends = torch.stack([which, which + 1])
        starts, stops = knots.gather(1, ends.expand(2, *ends.shape)).unbind(1)
        slopes = F.pad(numbers[split:], (0, 0, 0, 0, 1, 1)).gather(0, ends)
        return Choice(which, shares, starts, stops - starts, slopes)

    def _knots(self, shares: Tensor) -> Tensor:
        """Return the knots along x and y, (2, K + 1, B, F)."""
        count, bound = self.num_bins, self.bound
        inner = torch.arange(1, count, dtype=shares.dtype, device=shares.device)
        inner = (self._least * inner - bound)[:, None, None]
        inner = torch.add(inner, shares.cumsum(dim=1)[:, :-1], alpha=self.growth)
        left, right = ((0, 0, 0, 0, 1, 0), (0, 0, 0, 0, 0, 1))
        return F.pad(F.pad(inner, left, value=-bound), right, value=bound)

    def bins_of(self, chosen: Choice) -> Bins:
        """Return the bins that were chosen."""
        (left, bottom), (width, height) = chosen.starts.unbind(0), chosen.sizes.unbind(0)
        first, last = (self.least_slope + F.softplus(chosen.slopes)).unbind(0)
        first = torch.where(chosen.which == 0, 1.0, first)
        last = torch.where(chosen.which == self.num_bins - 1, 1.0, last)
        mean = height / width
        bend = (first + last).sub(mean, alpha=2)
        return Bins(left, width, bottom, height, first, last, mean, bend)

    @property
    def _least(self) -> float:
        """The smallest width and height."""
        return 2 * self.bound * self.least_size

    @property
    def growth(self) -> float:
        """What shares are multiplied by, g."""
        return 2 * self.bound * (1 - self.num_bins * self.least_size)


class _Splines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, numbers: Tensor, family: Family) -> tuple[Tensor, Tensor]:
        inside = inputs.clamp(-family.bound, family.bound)
        chosen = family.choose(inside, numbers)
        bins = family.bins_of(chosen)
        at = bins.at((inside - bins.left) / bins.width)
        values, slope = bins.value_and_slope(at)
        is_inside = inputs.abs() <= family.bound
        ctx.family = family
        ctx.save_for_backward(inputs, numbers, is_inside, slope, *chosen, *bins, *at)
        logabsdet = torch.where(is_inside, slope, 1.0).log().sum(dim=1)
        return torch.where(is_inside, values, inputs), logabsdet

    @staticmethod
    def backward(
        ctx: Any, of_outputs: Tensor, of_logabsdet: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        family = ctx.family
        inputs, numbers, is_inside, slope, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():
            cotangents, given = [of_outputs, of_logabsdet], [inputs, numbers]
            first, second = pulled_back(family.differentiable, cotangents, given)
            return first, second, None
        chosen, rest = Choice(*rest[: len(Choice._fields)]), rest[len(Choice._fields) :]
        bins, at = Bins(*rest[: len(Bins._fields)]), Point(*rest[len(Bins._fields) :])
        within = torch.where(is_inside, of_outputs, 0.0)
        of_logs = torch.where(is_inside, of_logabsdet[:, None], 0.0)
        of_inside, of_bins = of_values(bins, at, slope, within, of_logs)
        of_numbers = _of_numbers(family, chosen, bins, of_bins)
        return torch.where(is_inside, of_inside, of_outputs), of_numbers, None


def _of_numbers(family: Family, chosen: Choice, found: Bins, of_bins: Tensor) -> Tensor:
    """Return what the numbers of the network receive, (3 K - 1, B, F).

    Args:
        family: the splines.
        chosen: the bins, and what they are made from.
        found: themselves.
        of_bins: what `of_values` says they receive.
    """
    start, of_bottom, part, of_height, of_mean, of_first, of_last = of_bins.unbind(0)
    by_width = of_mean / found.width
    of_width = torch.addcmul(part, by_width, found.mean)
    of_starts = torch.stack([-start, of_bottom])
    of_sizes = torch.stack([-of_width, of_height + by_width])
    which, count = chosen.which, family.num_bins
    is_before = torch.arange(count, device=which.device)[:, None, None] < which
    of_shares = torch.where(is_before, of_starts[:, None], 0.0)
    of_shares.scatter_(1, which.expand(2, 1, *which.shape), of_sizes[:, None])
    mean = (of_shares * chosen.shares).sum(dim=1, keepdim=True)
    of_shares = of_shares.sub_(mean).mul_(chosen.shares)
    of_sizes = of_shares.mul_(family.scale * family.growth).reshape(2 * count, *which.shape)
    of_slopes = torch.stack([of_first, of_last]) * chosen.slopes.sigmoid()
    of_knots = of_slopes.new_zeros(count + 1, *which.shape)
    of_knots.scatter_(0, torch.stack([which, which + 1]), of_slopes)
    return torch.cat([of_sizes, of_knots[1:-1]])
