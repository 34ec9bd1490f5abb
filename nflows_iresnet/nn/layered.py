"""Networks of alternating affine maps and activations, as functions with fixed weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nflows_iresnet.linearization import (
    AutogradLinearization,
    Linearization,
    ResidualFunction,
    select_rows,
)
from nflows_iresnet.nn.activation import Activation


@dataclass(frozen=True)
class LayeredFunction(ResidualFunction):
    """g(x) = W_n a(... a(W_1 x + b_1) ...) + b_n with fixed weights and shifts.

    Attributes:
        weights: W_i, shapes (out, in, *).
        shifts: b_i, shapes (out,), or (B, out, *) where they depend on a context.
        activations: one per hidden layer.
        stretches: e_i > 0, shapes (B, *, hidden), one per hidden layer where the context stretches
            its units, a(z) -> e a(z / e), which changes no slope's bound; none by default.
        lipschitz: a bound of Lip(g) that is guaranteed, or None.
    """

    weights: Sequence[Tensor]
    shifts: Sequence[Tensor]
    activations: Sequence[nn.Module]
    lipschitz: float | None = None
    stretches: Sequence[Tensor] = ()

    @abstractmethod
    def _affine(self, inputs: Tensor, index: int) -> Tensor:
        """Return W_index inputs + b_index."""

    @abstractmethod
    def _linearization(self, value: Tensor, slopes: list[Tensor]) -> Linearization:
        """Return the structured linearisation."""

    def _units_last(self, values: Tensor) -> Tensor:
        """Move the dimension of the units to the end, where activations expect it."""
        return values

    def _units_back(self, values: Tensor) -> Tensor:
        """Undo `_units_last`."""
        return values

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return g(inputs), of the shape of the inputs."""
        if self.stretches:
            return self._values_and_slopes(inputs)[0]
        hidden = inputs
        for index, activation in enumerate(self.activations):
            units = self._units_last(self._affine(hidden, index))
            hidden = self._units_back(activation(units))
        return self._affine(hidden, len(self.activations))

    def linearize(self, inputs: Tensor) -> Linearization:
        """Return g at `inputs`: structured if all activations are unit-wise, else by autograd."""
        if not self._is_unit_wise():
            return AutogradLinearization(self, inputs)
        return self._linearization(*self._values_and_slopes(inputs))

    def _is_unit_wise(self) -> bool:
        return all(isinstance(activation, Activation) for activation in self.activations)

    def _values_and_slopes(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden, slopes = inputs, []
        for index, activation in enumerate(self.activations):
            units = self._units_last(self._affine(hidden, index))
            stretch = self.stretches[index] if self.stretches else None
            value, slope = _stretched(activation, units, stretch)
            hidden = self._units_back(value)
            slopes.append(self._units_back(slope))
        return self._affine(hidden, len(self.activations)), slopes

    def _widened_weights(self) -> list[Tensor]:
        """Return the weights, rows repeated for activations that give several outputs per unit."""
        widenings = [int(getattr(activation, "widening", 1)) for activation in self.activations]
        return [
            weight if widening == 1 else torch.cat([weight] * widening, dim=0)
            for weight, widening in zip(self.weights, [*widenings, 1], strict=True)
        ]

    def select(self, rows: Tensor | slice) -> LayeredFunction:
        """Return the same function with the shifts and stretches of `rows` only."""
        shifts = [shift if shift.dim() == 1 else select_rows(shift, rows) for shift in self.shifts]
        stretches = [select_rows(stretch, rows) for stretch in self.stretches]
        return replace(self, shifts=shifts, stretches=stretches)


def _stretched(
    activation: nn.Module, units: Tensor, stretch: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return e a(z / e) and its slope a'(z / e)."""
    if not isinstance(activation, Activation):
        raise TypeError(f"{type(activation).__name__} is not unit-wise: it has no slopes")
    if stretch is None:
        return activation.value_and_slope(units)
    value, slope = activation.value_and_slope(units / stretch)
    return value * torch.cat([stretch] * (value.shape[-1] // units.shape[-1]), dim=-1), slope
