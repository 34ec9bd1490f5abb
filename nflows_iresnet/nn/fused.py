r"""Value, products J T and slopes of a dense network as ONE node of the graph, derived by hand.

With the tangents t_i = W_i (s_{i-1} o t_{i-1}), s_i = a'(u_i), t_0 = T, the node returns g(x),
t_n = J T and s_1, ..., s_{n-1}. Going back, with cotangents p of z_i and q of t_i,

    v = W_i^T q,
    p <- s_{i-1} o W_i^T p + a''(u_{i-1}) / e_{i-1} o (sum_T v o t_{i-1} + cotangent of s_{i-1}),
    q <- s_{i-1} o v.

Automatic differentiation of the same operations records several times as many of them, which is
most of the time of a small network. Second derivatives are those of the formulas above, evaluated
anew from x and the weights and differentiated automatically. The slow twin is
`nn.mlp.MLPLinearization`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_iresnet.linearization import is_traced
from nflows_iresnet.nn.activations import Activation, is_unit_wise
from nflows_iresnet.nn.base import Evaluation, LayeredFunction
from nflows_iresnet.precision import in_full_precision


class Fused(NamedTuple):
    """The outputs of the node: g(x), J T of shape (k, B, features), and the slopes."""

    value: Tensor
    pushed: Tensor
    slopes: Sequence[Tensor]


def can_fuse(function: LayeredFunction) -> bool:
    """Whether the node can stand for a dense network here.

    It needs hidden layers and activations that know their curvature. Compilers, `torch.func` and
    forward-mode differentiation look into the operations and get those.
    """
    return (
        len(function.activations) > 0
        and all(
            is_unit_wise(each) and cast(Activation, each).has_curvature
            for each in function.activations
        )
        and not is_traced()
    )


def fused(
    function: LayeredFunction, evaluation: Evaluation, inputs: Tensor, tangents: Tensor | None
) -> Fused:
    """Return g(x), J T and the slopes as outputs of one node.

    Args:
        function: a network for which `can_fuse` holds.
        evaluation: what `function.evaluate(inputs, with_slopes=True)` returned.
        inputs: x, shape (B, features).
        tangents: T, shape (k, B, features), or None for all coordinates.
    """
    tensors = [*function.weights, *function.shifts, *function.stretches]
    value, pushed, *slopes = _Pushforward.apply(function, evaluation, inputs, tangents, *tensors)
    return Fused(value, pushed, slopes)


def push(
    function: LayeredFunction, tangents: Tensor | None, slopes: Sequence[Tensor]
) -> list[Tensor]:
    """Return the tangents t_1, ..., t_n of all z_i.

    Args:
        function: a dense network.
        tangents: T, shape (k, B, features); None for all k = features coordinates, whose t_1
            is the same for all rows and has shape (k, 1, hidden).
        slopes: s_i, shapes (B, hidden).
    """
    first, *others = function.weights
    if tangents is None:
        # Contiguous, because products with the slopes would otherwise take eight times as long.
        pushed = [first.mT.contiguous()[:, None, :]]
    else:
        pushed = [F.linear(tangents, first)]
    for weight, slope in zip(others, slopes, strict=True):
        pushed.append(F.linear(pushed[-1] * slope, weight))
    return pushed


@in_full_precision
class _Pushforward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: LayeredFunction,
        evaluation: Evaluation,
        inputs: Tensor,
        tangents: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        *below, pushed = push(function, tangents, evaluation.slopes)
        ctx.function = replace(function, weights=(), shifts=(), stretches=())
        ctx.num_tensors, ctx.is_stretched = len(tensors), len(function.stretches) > 0
        kept = [*evaluation.slopes, *below, *evaluation.hidden]
        if ctx.is_stretched:
            kept += [*evaluation.units, *evaluation.activated]
        ctx.save_for_backward(inputs, tangents, *tensors, *kept)
        ctx.set_materialize_grads(False)
        slopes = [slope.detach() for slope in evaluation.slopes]
        return evaluation.value.detach(), pushed.detach(), *slopes

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, tangents, *saved = ctx.saved_tensors
        tensors, kept = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        hidden = len(ctx.function.activations)
        function = replace(
            ctx.function,
            weights=tensors[: hidden + 1],
            shifts=tensors[hidden + 1 : 2 * hidden + 2],
            stretches=tensors[2 * hidden + 2 :],
        )
        if torch.is_grad_enabled():
            evaluation = function.evaluate(inputs, with_slopes=True)
            below = push(function, tangents, evaluation.slopes)[:-1]
        else:
            slopes, below, states, *of_stretch = [
                kept[start : start + hidden] for start in range(0, len(kept), hidden)
            ]
            units, activated = of_stretch if ctx.is_stretched else ([], states)
            evaluation = Evaluation(inputs, units, activated, states, slopes)
        needed = ctx.needs_input_grad[2:]
        found = _pull_back(function, evaluation, below, inputs, tangents, cotangents, needed)
        return None, None, *found


def _pull_back(
    function: LayeredFunction,
    kept: Evaluation,
    below: Sequence[Tensor],
    inputs: Tensor,
    tangents: Tensor | None,
    cotangents: Sequence[Tensor | None],
    is_needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of x, T, the weights, the shifts and the stretches, in this order.

    The formulas of this module's docstring, with p and q stacked as (1 + k, B, out).

    Args:
        function: the network.
        kept: its evaluation at x; the value is not looked at.
        below: t_1, ..., t_{n-1}.
        inputs: x.
        tangents: T, or None for all coordinates.
        cotangents: of the value, of J T and of each slope; None for zero.
        is_needed: which gradients are wanted, in the order of the result.
    """
    weights: list[Tensor | None] = []
    shifts: list[Tensor | None] = []
    stretches: list[Tensor | None] = []
    stacked = _stacked(inputs, tangents, cotangents[0], cotangents[1], function.weights[-1])
    is_fed = cotangents[0] is not None or cotangents[1] is not None
    for index in reversed(range(1, len(function.weights))):
        slope, tangent = kept.slopes[index - 1], below[index - 1]
        if is_needed[2 + index]:
            of_value = stacked[0].mT @ kept.hidden[index - 1]
            weights.append(of_value + _outer(stacked[1:], tangent * slope))
        else:
            weights.append(None)
        shifts.append(_of_shift(function.shifts[index], stacked[0]))
        stacked = stacked @ function.weights[index]
        of_slope = (stacked[1:] * tangent).sum(0)
        given = cotangents[1 + index]
        activation = cast(Activation, function.activations[index - 1])
        curvature = activation.curvature(kept.activated[index - 1], slope)
        bend = (of_slope if given is None else of_slope + given) * curvature
        if function.stretches:
            stretch, units = function.stretches[index - 1], kept.units[index - 1]
            from_value = stacked[0] * (kept.activated[index - 1] - units * slope)
            stretches.append(from_value - bend * units / stretch)
            bend = bend / stretch
        stacked = stacked * slope
        if is_fed:
            stacked[0] += bend
        else:  # the zeros have no room for a batch of cotangents
            stacked = torch.cat([stacked[:1] + bend, stacked[1:]])
    of_units, of_tangents, first = stacked[0], stacked[1:], function.weights[0]
    if is_needed[2]:
        from_tangents = of_tangents.sum(1).mT if tangents is None else _outer(of_tangents, tangents)
        weights.append(of_units.mT @ inputs + from_tangents)
    else:
        weights.append(None)
    shifts.append(_of_shift(function.shifts[0], of_units))
    of_inputs = of_units @ first if is_needed[0] else None
    of_given = of_tangents @ first if is_needed[1] else None
    return [of_inputs, of_given, *weights[::-1], *shifts[::-1], *stretches[::-1]]


def _stacked(
    inputs: Tensor,
    tangents: Tensor | None,
    of_value: Tensor | None,
    of_pushed: Tensor | None,
    last: Tensor,
) -> Tensor:
    """Return the cotangents of value and J T as one tensor (1 + k, B, out); zeros for None."""
    count = inputs.shape[1] if tangents is None else tangents.shape[0]
    if of_value is None:
        of_value = inputs.new_zeros(inputs.shape[0], last.shape[0])
    if of_pushed is None:
        of_pushed = inputs.new_zeros(count, inputs.shape[0], last.shape[0])
    return torch.cat([of_value[None], of_pushed])


def _of_shift(shift: Tensor, of_units: Tensor) -> Tensor:
    return of_units.sum(0) if shift.dim() == 1 else of_units


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of the outer products over tangents and rows."""
    return left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])
