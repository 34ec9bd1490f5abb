"""A dense network with fixed weights: its values, its slopes, and the images of tangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation of the network leaves behind, per hidden layer and row.

    Attributes:
        value: g(x), shape (B, features).
        units: u_i = z_i / e_i, shapes (B, hidden).
        activated: a(u_i).
        hidden: h_i = e_i a(u_i).
        slopes: s_i = a'(u_i), the derivative of h_i in z_i.
    """

    value: Tensor
    units: Sequence[Tensor]
    activated: Sequence[Tensor]
    hidden: Sequence[Tensor]
    slopes: Sequence[Tensor]


@dataclass(frozen=True)
class DenseNet:
    """h_i = e_i a(z_i / e_i), z_i = W_i h_{i-1} + b_i, h_0 = x, and the value z_n.

    Attributes:
        weights: W_i, shapes (out, in).
        shifts: b_i, shapes (out,), or (B, out) where they depend on a context.
        activations: one per hidden layer.
        stretches: e_i > 0, shapes (B, hidden), one per hidden layer where the context stretches
            its units, which changes no slope's bound; none by default.
    """

    weights: Sequence[Tensor]
    shifts: Sequence[Tensor]
    activations: Sequence[nn.Module]
    stretches: Sequence[Tensor] = ()

    def evaluate(self, inputs: Tensor) -> Evaluation:
        """Evaluate a network whose activations are unit-wise and do not widen.

        Args:
            inputs: x, shape (B, features).
        """
        fed, units, activated, hidden, slopes = inputs, [], [], [], []
        for activation, weight, shift, stretch in zip_longest(
            self.activations, self.weights[:-1], self.shifts[:-1], self.stretches
        ):
            unit = affine(fed, weight, shift)
            units.append(unit if stretch is None else unit / stretch)
            fed, slope = _value_and_slope(activation)(units[-1])
            activated.append(fed)
            slopes.append(slope)
            fed = fed if stretch is None else fed * stretch
            hidden.append(fed)
        value = affine(fed, self.weights[-1], self.shifts[-1])
        return Evaluation(value, units, activated, hidden, slopes)

    def push(self, tangents: Tensor | None, slopes: Sequence[Tensor]) -> list[Tensor]:
        """Return the tangents t_1, ..., t_n of all z_i: t_1 = W_1 T, t_i = W_i (s_{i-1} o t_{i-1}).

        Args:
            tangents: T, shape (k, B, features); None for all k = features coordinates, whose t_1
                is the same for all rows and has shape (k, 1, hidden).
            slopes: s_i, shapes (B, hidden).
        """
        pushed = [self._first_tangents(tangents)]
        for weight, slope in zip(self.weights[1:], slopes, strict=True):
            pushed.append(F.linear(pushed[-1] * slope, weight))
        return pushed

    def _first_tangents(self, tangents: Tensor | None) -> Tensor:
        if tangents is None:
            # Contiguous, because products with the slopes would otherwise take eight times as long.
            return self.weights[0].mT.contiguous()[:, None, :]
        return F.linear(tangents, self.weights[0])


def _value_and_slope(activation: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return activation.value_and_slope  # type: ignore[return-value]


def affine(inputs: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    """Return W x + b for a shift (out,), or (B, out)."""
    if shift.dim() == 1:
        return F.linear(inputs, weight, shift)
    return F.linear(inputs, weight) + shift
