"""A dense network with fixed weights as a function, and its exact, cheap linearisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from nflows_iresnet.linearization import Linearization
from nflows_iresnet.nn.layered import LayeredFunction


@dataclass(frozen=True)
class DenseFunction(LayeredFunction):
    """g(x) = W_n a(... a(W_1 x + b_1) ...) + b_n with matrices W_i; see `LayeredFunction`."""

    def _affine(self, inputs: Tensor, index: int) -> Tensor:
        weight, shift = self.weights[index], self.shifts[index]
        if shift.dim() == 1:
            return F.linear(inputs, weight, shift)
        return F.linear(inputs, weight) + shift

    def _linearization(self, value: Tensor, slopes: list[Tensor]) -> Linearization:
        return DenseLinearization(value, self._widened_weights(), slopes)


class DenseLinearization(Linearization):
    r"""J = W_n D_{n-1} W_{n-1} ... D_1 W_1 with the diagonal slopes D_i = diag(a'(z_i)) saved.

    Cost: `vjp` and `jvp` are one pass through the weights, a third to a half of what automatic
    differentiation needs. `jacobian` is one matrix product per layer with D columns per row.
    `trace` is, for one hidden layer,

        tr J = sum_k D_1[k] (W_1 W_2)[k, k],

    and for two, tr J = D_2^T (W_2 o (W_1 W_3)^T) D_1: independent of the number of dimensions per
    row, after one product of weights per batch.

    Args:
        value: g(x), shape (B, features).
        weights: W_i, shapes (out, in).
        slopes: a'(z_i), shapes (B, hidden).
    """

    def __init__(self, value: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        self.value = value
        self._weights = weights
        self._slopes = slopes
        self.has_cheap_trace = len(slopes) <= 2

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

    def jacobian(self) -> Tensor:
        """Return J, shape (B, features, features), from the tangents of all coordinates at once."""
        columns = self._weights[0].mT.expand(len(self.value), -1, -1)
        for weight, slope in zip(self._weights[1:], self._slopes, strict=True):
            columns = F.linear(columns * slope[:, None, :], weight)
        return columns.mT

    def trace(self) -> Tensor:
        """Return tr J, shape (B,)."""
        if len(self._slopes) == 0:
            return self._weights[0].trace().expand(len(self.value))
        if len(self._slopes) == 1:
            return self._slopes[0] @ (self._weights[0] * self._weights[1].mT).sum(1)
        if len(self._slopes) == 2:
            first, second, third = self._weights
            coupling = second * (first @ third).mT
            return ((self._slopes[1] @ coupling) * self._slopes[0]).sum(1)
        return super().trace()
