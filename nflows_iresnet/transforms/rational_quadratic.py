r"""Monotone rational-quadratic splines of the columns of a batch, as ONE node of the graph.

Within a bin of width w, height h, mean slope s = h / w and slopes d_0 and d_1 at its ends, with
t = (x - x_k) / w and m = t (1 - t),

    y = y_k + h R,    R = t a / D,    log dy/dx = log(s^2 N / D^2),
    a = d_0 (1 - t) + s t,    b = s (1 - t) + d_1 t,    N = a (1 - t) + b t,
    D = s + e m,    e = d_0 + d_1 - 2 s.

`rational_quadratic_spline` says what comes back with cotangents Y of y and L of log dy/dx, which is
differentiated automatically by three times as many operations. The slow twin, which second
derivatives are those of, is `differentiable`.

References:
    Gregory, Delbourgo. Piecewise rational quadratic interpolation to monotonic data, 1982.
    Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_iresnet.linearization import is_traced, pulled_back

MIN_SIZE = 0.01
"""Smallest width and height of a bin, as a part of the mean."""
MAX_LOG_SLOPE = 5.0
"""Bound of log d_k, so that no step of an optimiser makes a slope zero or infinite."""


class Point(NamedTuple):
    """Where values are in their bins, and the a, b, N, D and R of this module's docstring."""

    part: Tensor
    rest: Tensor
    mixed: Tensor
    before: Tensor
    after: Tensor
    numerator: Tensor
    denominator: Tensor
    rise: Tensor


class Bins(NamedTuple):
    """The bins that values fall into, each field of the shape of the values.

    Attributes:
        left: where the bin starts, x_k.
        width: w.
        bottom: what its start is mapped to, y_k.
        height: h.
        first: slope at its start, d_0.
        last: slope at its end, d_1.
        mean: s = h / w.
        bend: e = d_0 + d_1 - 2 s.
    """

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    first: Tensor
    last: Tensor
    mean: Tensor
    bend: Tensor

    def at(self, part: Tensor) -> Point:
        """Return what there is to know at a part t of the width."""
        rest = 1 - part
        mixed = part * rest
        before, after = self.first.lerp(self.mean, part), self.mean.lerp(self.last, part)
        denominator = torch.addcmul(self.mean, self.bend, mixed)
        rise = part * before / denominator
        numerator = before.lerp(after, part)
        return Point(part, rest, mixed, before, after, numerator, denominator, rise)

    def value_and_slope(self, at: Point) -> tuple[Tensor, Tensor]:
        """Return y and dy/dx."""
        slope = (self.mean / at.denominator).square() * at.numerator
        return torch.addcmul(self.bottom, self.height, at.rise), slope

    def value_and_log_slope(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx at a part t of the width."""
        value, slope = self.value_and_slope(self.at(part))
        return value, slope.log()

    def part_at(self, value: Tensor) -> Tensor:
        """Return the t in [0, 1] whose value is given, without cancellation.

        With u = (y - y_k) / h and a = d_0 (1 - u) - d_1 u it solves a quadratic equation,

            t = 2 u s / (2 u s + a + sqrt(a^2 + 4 s^2 u (1 - u))),

        and where a is negative, the sum of the last two is that under the root less a^2, divided by
        their difference: only sums of what is not negative are left.
        """
        share = (value - self.bottom) / self.height
        left, mixed = 1 - share, 2 * share * self.mean
        lead = self.first * left - self.last * share
        product = 2 * self.mean * left * mixed
        is_positive = lead >= 0
        root = (lead * lead + product).sqrt()
        total = root + torch.where(is_positive, lead, -lead)
        return mixed / (mixed + torch.where(is_positive, total, product / total))


def split(inputs: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return the nearest values within the knots, and what they lack, in float64."""
    double = inputs.double()
    inside = double.clamp(-bound, bound)
    return inside, double - inside


def knots_of(sizes: Tensor, bound: float) -> Tensor:
    """Return the knots and their images, (2, features, K + 1), for sizes (2, features, K)."""
    return _knots(sizes.double().softmax(2), bound)


def _knots(shares: Tensor, bound: float) -> Tensor:
    end = bound * (2 * MIN_SIZE - 1)
    least = torch.linspace(
        -bound, end, shares.shape[2] + 1, dtype=shares.dtype, device=shares.device
    )
    return least.add(F.pad(shares, (1, 0)).cumsum(2), alpha=_growth(bound))


def _growth(bound: float) -> float:
    """Return what the softmax of the sizes is multiplied by."""
    return 2 * bound * (1 - MIN_SIZE)


def _bent(log_slopes: Tensor) -> Tensor:
    return (log_slopes.double() / MAX_LOG_SLOPE).tanh()


def table_of(knots: Tensor, log_slopes: Tensor) -> Tensor:
    """Return the eight numbers of each bin, (8, features * K)."""
    return _table(knots, (MAX_LOG_SLOPE * _bent(log_slopes)).exp())


def _table(knots: Tensor, inner_slopes: Tensor) -> Tensor:
    slopes = F.pad(inner_slopes, (1, 1), value=1.0)
    (left, bottom), (width, height) = knots[..., :-1], knots.diff(dim=2)
    first, last, mean = slopes[:, :-1], slopes[:, 1:], height / width
    bend = (first + last).sub(mean, alpha=2)
    columns = [left, width, bottom, height, first, last, mean, bend]
    return torch.stack(columns).flatten(1)


def bins_of(values: Tensor, along: Tensor, table: Tensor) -> tuple[Bins, Tensor]:
    """Return the bins of values (B, features) between knots (features, K + 1), and their index."""
    features, bins = along.shape[0], along.shape[1] - 1
    first = torch.arange(0, features * bins, bins, device=values.device)
    index = ((values[..., None] >= along[:, 1:-1]).sum(-1) + first).flatten()
    chosen = table.index_select(1, index)
    return Bins(*chosen.reshape(chosen.shape[0], *values.shape).unbind(0)), index


def rational_quadratic_spline(
    inputs: Tensor, sizes: Tensor, log_slopes: Tensor, bound: float
) -> tuple[Tensor, Tensor]:
    r"""Return the splines of the columns of x and the sum of their log-slopes, (B, F) and (B,).

    With cotangents Y of y and L of the sum, A = Y h / D and C = A R + 2 L / D, what comes back is

        to x:    G = Y dy/dx + 2 (L (b - a) / N - L e (1 - 2 t) / D) / w,    Y beyond the bounds,
        to d_0:  (A - C) m + L (1 - t)^2 / N,
        to d_1:  L t^2 / N - C m,
        to s:    S = A t^2 + 2 m (C + L / N) - C + 2 L / s,
        to w and h, beside s:  -G t and Y R,    to x_k and y_k:  -G and Y.

    Summed over the values of each bin, S / w goes to h, and -S s / w to w. Knots are cumulated
    sizes, so that a size receives what its own bin does, less what the starts of the bins up to its
    own do; the constant that is missing is none to the softmax.

    Args:
        inputs: x, shape (B, F).
        sizes: unconstrained widths and heights, shape (2, F, K).
        log_slopes: unconstrained slopes, shape (F, K - 1).
        bound: b; beyond, y = x.
    """
    if is_traced():
        return differentiable(inputs, sizes, log_slopes, bound)
    found: tuple[Tensor, Tensor] = _Spline.apply(inputs, sizes, log_slopes, bound)
    return found


def differentiable(
    inputs: Tensor, sizes: Tensor, log_slopes: Tensor, bound: float
) -> tuple[Tensor, Tensor]:
    """Return the same by operations that are differentiated automatically, any number of times."""
    inside, beyond = split(inputs, bound)
    knots = knots_of(sizes, bound)
    bins, _ = bins_of(inside, knots[0], table_of(knots, log_slopes))
    outputs, log_slope = bins.value_and_log_slope((inside - bins.left) / bins.width)
    return (outputs + beyond).to(inputs.dtype), log_slope.sum(1).to(inputs.dtype)


class _Spline(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, sizes: Tensor, log_slopes: Tensor, bound: float
    ) -> tuple[Tensor, Tensor]:
        inside, beyond = split(inputs, bound)
        shares, bent = sizes.double().softmax(2), _bent(log_slopes)
        knots, inner_slopes = _knots(shares, bound), (MAX_LOG_SLOPE * bent).exp()
        bins, index = bins_of(inside, knots[0], _table(knots, inner_slopes))
        at = bins.at((inside - bins.left) / bins.width)
        outputs, slope = bins.value_and_slope(at)
        ctx.bound = bound
        of_parameters = [shares, knots, bent, inner_slopes]
        ctx.save_for_backward(
            *(inputs, sizes, log_slopes, *of_parameters, beyond, index, slope), *bins, *at
        )
        logabsdet = slope.log().sum(1)
        return (outputs + beyond).to(inputs.dtype), logabsdet.to(inputs.dtype)

    @staticmethod
    def backward(
        ctx: Any, of_outputs: Tensor, of_logabsdet: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        inputs, sizes, log_slopes, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = partial(differentiable, bound=ctx.bound)
            given, cotangents = [inputs, sizes, log_slopes], [of_outputs, of_logabsdet]
            first, second, third = pulled_back(again, cotangents, given)
            return first, second, third, None
        (shares, knots, bent, inner_slopes, beyond, index, slope), rest = kept[:7], kept[7:]
        bins, at = Bins(*rest[: len(Bins._fields)]), Point(*rest[len(Bins._fields) :])
        of_outputs, of_logs = of_outputs.double(), of_logabsdet.double()[:, None]
        of_inside, of_bins = of_values(bins, at, slope, of_outputs, of_logs)
        summed = of_bins.new_zeros(of_bins.shape[0], shares[0].numel())
        each = of_bins.reshape(of_bins.shape[0], index.shape[0])
        summed = summed.index_add(1, index, each).reshape(-1, *shares.shape[1:])
        of_sizes = _of_shares(summed, knots.diff(dim=2), shares) * _growth(ctx.bound)
        of_slopes = (summed[5, :, 1:] + summed[6, :, :-1]) * inner_slopes
        of_slopes = torch.addcmul(of_slopes, of_slopes * bent, bent, value=-1)
        of_inputs = torch.where(beyond == 0, of_inside, of_outputs)
        return (
            of_inputs.to(inputs.dtype),
            of_sizes.to(sizes.dtype),
            of_slopes.to(log_slopes.dtype),
            None,
        )


def of_values(
    bins: Bins, at: Point, slope: Tensor, of_outputs: Tensor, of_logs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return G, and what each value gives its bin: G, Y, G t, Y R, S, to d_0 and to d_1."""
    by_numerator, by_denominator = of_logs / at.numerator, of_logs / at.denominator
    of_rise = of_outputs * bins.height / at.denominator
    of_denominator = (of_rise * at.rise).add(by_denominator, alpha=2)
    turn = (at.rest - at.part) * bins.bend
    of_part = torch.addcmul((at.after - at.before) * by_numerator, by_denominator, turn, value=-1)
    of_inside = torch.addcdiv(of_outputs * slope, of_part, bins.width, value=2)
    square = at.part.square()
    of_last = torch.addcmul(by_numerator * square, of_denominator, at.mixed, value=-1)
    of_first = by_numerator * at.rest.square()
    of_first = of_first.addcmul(of_rise - of_denominator, at.mixed)
    of_mean = torch.addcdiv(of_rise * square - of_denominator, of_logs, bins.mean, value=2)
    of_mean = of_mean.addcmul(of_denominator + by_numerator, at.mixed, value=2)
    beside = [of_inside * at.part, of_outputs * at.rise]
    return of_inside, torch.stack([of_inside, of_outputs, *beside, of_mean, of_first, of_last])


def _of_shares(summed: Tensor, sizes: Tensor, shares: Tensor) -> Tensor:
    """Return what the sizes before the softmax receive, but for the factor of `_growth`.

    Args:
        summed: of the seven that `of_values` returns the sums over each bin, (7, F, K).
        sizes: w and h, shape (2, F, K).
        shares: the softmax, shape (2, F, K).
    """
    of_starts, of_sizes, of_mean = summed[:2], summed[2:4], summed[4]
    by_width = of_mean / sizes[0]
    of_sizes = of_sizes + torch.stack([by_width * (sizes[1] / sizes[0]), by_width])
    centred = of_sizes - of_starts.cumsum(2)
    found = shares * (centred - (centred * shares).sum(2, keepdim=True))
    found[0].neg_()
    return found
