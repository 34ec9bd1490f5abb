"""A dense network with fixed weights as a function, and its exact, cheap linearisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_iresnet.linearization import Linearization, is_traced, row_products
from nflows_iresnet.nn.activation import overwrite
from nflows_iresnet.nn.dense_net import DenseNet, affine
from nflows_iresnet.nn.layered import LayeredFunction
from nflows_iresnet.nn.pushforward import Recorded, can_record, record

_CHUNK = 2**16
"""Values of a hidden layer that are computed together, where no graph keeps them.

They stay in the cache, and their memory is used again at once; more costs two to three times as
much per row on a CPU.
"""


@dataclass(frozen=True)
class DenseFunction(LayeredFunction):
    """g(x) = W_n a(... a(W_1 x + b_1) ...) + b_n with matrices W_i; see `LayeredFunction`."""

    def _affine(self, inputs: Tensor, index: int) -> Tensor:
        return affine(inputs, self.weights[index], self.shifts[index])

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return g(inputs), shape (B, features)."""
        if torch.is_grad_enabled() or self.stretches or is_traced():
            return super().__call__(inputs)
        count, rows = inputs.shape[0], self._chunk_rows
        is_large = inputs.dim() == 2 and count > rows and inputs.device.type == "cpu"
        if not is_large or any(len(s) not in (1, count) for s in self.shifts if s.dim() == 2):
            return self._without_graph(inputs)
        parts = [slice(start, start + rows) for start in range(0, count, rows)]
        return torch.cat([self.select(part)(inputs[part]) for part in parts])

    @cached_property
    def _chunk_rows(self) -> int:
        return max(1, _CHUNK // max(weight.shape[0] for weight in self.weights))

    def _without_graph(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for index, activation in enumerate(self.activations):
            hidden = overwrite(activation, self._affine(hidden, index))
        return self._affine(hidden, len(self.activations))

    def linearize(self, inputs: Tensor) -> Linearization:
        """Return g at `inputs`: structured if all activations are unit-wise, else by autograd."""
        net = DenseNet(self.weights, self.shifts, self.activations, self.stretches)
        if inputs.dim() == 2 and can_record(net):
            return RecordedLinearization(net, inputs)
        return super().linearize(inputs)

    def _linearization(self, value: Tensor, slopes: list[Tensor]) -> Linearization:
        return DenseLinearization(value, self._widened_weights(), slopes)


class DenseLinearization(Linearization):
    r"""J = W_n D_{n-1} W_{n-1} ... D_1 W_1 with the diagonal slopes D_i = diag(a'(z_i)) saved.

    Cost: `vjp` and `jvp` are one pass through the weights, a third to a half of what automatic
    differentiation needs. `jacobian` is one matrix product per layer with D columns per row.
    `trace` is, for one hidden layer,

        tr J = sum_k D_1[k] (W_1 W_2)[k, k],

    and for two, tr J = D_2^T (W_2 o (W_1 W_3)^T) D_1: independent of the number of dimensions per
    row, after one product of weights per batch. It counts as cheap where that product costs at most
    half of what a product with J costs for the whole batch.

    Args:
        value: g(x), shape (B, features).
        weights: W_i, shapes (out, in).
        slopes: a'(z_i), shapes (B, hidden).
    """

    def __init__(self, value: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        self.value = value
        self._weights = weights
        self._slopes = slopes
        self.has_cheap_trace = _has_cheap_trace(weights, len(value))

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Return J^T v = W_1^T D_1 ... W_n^T v."""
        product = cotangent @ self._weights[-1]
        for weight, slope in zip(self._weights[-2::-1], self._slopes[::-1], strict=True):
            product = (product * slope) @ weight
        return product

    def jvp(self, tangent: Tensor) -> Tensor:
        """Return J v = W_n ... D_1 W_1 v."""
        product = F.linear(tangent, self._weights[0])
        for weight, slope in zip(self._weights[1:], self._slopes, strict=True):
            product = F.linear(product * slope, weight)
        return product

    def pairings(self, cotangents: Sequence[Tensor], tangent: Tensor) -> list[Tensor]:
        """Return w^T J v for each w, shape (B,), from one J v."""
        pushed = self.jvp(tangent)
        return [row_products(cotangent, pushed) for cotangent in cotangents]

    def jacobian(self) -> Tensor:
        """Return J, shape (B, features, features), from the tangents of all coordinates at once."""
        columns = self._weights[0].mT.expand(len(self.value), -1, -1)
        for weight, slope in zip(self._weights[1:], self._slopes, strict=True):
            columns = F.linear(columns * slope[:, None, :], weight)
        return columns.mT

    def trace(self) -> Tensor:
        """Return tr J, shape (B,)."""
        if len(self._weights) == 1:
            return self._weights[0].trace().expand(len(self.value))
        slopes = self._slopes
        if len(slopes) == 1:
            return slopes[0] @ (self._weights[0] * self._weights[1].mT).sum(1)
        if len(slopes) == 2:
            first, second, third = self._weights
            coupling = second * (first @ third).mT
            return ((slopes[1] @ coupling) * slopes[0]).sum(1)
        return super().trace()


def _has_cheap_trace(weights: Sequence[Tensor], rows: int) -> bool:
    if len(weights) <= 2:
        return True
    product = weights[0].numel() * weights[2].shape[1]
    return len(weights) == 3 and 2 * product <= rows * sum(weight.numel() for weight in weights)


class RecordedLinearization(DenseLinearization):
    """The same linearisation, with all that is differentiated in one node of the graph.

    The network is evaluated once, without a graph. Where gradients are recorded, the first of
    `jvp`, `jacobian`, `trace` and `value` to be asked for makes the node of `nn.pushforward`, and
    the others take their part of it; so ask for products before the value.

    Args:
        net: a network for which `can_record` holds.
        inputs: x, shape (B, features).
    """

    def __init__(self, net: DenseNet, inputs: Tensor) -> None:
        self._net, self._inputs = net, inputs
        with torch.no_grad():
            self._evaluation = net.evaluate(inputs)
        self._recorded: Recorded | None = None
        self._weights = list(net.weights)
        self.has_cheap_trace = _has_cheap_trace(self._weights, len(inputs))

    @property
    def shape(self) -> torch.Size:
        """The shape of the value."""
        return self._evaluation.value.shape

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        """g(x), shape (B, features)."""
        return self._node().value if torch.is_grad_enabled() else self._evaluation.value

    @property
    def _slopes(self) -> Sequence[Tensor]:  # type: ignore[override]
        return self._node().slopes if torch.is_grad_enabled() else self._evaluation.slopes

    def _node(self) -> Recorded:
        if self._recorded is None:
            self._recorded = self._record(self._inputs.new_zeros(0, *self._inputs.shape))
        return self._recorded

    def _record(self, tangents: Tensor | None) -> Recorded:
        recorded = record(self._net, self._evaluation, self._inputs, tangents)
        if torch.is_grad_enabled() and self._recorded is None:
            self._recorded = recorded
        return recorded

    def jvp(self, tangent: Tensor) -> Tensor:
        """Return J v."""
        return self._record(tangent[None]).pushed[0]

    def jacobian(self) -> Tensor:
        """Return J, shape (B, features, features)."""
        return self._record(None).pushed.permute(1, 2, 0)
