r"""Value, products J T and slopes of a layered network as ONE node of the graph, derived by hand.

With the tangents t_i = W_i (s_{i-1} o t_{i-1}), s_i = a'(u_i), t_0 = T, the node returns g(x),
t_n = J T and s_1, ..., s_{n-1}. Going back, with cotangents p of z_i and q of t_i,

    v = W_i^T q,
    p <- s_{i-1} o W_i^T p + a''(u_{i-1}) / e_{i-1} o (sum_T v o t_{i-1} + cotangent of s_{i-1}),
    q <- s_{i-1} o v.

Automatic differentiation of the same operations records several times as many of them, which is
most of the time of a small network. Second derivatives are those of the formulas above, evaluated
anew from x and the weights and differentiated automatically. W_i stands for the linear map of a
layer, a matrix or a convolution: `LayeredFunction.push`, `pull` and `outer`. The slow twins are
`nn.mlp.MLPLinearization` and `nn.cnn.ConvLinearization`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nflows_iresnet.linearization import ForwardLinearization, is_traced, row_products
from nflows_iresnet.nn.activations import Activation, is_unit_wise, widening_of
from nflows_iresnet.nn.base import Evaluation, LayeredFunction
from nflows_iresnet.precision import in_full_precision


class Fused(NamedTuple):
    """The outputs of the node: g(x), J T of shape (k, B, *), and the slopes."""

    value: Tensor
    pushed: Tensor
    slopes: Sequence[Tensor]


class Pairing(NamedTuple):
    """Vectors w and s, for which s^T J v is wanted with the derivative of w^T J v."""

    for_derivative: Tensor
    for_value: Tensor


def can_fuse(function: LayeredFunction) -> bool:
    """Whether the node can stand for a network here.

    It needs hidden layers and activations that know their curvature. Compilers, `torch.func` and
    forward-mode differentiation look into the operations and get those.
    """
    return (
        len(function.activations) > 0
        and all(
            is_unit_wise(each) and cast(Activation, each).has_curvature and widening_of(each) == 1
            for each in function.activations
        )
        and not is_traced()
    )


class FusedLinearization(ForwardLinearization):
    """A linearisation with all that is differentiated in one node of the graph.

    The network is evaluated once, without a graph. Where gradients are recorded, the first product
    that is asked for makes the node, and what is asked for later takes its part of it; so ask for
    products before the value.

    Args:
        function: a network for which `can_fuse` holds.
        inputs: x, shape (B, *).
    """

    def __init__(self, function: LayeredFunction, inputs: Tensor) -> None:
        self._function, self._inputs = function, inputs
        with torch.no_grad():
            self._evaluation = function.evaluate(inputs, with_slopes=True)
        self._first: Fused | None = None

    @property
    def like(self) -> Tensor:
        """The value without a graph."""
        return self._evaluation.value

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        """g(x), shape (B, *)."""
        return self._any_node().value if torch.is_grad_enabled() else self._evaluation.value

    @property
    def _slopes(self) -> Sequence[Tensor]:
        return self._any_node().slopes if torch.is_grad_enabled() else self._evaluation.slopes

    def _any_node(self) -> Fused:
        return self._first or self._node(self._inputs.new_zeros(0, *self._inputs.shape))

    def _node(self, tangents: Tensor | None, pairing: Pairing | None = None) -> Fused:
        node = fused(self._function, self._evaluation, self._inputs, tangents, pairing)
        if torch.is_grad_enabled() and self._first is None:
            self._first = node
        return node

    def jvp(self, tangent: Tensor) -> Tensor:
        """Return J v."""
        return self._node(tangent[None]).pushed[0]

    def surrogate(self, for_value: Tensor, for_derivative: Tensor, tangent: Tensor) -> Tensor:
        """Return s^T J v with the derivative of w^T J v, shape (B,)."""
        return self._node(tangent[None], Pairing(for_derivative, for_value)).pushed


def fused(
    function: LayeredFunction,
    evaluation: Evaluation,
    inputs: Tensor,
    tangents: Tensor | None,
    pairing: Pairing | None = None,
) -> Fused:
    """Return g(x), J T and the slopes as outputs of one node.

    Args:
        function: a network for which `can_fuse` holds.
        evaluation: what `function.evaluate(inputs, with_slopes=True)` returned.
        inputs: x, shape (B, *).
        tangents: T, shape (k, B, *); None for all coordinates of a dense network.
        pairing: if given, s^T J v of shape (B,) stands for J T, T = v, k = 1.
    """
    tensors = [*function.weights, *function.shifts, *function.stretches]
    value, pushed, *slopes = _Pushforward.apply(
        function, evaluation, pairing, inputs, tangents, *tensors
    )
    return Fused(value, pushed, slopes)


def push(
    function: LayeredFunction, tangents: Tensor | None, slopes: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tangents t_1, ..., t_n of all z_i, and s_i o t_i of the hidden ones.

    Args:
        function: the network.
        tangents: T, shape (k, B, *); None for all k = features coordinates of a dense one, whose
            t_1 is the same for all rows and has shape (k, 1, hidden).
        slopes: s_i, shapes (B, hidden, *).
    """
    if tangents is None:
        # Contiguous, because products with the slopes would otherwise take eight times as long.
        pushed = [function.weights[0].mT.contiguous()[:, None, :]]
    else:
        pushed = [function.push(tangents, 0)]
    scaled = []
    for index, slope in enumerate(slopes):
        scaled.append(pushed[-1] * slope)
        pushed.append(function.push(scaled[-1], index + 1))
    return pushed, scaled


_FEW_TANGENTS = 3
"""Up to so many, what one product saves is worth the memory of s_i o t_i."""


@in_full_precision
class _Pushforward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: LayeredFunction,
        evaluation: Evaluation,
        pairing: Pairing | None,
        inputs: Tensor,
        tangents: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        (*below, pushed), scaled = push(function, tangents, evaluation.slopes)
        ctx.function = replace(function, weights=(), shifts=(), stretches=())
        ctx.num_tensors, ctx.is_stretched = len(tensors), len(function.stretches) > 0
        ctx.is_paired = pairing is not None
        if pushed.shape[0] > _FEW_TANGENTS:
            scaled = []
        ctx.has_scaled = len(scaled) > 0
        kept = [*evaluation.slopes, *below, *evaluation.hidden, *evaluation.activated, *scaled]
        if ctx.is_stretched:
            kept += evaluation.units
        for_derivative = None if pairing is None else pairing.for_derivative
        ctx.save_for_backward(inputs, tangents, for_derivative, *tensors, *kept)
        ctx.set_materialize_grads(False)
        slopes = [slope.detach() for slope in evaluation.slopes]
        pushed = pushed if pairing is None else row_products(pairing.for_value, pushed[0])
        return evaluation.value.detach(), pushed.detach(), *slopes

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, tangents, for_derivative, *saved = ctx.saved_tensors
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
            (*below, _), scaled = push(function, tangents, evaluation.slopes)
        else:
            slopes, below, states, activated, *others = [
                kept[start : start + hidden] for start in range(0, len(kept), hidden)
            ]
            scaled = others.pop(0) if ctx.has_scaled else []
            units = others
            evaluation = Evaluation(inputs, units[0] if units else [], activated, states, slopes)
        of_value, of_pushed, *of_slopes = cotangents
        if ctx.is_paired and of_pushed is not None:
            rates = of_pushed.reshape(-1, *[1] * (inputs.dim() - 1))
            of_pushed = (rates * for_derivative)[None]
        found = _pull_back(
            function,
            evaluation,
            (below, scaled),
            (inputs, tangents),
            (of_value, of_pushed, of_slopes),
            ctx.needs_input_grad[3:],
        )
        return None, None, None, *found


def _pull_back(
    function: LayeredFunction,
    kept: Evaluation,
    of_layers: tuple[Sequence[Tensor], Sequence[Tensor]],
    given: tuple[Tensor, Tensor | None],
    cotangents: tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]],
    is_needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of x, T, the weights, the shifts and the stretches, in this order.

    The formulas of this module's docstring, with p and q stacked as (1 + k, B, out, *).

    Args:
        function: the network.
        kept: its evaluation at x; the value is not looked at.
        of_layers: t_i and s_i o t_i of the hidden layers.
        given: x, and T or None for all coordinates.
        cotangents: of the value, of J T and of each slope; None for zero.
        is_needed: which gradients are wanted, in the order of the result.
    """
    (below, scaled), (inputs, tangents) = of_layers, given
    of_value, of_pushed, of_slopes = cotangents
    weights: list[Tensor | None] = []
    shifts: list[Tensor | None] = []
    stretches: list[Tensor | None] = []
    stacked = _stacked(inputs, tangents, of_value, of_pushed)
    is_own = (of_value is not None or of_pushed is not None) and not torch.is_grad_enabled()
    for index in reversed(range(1, len(function.weights))):
        slope, before = kept.slopes[index - 1], index - 1
        weights.append(None)
        if is_needed[2 + index]:
            fed = scaled[before] if scaled else below[before] * slope
            pairs = [(stacked[:1], kept.hidden[before][None]), (stacked[1:], fed)]
            weights[-1] = function.outer(pairs, index)
        shifts.append(_of_shift(function.shifts[index], stacked[0]))
        stacked = function.pull(stacked, index)
        bend = _of_slope(stacked[1:], below[before], of_slopes[before])
        activation = cast(Activation, function.activations[before])
        curvature = function.units_back(
            activation.curvature(kept.activated[before], function.units_last(slope))
        )
        if function.stretches:
            stretch, units = function.stretches[before], kept.units[before]
            of_units = function.units_last(bend * curvature) / stretch
            rest = kept.activated[before] - units * function.units_last(slope)
            of_stretch = function.units_last(stacked[0]) * rest - of_units * units
            stretches.append(of_stretch.sum_to_size(stretch.shape))
            curvature = curvature / function.units_back(stretch)
        if is_own:
            stacked = stacked.mul_(slope)
            stacked[0].addcmul_(bend, curvature)
        else:  # the zeros have no room for a batch of cotangents
            stacked = stacked * slope
            stacked = torch.cat([stacked[:1] + bend * curvature, stacked[1:]])
    of_units, of_tangents = stacked[:1], stacked[1:]
    weights.append(_of_first(function, of_units, of_tangents, given) if is_needed[2] else None)
    shifts.append(_of_shift(function.shifts[0], of_units[0]))
    of_inputs = function.pull(of_units, 0)[0] if is_needed[0] else None
    of_given = function.pull(of_tangents, 0) if is_needed[1] else None
    return [of_inputs, of_given, *weights[::-1], *shifts[::-1], *stretches[::-1]]


def _stacked(
    inputs: Tensor,
    tangents: Tensor | None,
    of_value: Tensor | None,
    of_pushed: Tensor | None,
) -> Tensor:
    """Return the cotangents of value and J T as one tensor (1 + k, B, *); zeros for None."""
    if of_value is None:
        of_value = torch.zeros_like(inputs)
    if of_pushed is None:
        count = inputs.shape[1] if tangents is None else tangents.shape[0]
        of_pushed = inputs.new_zeros(count, *inputs.shape)
    return torch.cat([of_value[None], of_pushed])


def _of_first(
    function: LayeredFunction,
    of_units: Tensor,
    of_tangents: Tensor,
    given: tuple[Tensor, Tensor | None],
) -> Tensor:
    """Return the gradient of the first weight, from cotangents of z_1 and t_1, and x and T."""
    inputs, tangents = given
    if tangents is None:
        return torch.addmm(of_tangents.sum(1).mT, of_units[0].mT, inputs)
    return function.outer([(of_units, inputs[None]), (of_tangents, tangents)], 0)


def _of_shift(shift: Tensor, of_units: Tensor) -> Tensor:
    if shift.dim() > 1:
        return of_units.sum_to_size(shift.shape)
    return of_units.sum([0, *range(2, of_units.dim())])


def _of_slope(pulled: Tensor, tangents: Tensor, given: Tensor | None) -> Tensor:
    """Return sum_T v o t, and what the slope was given itself."""
    if pulled.shape[0] != 1:
        total = (pulled * tangents).sum(0)
        return total if given is None else total + given
    if given is None:
        return pulled[0] * tangents[0]
    return torch.addcmul(given, pulled[0], tangents[0])
