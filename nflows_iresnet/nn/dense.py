"""A dense network with fixed weights as a function, and its exact, cheap linearisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.linearization import AutogradLinearization, Linearization, ResidualFunction
from nflows_iresnet.nn.activations import Activation


@dataclass(frozen=True)
class DenseFunction(ResidualFunction):
    """g(x) = W_n a(... a(W_1 x + b_1) ...) + b_n with fixed weights and shifts.

    Attributes:
        weights: W_i, shapes (out, in).
        shifts: b_i, shapes (out,), or (B, out) where they depend on a context.
        activations: one per hidden layer.
        stretches: e_i > 0, shapes (B, hidden), one per hidden layer where the context stretches
            its units, a(z) -> e a(z / e), which changes no slope's bound; none by default.
        lipschitz: a bound of Lip(g) that is guaranteed, or None.
    """

    weights: Sequence[Tensor]
    shifts: Sequence[Tensor]
    activations: Sequence[nn.Module]
    lipschitz: float | None = None
    stretches: Sequence[Tensor] = ()

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return g(inputs), shape (B, features)."""
        if self._is_unit_wise():
            return self._values_and_slopes(inputs)[0]
        hidden = inputs
        for weight, shift, activation in zip(
            self.weights[:-1], self.shifts[:-1], self.activations, strict=True
        ):
            hidden = activation(_affine(hidden, weight, shift))
        return _affine(hidden, self.weights[-1], self.shifts[-1])

    def linearize(self, inputs: Tensor) -> Linearization:
        """Return g at `inputs`: structured if all activations are unit-wise, else by autograd."""
        if not self._is_unit_wise():
            return AutogradLinearization(self, inputs)
        value, slopes = self._values_and_slopes(inputs)
        weights = [
            _widen(weight, slope.shape[-1] // len(weight))
            for weight, slope in zip(self.weights[:-1], slopes, strict=True)
        ]
        return DenseLinearization(value, [*weights, self.weights[-1]], slopes)

    def _is_unit_wise(self) -> bool:
        return all(isinstance(activation, Activation) for activation in self.activations)

    def _values_and_slopes(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden, slopes = inputs, []
        for index, activation in enumerate(self.activations):
            units = _affine(hidden, self.weights[index], self.shifts[index])
            stretch = self.stretches[index] if self.stretches else None
            hidden, slope = _stretched(activation, units, stretch)
            slopes.append(slope)
        return _affine(hidden, self.weights[-1], self.shifts[-1]), slopes

    def select(self, rows: Tensor | slice) -> DenseFunction:
        """Return the same function with the shifts and stretches of `rows` only."""
        shifts = [shift if shift.dim() == 1 else shift[rows] for shift in self.shifts]
        return replace(self, shifts=shifts, stretches=[each[rows] for each in self.stretches])


def _stretched(
    activation: nn.Module, units: Tensor, stretch: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return e a(z / e) and its slope a'(z / e)."""
    value_and_slope: Callable[[Tensor], tuple[Tensor, Tensor]] = activation.value_and_slope  # type: ignore[assignment]
    if stretch is None:
        return value_and_slope(units)
    value, slope = value_and_slope(units / stretch)
    return value * torch.cat([stretch] * (value.shape[-1] // units.shape[-1]), dim=-1), slope


def _affine(inputs: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    if shift.dim() == 1:
        return F.linear(inputs, weight, shift)
    return F.linear(inputs, weight) + shift


def _widen(weight: Tensor, widening: int) -> Tensor:
    """Repeat the rows of a weight for an activation that gives several outputs per unit."""
    return weight if widening == 1 else torch.cat([weight] * widening, dim=0)


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
