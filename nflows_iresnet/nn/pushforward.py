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

from nflows_iresnet.nn.activations import Activation
from nflows_iresnet.nn.layered import DenseNet, Evaluation

Gradients = list[Tensor | None]


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
        and not torch.compiler.is_compiling()
        and torch._C._functorch.maybe_current_level() is None
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
        pushed = net.push(tangents, evaluation.slopes)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs, tangents, *tensors)
        ctx.activations, ctx.evaluation, ctx.pushed = net.activations, evaluation, pushed[:-1]
        return evaluation.value.detach(), pushed[-1], *[s.detach() for s in evaluation.slopes]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, tangents, *tensors = ctx.saved_tensors
        net = _rebuilt(ctx.activations, tensors)
        evaluation, pushed = ctx.evaluation, ctx.pushed
        if torch.is_grad_enabled():
            evaluation = net.evaluate(inputs)
            pushed = net.push(tangents, evaluation.slopes)[:-1]
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
    net: DenseNet
    evaluation: Evaluation
    pushed: Sequence[Tensor]
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
        of_value, of_tangent, *of_slopes = cotangents
        of_unit = torch.zeros_like(self.evaluation.value) if of_value is None else of_value
        weights: list[Tensor | None] = []
        shifts: list[Tensor | None] = []
        stretches: list[Tensor | None] = []
        for index in reversed(range(len(self.net.weights))):
            is_wanted = is_needed[2 + index]
            weights.insert(0, self._of_weight(index, of_unit, of_tangent) if is_wanted else None)
            is_shared = self.net.shifts[index].dim() == 1
            shifts.insert(0, of_unit.sum(0) if is_shared else of_unit)
            of_unit = of_unit @ self.net.weights[index]
            of_tangent = None if of_tangent is None else of_tangent @ self.net.weights[index]
            if index > 0:
                of_slope = _sum(of_slopes[index - 1], self._paired(index - 1, of_tangent))
                if self.net.stretches:
                    stretches.insert(0, self._of_stretch(index - 1, of_unit, of_slope))
                of_unit = self._through_activation(index - 1, of_unit, of_slope)
                slope = self.evaluation.slopes[index - 1]
                of_tangent = None if of_tangent is None else of_tangent * slope
        of_given = None if self.tangents is None else of_tangent
        return [of_unit, of_given, *weights, *shifts, *stretches]

    def _of_weight(self, index: int, of_unit: Tensor, of_tangent: Tensor | None) -> Tensor:
        """Return p^T h_{i-1} + sum over T of q^T (s_{i-1} o t_{i-1})."""
        if index == 0:
            gradient = of_unit.mT @ self.inputs
            if of_tangent is None:
                return gradient
            if self.tangents is None:
                return gradient + of_tangent.sum(1).mT
            return gradient + _outer(of_tangent, self.tangents)
        hidden = self.evaluation.activated[index - 1]
        hidden = hidden * self.net.stretches[index - 1] if self.net.stretches else hidden
        gradient = of_unit.mT @ hidden
        if of_tangent is None:
            return gradient
        tangent = self.pushed[index - 1] * self.evaluation.slopes[index - 1]
        return gradient + _outer(of_tangent, tangent)

    def _paired(self, hidden: int, of_tangent: Tensor | None) -> Tensor | None:
        return None if of_tangent is None else (of_tangent * self.pushed[hidden]).sum(0)

    def _through_activation(
        self, hidden: int, of_activated: Tensor, of_slope: Tensor | None
    ) -> Tensor:
        gradient = of_activated * self.evaluation.slopes[hidden]
        if of_slope is None:
            return gradient
        bend = of_slope * self._curvature(hidden)
        return gradient + (bend / self.net.stretches[hidden] if self.net.stretches else bend)

    def _of_stretch(self, hidden: int, of_activated: Tensor, of_slope: Tensor | None) -> Tensor:
        """Return the gradient of e in e a(z / e) and in its slope a'(z / e)."""
        units, slopes = self.evaluation.units[hidden], self.evaluation.slopes[hidden]
        gradient = of_activated * (self.evaluation.activated[hidden] - units * slopes)
        if of_slope is None:
            return gradient
        bend = of_slope * self._curvature(hidden)
        return gradient - bend * units / self.net.stretches[hidden]

    def _curvature(self, hidden: int) -> Tensor:
        activation = cast(Activation, self.net.activations[hidden])
        return activation.curvature(
            self.evaluation.activated[hidden], self.evaluation.slopes[hidden]
        )


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum over tangents and rows of the outer products."""
    return left.flatten(0, 1).mT @ right.flatten(0, 1)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
