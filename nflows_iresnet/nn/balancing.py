r"""Weights that share one budget of norms and are balanced by scales, as ONE node of the graph.

With norms s_i of the stored weights V_i, i = 1, ..., n, a budget B and scales e_i = exp(l_i) of the
hidden units, l_i kept within bounds, the weights and shifts that are used are

    W_i = f e_i^{-1} V_i e_{i-1},    b'_i = b_i / e_i,    f = min(1, B / prod_i s_i)^{1/n},

where e_0 = e_n = 1 and b'_n = b_n is left to the caller. f and f / e_i have at least the precision
of float32: beside large weights of float16 f would be subnormal there. Products are rounded to the
precision of the weights once, at the end. With cotangents G_i of W_i, g_i of b'_i,
q_i of e_i, and P_i = G_i o W_i, what comes back is

    to V_i:  f e_i^{-1} G_i e_{i-1},    to b_i:  g_i / e_i,
    to l_i:  columns(P_{i+1}) - rows(P_i) - g_i b'_i + q_i e_i, zero beyond the bounds of l_i,
    to s_i:  -(sum over all P) / (n s_i), zero where f = 1,

with the sums over rows and columns: half of what automatic differentiation asks for. Second
derivatives are those of the slow twin, `differentiable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nflows_iresnet.conditioning import MAX_LOG_SCALE, bounded_exp
from nflows_iresnet.linearization import is_traced, pulled_back


class Balanced(NamedTuple):
    """What K networks use, each place stacked.

    Attributes:
        weights: W_i, shapes (K, out, in, *).
        shifts: b'_i of the layers with scales, shapes (K, out).
        scales: e_i, shapes (K, hidden).
    """

    weights: list[Tensor]
    shifts: list[Tensor]
    scales: list[Tensor]


class Stored(NamedTuple):
    """What K networks store, each place stacked.

    Attributes:
        weights: V_i, shapes (K, out, in, *).
        shifts: b_i of the layers with scales, shapes (K, out).
        log_scales: l_i, shapes (K, hidden): of all hidden layers, or of none.
    """

    weights: Sequence[Tensor]
    shifts: Sequence[Tensor]
    log_scales: Sequence[Tensor]


def balanced(stored: Stored, norms: Tensor, log_budget: float) -> Balanced:
    """Return the weights and shifts that are used, and the scales.

    Args:
        stored: V_i, b_i and l_i.
        norms: s_i > 0, shape (n, K), in float64.
        log_budget: log B.
    """
    if is_traced():
        return differentiable(stored, norms, log_budget)
    sizes = [len(group) for group in stored]
    tensors = [each for group in stored for each in group]
    return Balanced(*_grouped(_Balanced.apply(sizes, log_budget, norms, *tensors), sizes))


def differentiable(stored: Stored, norms: Tensor, log_budget: float) -> Balanced:
    """Return the same by operations that are differentiated automatically, any number of times."""
    return _evaluated(stored, share_of_budget(norms, log_budget))[0]


class _Rates(NamedTuple):
    """What the rows of all weights are multiplied by, and the columns of all but the first."""

    rows: list[Tensor]
    columns: list[Tensor]

    def times(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return weights with rows and columns multiplied, in the dtypes that they had."""
        by_rows = [weight * rate for weight, rate in zip(weights, self.rows, strict=True)]
        count = len(self.columns) + 1
        by_both = [each * rate for each, rate in zip(by_rows[1:count], self.columns, strict=True)]
        products = [by_rows[0], *by_both, *by_rows[count:]]
        return [each.to(weight.dtype) for each, weight in zip(products, weights, strict=True)]


def _evaluated(stored: Stored, share: Tensor) -> tuple[Balanced, _Rates]:
    scales = [bounded_exp(each) for each in stored.log_scales]
    shifts = [shift / scale for shift, scale in zip(stored.shifts, scales, strict=True)]
    rates = _rates(stored.weights, as_factor(share, stored.weights[0]), scales)
    return Balanced(rates.times(stored.weights), shifts, scales), rates


def share_of_budget(norms: Tensor, log_budget: float) -> Tensor:
    """Return f, shape (K,), for norms (n, K)."""
    excess = (norms.log().sum(0) - log_budget).clamp_min(0)
    return (excess * (-1 / norms.shape[0])).exp()


def as_factor(values: Tensor, weight: Tensor) -> Tensor:
    """Return values to multiply a weight by, in its precision or that of float32."""
    return values.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def multiplied(weight: Tensor, factor: Tensor) -> Tensor:
    """Return a weight times a factor of any precision, rounded to that of the weight once."""
    factor = as_factor(factor, weight)
    return (weight.to(factor.dtype) * factor).to(weight.dtype)


def balanced_weights(
    weights: Sequence[Tensor], factors: Tensor, scales: Sequence[Tensor]
) -> list[Tensor]:
    """Return f e_i^{-1} V_i e_{i-1} for f (*), e_i (*, hidden), V_i (*, out, in, *kernel)."""
    return _rates(weights, factors, scales).times(weights)


def _rates(weights: Sequence[Tensor], factors: Tensor, scales: Sequence[Tensor]) -> _Rates:
    """Return f / e_i for the rows and e_{i-1} for the columns.

    An activation that widens gives each unit's scale to several columns.
    """
    of_rows, of_columns = [], []
    for index, weight in enumerate(weights):
        kernel = [1] * (weight.dim() - factors.dim() - 2)
        rows = factors[..., None]
        rows = rows / scales[index] if index < len(scales) else rows
        of_rows.append(rows.reshape(*rows.shape, 1, *kernel))
        if 0 < index <= len(scales):
            scale = scales[index - 1]
            widening = weight.shape[factors.dim() + 1] // scale.shape[-1]
            columns = scale if widening == 1 else torch.cat([scale] * widening, dim=-1)
            of_columns.append(columns[..., None, :].reshape(*factors.shape, 1, -1, *kernel))
    return _Rates(of_rows, of_columns)


def _grouped(tensors: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Return tensors in groups of the sizes."""
    remaining = iter(tensors)
    return [[next(remaining) for _ in range(size)] for size in sizes]


class _Balanced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sizes: Sequence[int], log_budget: float, norms: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        share = share_of_budget(norms, log_budget)
        found, rates = _evaluated(Stored(*_grouped(tensors, sizes)), share)
        outputs = [each for group in found for each in group]
        ctx.sizes, ctx.log_budget = sizes, log_budget
        # Views of outputs that are saved as they are would keep the node alive for ever.
        columns = [each.detach() for each in rates.columns]
        ctx.save_for_backward(norms, *tensors, *outputs, share, *rates.rows, *columns)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        norms, *saved = ctx.saved_tensors
        num_weights, _, num_scales = sizes = ctx.sizes
        sizes = [*sizes, *sizes, 1, num_weights, num_scales]
        weights, shifts, log_scales, *used, (share,), rows, columns = _grouped(saved, sizes)
        stored, of_used = Stored(weights, shifts, log_scales), _grouped(cotangents, ctx.sizes)
        if torch.is_grad_enabled():
            return None, None, *_derivatives(ctx, of_used, [norms, *saved[: sum(ctx.sizes)]])
        of_weights, of_shifts = [
            [torch.zeros_like(each) if rate is None else rate for each, rate in pairs]
            for pairs in map(zip, used[:2], of_used[:2])
        ]
        of_norms, of_stored = _pull_back(
            stored.log_scales,
            Balanced(*used),
            (of_weights, of_shifts, of_used[2]),
            _Rates(rows, columns),
            share,
        )
        return None, None, of_norms / norms, *[each for group in of_stored for each in group]


def _derivatives(
    ctx: Any, of_used: Sequence[Sequence[Tensor | None]], given: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return what comes back to the norms and to what is stored, with a graph."""
    cotangents = [each for group in of_used for each in group]

    def balance(norms: Tensor, *stored: Tensor) -> list[Tensor]:
        made = differentiable(Stored(*_grouped(stored, ctx.sizes)), norms, ctx.log_budget)
        outputs = [each for group in made for each in group]
        return [each for each, of in zip(outputs, cotangents, strict=True) if of is not None]

    return pulled_back(balance, [each for each in cotangents if each is not None], given)


def _pull_back(
    log_scales: Sequence[Tensor],
    used: Balanced,
    of_used: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]],
    rates: _Rates,
    share: Tensor,
) -> tuple[Tensor, Stored]:
    """Return what comes back to the logarithms of the norms (K,), and to V_i, b_i and l_i."""
    of_weights, of_shifts, of_scales = of_used
    products = [each * rate for each, rate in zip(used.weights, of_weights, strict=True)]
    of_rows = [each.sum([*range(2, each.dim())]) for each in products]
    total = torch.stack([each.sum(1) for each in of_rows]).sum(0).double()
    of_norms = total * (share < 1) * (-1 / len(products))
    of_logs = []
    for index, (log_scale, shift, scale) in enumerate(
        zip(log_scales, used.shifts, used.scales, strict=True)
    ):
        columns = products[index + 1].sum([1, *range(3, products[index + 1].dim())])
        if columns.shape != scale.shape:
            columns = columns.unflatten(1, (-1, scale.shape[1])).sum(1)
        of_log = columns - of_rows[index]
        of_log = of_log.addcmul(of_shifts[index], shift, value=-1)
        if (of_scale := of_scales[index]) is not None:
            of_log = of_log.addcmul(of_scale, scale)
        of_logs.append(of_log * (log_scale.abs() <= MAX_LOG_SCALE))
    of_biases = [rate / scale for rate, scale in zip(of_shifts, used.scales, strict=True)]
    return of_norms, Stored(rates.times(of_weights), of_biases, of_logs)
