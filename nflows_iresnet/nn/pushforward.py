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
from nflows_iresnet.nn.activation import Activation, knows_curvature
from nflows_iresnet.nn.dense_net import DenseNet, Evaluation


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
        and all(knows_curvature(each) for each in net.activations)
        and not is_traced()
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
        *below, pushed = net.push(tangents, evaluation.slopes)
        ctx.activations, ctx.num_tensors = net.activations, len(tensors)
        ctx.save_for_backward(inputs, tangents, *tensors, *_Kept.of(net, evaluation, below).flat)
        ctx.set_materialize_grads(False)
        slopes = [slope.detach() for slope in evaluation.slopes]
        return evaluation.value.detach(), pushed.detach(), *slopes

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, tangents, *saved = ctx.saved_tensors
        net = _rebuilt(ctx.activations, saved[: ctx.num_tensors])
        if torch.is_grad_enabled():
            evaluation = net.evaluate(inputs)
            kept = _Kept.of(net, evaluation, net.push(tangents, evaluation.slopes)[:-1])
        else:
            kept = _Kept.unflatten(saved[ctx.num_tensors :], len(ctx.activations))
        pull_back = _Pullback(net, kept, inputs, tangents)
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
class _Kept:
    """What the way back needs, per hidden layer.

    Attributes:
        slopes: s_i, shapes (B, hidden).
        tangents: t_i, shapes (k, B, hidden) or (k, 1, hidden).
        hidden: h_i, shapes (B, hidden).
        units: u_i, where there are stretches.
        activated: a(u_i), where there are stretches; h_i otherwise.
    """

    slopes: Sequence[Tensor]
    tangents: Sequence[Tensor]
    hidden: Sequence[Tensor]
    units: Sequence[Tensor]
    activated: Sequence[Tensor]

    @classmethod
    def of(cls, net: DenseNet, evaluation: Evaluation, tangents: Sequence[Tensor]) -> _Kept:
        is_stretched = len(net.stretches) > 0
        units = evaluation.units if is_stretched else []
        activated = evaluation.activated if is_stretched else []
        return cls(evaluation.slopes, tangents, evaluation.hidden, units, activated)

    @property
    def flat(self) -> list[Tensor]:
        return [*self.slopes, *self.tangents, *self.hidden, *self.units, *self.activated]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor], count: int) -> _Kept:
        groups = [tensors[start : start + count] for start in range(0, 5 * count, count)]
        return cls(*groups)

    def activated_at(self, hidden: int) -> Tensor:
        return self.activated[hidden] if self.activated else self.hidden[hidden]


@dataclass(frozen=True)
class _Pullback:
    """The formulas of this module's docstring; p and q are stacked, as (1 + k, B, out)."""

    net: DenseNet
    kept: _Kept
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
        is_fed = cotangents[0] is not None or cotangents[1] is not None
        for index in reversed(range(1, len(self.net.weights))):
            is_frozen = not is_needed[2 + index]
            weights.append(None if is_frozen else self._of_weight(index, stacked))
            shifts.append(self._of_shift(index, stacked[0]))
            stacked = stacked @ self.net.weights[index]
            of_slope = self._of_slope(index - 1, stacked[1:], cotangents[1 + index])
            bend = of_slope * self._curvature(index - 1)
            if self.net.stretches:
                stretches.append(self._of_stretch(index - 1, stacked[0], bend))
                bend = bend / self.net.stretches[index - 1]
            stacked = stacked * self.kept.slopes[index - 1]
            if is_fed:
                stacked[0] += bend
            else:  # the zeros have no room for a batch of cotangents
                stacked = torch.cat([stacked[:1] + bend, stacked[1:]])
        of_units, of_tangents = stacked[0], stacked[1:]
        weights.append(self._of_first_weight(of_units, of_tangents) if is_needed[2] else None)
        shifts.append(self._of_shift(0, of_units))
        first = self.net.weights[0]
        of_inputs = of_units @ first if is_needed[0] else None
        of_given = of_tangents @ first if is_needed[1] else None
        return [of_inputs, of_given, *weights[::-1], *shifts[::-1], *stretches[::-1]]

    def _stacked(self, of_value: Tensor | None, of_outputs: Tensor | None) -> Tensor:
        count = self.inputs.shape[1] if self.tangents is None else len(self.tangents)
        rows, outputs = len(self.inputs), len(self.net.weights[-1])
        if of_value is None:
            of_value = self.inputs.new_zeros(rows, outputs)
        if of_outputs is None:
            of_outputs = self.inputs.new_zeros(count, rows, outputs)
        return torch.cat([of_value[None], of_outputs])

    def _of_shift(self, index: int, of_units: Tensor) -> Tensor:
        return of_units.sum(0) if self.net.shifts[index].dim() == 1 else of_units

    def _of_slope(self, hidden: int, of_tangents: Tensor, given: Tensor | None) -> Tensor:
        """Return the cotangent of s_i: from the tangents s_i o t_i, and what was given."""
        paired = (of_tangents * self.kept.tangents[hidden]).sum(0)
        return paired if given is None else paired + given

    def _of_stretch(self, hidden: int, of_hidden: Tensor, bend: Tensor) -> Tensor:
        """Return the gradient of e in e a(z / e) and in its slope a'(z / e)."""
        units, slopes = self.kept.units[hidden], self.kept.slopes[hidden]
        from_value = of_hidden * (self.kept.activated_at(hidden) - units * slopes)
        return from_value - bend * units / self.net.stretches[hidden]

    def _of_weight(self, index: int, stacked: Tensor) -> Tensor:
        """Return the sum of p h^T and q (s o t)^T over rows and tangents."""
        tangents = self.kept.tangents[index - 1] * self.kept.slopes[index - 1]
        return stacked[0].mT @ self.kept.hidden[index - 1] + _outer(stacked[1:], tangents)

    def _of_first_weight(self, of_units: Tensor, of_tangents: Tensor) -> Tensor:
        gradient = of_units.mT @ self.inputs
        if self.tangents is None:
            return gradient + of_tangents.sum(1).mT
        return gradient + _outer(of_tangents, self.tangents)

    def _curvature(self, hidden: int) -> Tensor:
        activation = cast(Activation, self.net.activations[hidden])
        return activation.curvature(self.kept.activated_at(hidden), self.kept.slopes[hidden])


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of the outer products over tangents and rows."""
    return left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])
