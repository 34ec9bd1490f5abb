r"""Value, products J T and slopes of a dense network as ONE node of the graph, derived by hand.

With the tangents t_i = W_i (s_{i-1} o t_{i-1}), s_i = a'(u_i), t_0 = T, the node returns g(x),
t_n = J T and s_1, ..., s_{n-1}. Going back, with cotangents p of z_i and q of t_i,

    v = W_i^T q,
    p <- s_{i-1} o W_i^T p + a''(u_{i-1}) / e_{i-1} o (sum_T v o t_{i-1} + cotangent of s_{i-1}),
    q <- s_{i-1} o v.

Automatic differentiation of the same operations records several times as many of them, which is
most of the time of a small network. Second derivatives are those of the formulas above, evaluated
anew from x and the weights and differentiated automatically.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nflows_iresnet.linearization import is_traced
from nflows_iresnet.nn.activations import Activation
from nflows_iresnet.nn.dense_net import DenseNet, Evaluation, Pushed


@dataclass(frozen=True)
class Recorded:
    """The outputs of the node: g(x), J T of shape (k, B, features), and the slopes."""

    value: Tensor
    pushed: Tensor
    slopes: Sequence[Tensor]


def can_record(net: DenseNet) -> bool:
    """Whether the node can stand for the network here.

    It needs hidden layers and activations that know their curvature. Compilers, `torch.func` and
    forward-mode differentiation look into the operations and get those.
    """
    return (
        len(net.activations) > 0
        and all(isinstance(each, Activation) and each.has_curvature for each in net.activations)
        and not is_traced()
        and torch.autograd.forward_ad._current_level < 0
    )


def record(
    net: DenseNet, evaluation: Evaluation, inputs: Tensor, tangents: Tensor | None
) -> Recorded:
    """Return g(x), J T and the slopes as outputs of one node.

    Args:
        net: a network for which `can_record` holds.
        evaluation: what `net.evaluate(inputs)` returned.
        inputs: x, shape (B, features).
        tangents: T, shape (k, B, features), or None for all coordinates.
    """
    tensors = [*net.weights, *net.shifts, *net.stretches]
    value, pushed, *slopes = _Pushforward.apply(net, evaluation, inputs, tangents, *tensors)
    return Recorded(value, pushed, slopes)


class _Pushforward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        net: DenseNet,
        evaluation: Evaluation,
        inputs: Tensor,
        tangents: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        pushed = net.push(tangents, evaluation)
        ctx.save_for_backward(inputs, tangents, *tensors)
        ctx.activations, ctx.evaluation, ctx.pushed = net.activations, evaluation, pushed
        ctx.set_materialize_grads(False)
        slopes = [slope.detach() for slope in evaluation.slopes]
        return evaluation.value.detach(), pushed.outputs.detach(), *slopes

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, tangents, *tensors = ctx.saved_tensors
        net = _rebuilt(ctx.activations, tensors)
        evaluation, pushed = ctx.evaluation, ctx.pushed
        if torch.is_grad_enabled():
            evaluation = net.evaluate(inputs)
            pushed = net.push(tangents, evaluation)
        pull_back = _Pullback(net, evaluation, pushed, inputs, tangents)
        return None, None, *pull_back(cotangents, ctx.needs_input_grad[2:])


def _rebuilt(activations: Sequence[Activation], tensors: Sequence[Tensor]) -> DenseNet:
    count = len(activations) + 1
    return DenseNet(
        activations=activations,
        weights=tensors[:count],
        shifts=tensors[count : 2 * count],
        stretches=tensors[2 * count :],
    )


@dataclass(frozen=True)
class _Pullback:
    """The formulas of this module's docstring; p and q are stacked, as (1 + k, B, out)."""

    net: DenseNet
    evaluation: Evaluation
    pushed: Pushed
    inputs: Tensor
    tangents: Tensor | None

    def __call__(
        self, cotangents: Sequence[Tensor | None], is_needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradients of x, T, the weights, the shifts and the stretches, in this order.

        Args:
            cotangents: of the value, of J T and of each slope; None for zero.
            is_needed: which gradients are wanted, in the order of the result.
        """
        weights: list[Tensor | None] = []
        shifts: list[Tensor | None] = []
        stretches: list[Tensor | None] = []
        stacked = self._stacked(cotangents[0], cotangents[1])
        for index in reversed(range(1, len(self.net.weights))):
            is_frozen = not is_needed[2 + index]
            weights.append(None if is_frozen else _outer(stacked, self.pushed.hidden[index - 1]))
            shifts.append(self._of_shift(index, stacked[0]))
            stacked = stacked @ self.net.weights[index]
            of_slope = self._of_slope(index - 1, stacked[1:], cotangents[1 + index])
            bend = of_slope * self._curvature(index - 1)
            if self.net.stretches:
                stretches.append(self._of_stretch(index - 1, stacked[0], bend))
                bend = bend / self.net.stretches[index - 1]
            stacked = stacked * self.evaluation.slopes[index - 1]
            stacked[0] += bend
        of_units, of_tangents = stacked[0], stacked[1:]
        weights.append(self._of_first_weight(of_units, of_tangents) if is_needed[2] else None)
        shifts.append(self._of_shift(0, of_units))
        first = self.net.weights[0]
        of_inputs = of_units @ first if is_needed[0] else None
        of_given = of_tangents @ first if is_needed[1] else None
        return [of_inputs, of_given, *weights[::-1], *shifts[::-1], *stretches[::-1]]

    def _stacked(self, of_value: Tensor | None, of_outputs: Tensor | None) -> Tensor:
        value, outputs = self.evaluation.value, self.pushed.outputs
        return torch.cat(
            [
                torch.zeros_like(value)[None] if of_value is None else of_value[None],
                torch.zeros_like(outputs) if of_outputs is None else of_outputs,
            ]
        )

    def _of_shift(self, index: int, of_units: Tensor) -> Tensor:
        return of_units.sum(0) if self.net.shifts[index].dim() == 1 else of_units

    def _of_slope(self, hidden: int, of_tangents: Tensor, given: Tensor | None) -> Tensor:
        """Return the cotangent of s_i: from the tangents s_i o t_i, and what was given."""
        paired = (of_tangents * self.pushed.units[hidden]).sum(0)
        return paired if given is None else paired + given

    def _of_stretch(self, hidden: int, of_hidden: Tensor, bend: Tensor) -> Tensor:
        """Return the gradient of e in e a(z / e) and in its slope a'(z / e)."""
        units, slopes = self.evaluation.units[hidden], self.evaluation.slopes[hidden]
        from_value = of_hidden * (self.evaluation.activated[hidden] - units * slopes)
        return from_value - bend * units / self.net.stretches[hidden]

    def _of_first_weight(self, of_units: Tensor, of_tangents: Tensor) -> Tensor:
        gradient = of_units.mT @ self.inputs
        if self.tangents is None:
            return gradient + of_tangents.sum(1).mT
        return gradient + _outer(of_tangents, self.tangents)

    def _curvature(self, hidden: int) -> Tensor:
        activation = cast(Activation, self.net.activations[hidden])
        return activation.curvature(
            self.evaluation.activated[hidden], self.evaluation.slopes[hidden]
        )


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of the outer products over tangents and rows."""
    return left.flatten(0, 1).mT @ right.flatten(0, 1)
