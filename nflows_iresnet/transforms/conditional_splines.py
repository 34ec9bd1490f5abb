r"""Monotone rational-quadratic splines, another one for each value, as ONE node of the graph.

A network returns 3 K - 1 numbers for each value x: logits of K widths, logits of K heights, and
K - 1 slopes. With shares p = softmax(logits), a width is 2 b (l + (1 - K l) p_j) for the least
share l, and the left end of bin k is -b and the widths before it; likewise for heights. One bin is
needed, the one that x falls into: its w, h, x_k, y_k and slopes are picked first, and what follows
is the arithmetic of `rational_quadratic` on numbers of the shape of x.

Backwards, a cotangent U of the left end and V of the width are U for each share before the k-th and
V for the k-th itself, times g = 2 b (1 - K l). Through the softmax the logits receive

    g p_j (U [j < k] + V [j = k] - U sum_{i < k} p_i - V p_k).

Values beyond the bounds are taken to be there, where a spline has no choice: nothing comes back.
Automatic differentiation keeps every knot and walks back through it instead, which takes three
times as long as the network. The slow twin, which second derivatives are those of, is
`Family.differentiable`.

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
from nflows_iresnet.transforms.rational_quadratic import Bins, Point, of_values


class Choice(NamedTuple):
    """Which bin each value falls into, and what it is made from.

    Attributes:
        which: k, shape (B, F).
        shares: those of widths and of heights, shape (2, K, B, F).
        before: the sums of the shares before the k-th, shape (2, B, F).
        own: the k-th shares, shape (2, B, F).
        slopes: the numbers of the network for the slopes at both ends, shape (2, B, F); anything
            at the bounds.
    """

    which: Tensor
    shares: Tensor
    before: Tensor
    own: Tensor
    slopes: Tensor


@dataclass(frozen=True)
class Family:
    """The splines that the numbers of a network stand for.

    Args:
        num_bins: K.
        bound: b; beyond [-b, b] a spline is the identity.
        scale: what the logits are multiplied by first.
        least_width: smallest width of a bin, as a share of 2 b.
        least_height: smallest height, as a share of 2 b.
        least_slope: smallest slope at a knot, to which a softplus is added.
    """

    num_bins: int
    bound: float
    scale: float
    least_width: float
    least_height: float
    least_slope: float

    def forward(self, inputs: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the splines of values and the sums of their log-slopes, (B, F) and (B,).

        Args:
            inputs: x, shape (B, F).
            numbers: of the network, shape (B, F (3 K - 1)).
        """
        numbers = self._first(numbers, inputs)
        if is_traced():
            return self.differentiable(inputs, numbers)
        found: tuple[Tensor, Tensor] = _Splines.apply(inputs, numbers, self)
        return found

    def inverse(self, outputs: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values whose splines are y, and the sums of minus their log-slopes."""
        numbers = self._first(numbers, outputs)
        inside = outputs.clamp(-self.bound, self.bound)
        bins = self.bins_of(self.choose(inside, numbers, by_height=True))
        part = bins.part_at(inside)
        log_slopes = -bins.value_and_log_slope(part)[1]
        return self._joined(outputs, bins.left + part * bins.width, log_slopes)

    def _first(self, numbers: Tensor, values: Tensor) -> Tensor:
        """Put the 3 K - 1 numbers of each value first: what is done along them is faster then."""
        return numbers.reshape(*values.shape, 3 * self.num_bins - 1).movedim(-1, 0).contiguous()

    def differentiable(self, inputs: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `forward` does, by operations that are differentiated any number of times."""
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

        Args:
            values: x, or y if `by_height`, shape (B, F).
            numbers: of the network, shape (3 K - 1, B, F).
            by_height: whether the bins along y are looked at.
        """
        bins, sizes = self.num_bins, 2 * self.num_bins
        shares = (self.scale * numbers[:sizes]).unflatten(0, (2, bins)).softmax(dim=1)
        sums = shares.cumsum(dim=1)
        least = self.least_height if by_height else self.least_width
        ends = least * torch.arange(1, bins, dtype=values.dtype, device=values.device)
        growing = sums[int(by_height), :-1]
        ends = torch.add(ends[:, None, None], growing, alpha=1 - bins * least)
        index = ((values + self.bound) / (2 * self.bound) >= ends).sum(dim=0)
        at = index.expand(2, 1, *index.shape)
        own = shares.gather(1, at).squeeze(1)
        before = sums.gather(1, at).squeeze(1) - own
        slopes = F.pad(numbers[sizes:], (0, 0, 0, 0, 1, 1)).gather(0, _ends(index))
        return Choice(index, shares, before, own, slopes)

    def bins_of(self, chosen: Choice) -> Bins:
        """Return the bins that were chosen."""
        (left, width), (bottom, height) = self._along(chosen, 0), self._along(chosen, 1)
        first, last = (self.least_slope + F.softplus(chosen.slopes)).unbind(0)
        first = torch.where(chosen.which == 0, 1.0, first)
        last = torch.where(chosen.which == self.num_bins - 1, 1.0, last)
        mean = height / width
        bend = (first + last).sub(mean, alpha=2)
        return Bins(left, width, bottom, height, first, last, mean, bend)

    def _along(self, chosen: Choice, axis: int) -> tuple[Tensor, Tensor]:
        """Return where bins start along x or y, and how far they go."""
        least, growth = self._leasts[axis] * 2 * self.bound, self.growths[axis]
        before, own = chosen.before[axis], chosen.own[axis]
        start = least * chosen.which.to(before.dtype) - self.bound
        return torch.add(start, before, alpha=growth), least + growth * own

    @property
    def _leasts(self) -> tuple[float, float]:
        return self.least_width, self.least_height

    @property
    def growths(self) -> tuple[float, float]:
        """What shares of widths and of heights are multiplied by, g."""
        width, height = (2 * self.bound * (1 - self.num_bins * least) for least in self._leasts)
        return width, height


def _ends(index: Tensor) -> Tensor:
    """Return the numbers of the knots at both ends of bins."""
    return torch.stack([index, index + 1])


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
            outputs = family.differentiable(inputs, numbers)
            given = [inputs, numbers]
            first, second = pulled_back(outputs, [of_outputs, of_logabsdet], given)
            return first, second, None
        chosen, rest = Choice(*rest[: len(Choice._fields)]), rest[len(Choice._fields) :]
        bins, at = Bins(*rest[: len(Bins._fields)]), Point(*rest[len(Bins._fields) :])
        of_inside, of_bins = of_values(bins, at, slope, of_outputs, of_logabsdet[:, None])
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
    by_widths, by_heights = family.growths
    of_starts = torch.stack([-by_widths * start, by_heights * of_bottom])
    of_sizes = torch.stack([-by_widths * of_width, by_heights * (of_height + by_width)])
    mean = torch.addcmul(of_starts * chosen.before, of_sizes, chosen.own)
    bins = torch.arange(family.num_bins, device=mean.device)[:, None, None]
    of_shares = torch.where(bins < chosen.which, of_starts[:, None], 0.0)
    of_shares.scatter_(1, chosen.which.expand(2, 1, *mean.shape[1:]), of_sizes[:, None])
    of_logits = of_shares.sub_(mean[:, None]).mul_(chosen.shares).mul_(family.scale)
    of_slopes = torch.stack([of_first, of_last]) * chosen.slopes.sigmoid()
    of_knots = of_slopes.new_zeros(family.num_bins + 1, *mean.shape[1:])
    of_knots.scatter_(0, _ends(chosen.which), of_slopes)
    return torch.cat([of_logits.flatten(0, 1), of_knots[1:-1]])
