"""Activation functions with a known Lipschitz constant.

An activation a is applied unit by unit. Its module states a constant `lipschitz` >= sup |a'| (for
activations that widen or mix units: the Lipschitz constant of the whole map), and returns the
slopes a' beside the values, from which a network assembles its Jacobian.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.nn.activation import Activation, knows_curvature, knows_overwrite


class SmoothAbs(Activation):
    r"""Smooth absolute value, a(x) = sqrt(1 + x^2) - 1.

    The slope x / sqrt(1 + x^2) covers (-1, 1): unlike a monotone activation, it spends the whole
    Lipschitz budget on both sides, and it has no flat tail where the Jacobian would vanish.

    Example:
        >>> SmoothAbs().value_and_slope(torch.tensor([0.0, 1e6]))[1]
        tensor([0., 1.])
    """

    has_curvature = True

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (sqrt(1 + x^2) - 1, x / sqrt(1 + x^2)), without overflow for large |x|."""
        root = self._root(inputs)
        return root - 1, inputs / root

    def forward(self, inputs: Tensor) -> Tensor:
        """Return sqrt(1 + x^2) - 1."""
        return self._root(inputs) - 1

    def overwrite(self, inputs: Tensor) -> Tensor:
        """Return the same in place."""
        return inputs.hypot_(inputs.new_ones(())).sub_(1)

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        """Return (1 + x^2)^{-3/2}."""
        inverse_root = (value + 1).reciprocal()
        return inverse_root * inverse_root * inverse_root

    @staticmethod
    def _root(inputs: Tensor) -> Tensor:
        return torch.hypot(inputs, inputs.new_ones(()))


class Sine(Activation):
    """a(x) = sin(x), slope cos(x) in [-1, 1]."""

    has_curvature = True

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (sin x, cos x)."""
        return inputs.sin(), inputs.cos()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return sin x."""
        return inputs.sin()

    def overwrite(self, inputs: Tensor) -> Tensor:
        """Return the same in place."""
        return inputs.sin_()

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        """Return -sin x."""
        return -value


class Mixed(Activation):
    r"""Half of the units one activation, the other half another.

    `Mixed(Sine(), SmoothAbs())` is the default of the networks here: the periodic half resolves
    detail, the half that grows linearly moves tails. Measured with `ResidualFlow`, lower is better
    (nats, one seed, 200 to 400 steps):

    | | checkerboard | two spirals | 5-D Student t | reverse KL to a banana |
    |---|---|---|---|---|
    | `Sine` | 3.646 | 2.657 | 4.826 | 0.171 |
    | `SmoothAbs` | 3.793 | 2.936 | 4.793 | 0.046 |
    | both | 3.686 | 2.728 | 4.797 | 0.072 |

    Args:
        first: unit-wise activation of the first half of the units (rounded down), not widening.
        second: that of the rest.
    """

    def __init__(self, first: Activation, second: Activation) -> None:
        if first.widening != 1 or second.widening != 1:
            raise ValueError("Mixed takes activations with one output per unit")
        super().__init__()
        self.first, self.second = first, second
        self.lipschitz = max(first.lipschitz, second.lipschitz)
        self.has_curvature = knows_curvature(first) and knows_curvature(second)

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values and slopes of both halves, side by side."""
        first, second = _halves(inputs)
        value, slope = self.first.value_and_slope(first)
        other_value, other_slope = self.second.value_and_slope(second)
        return torch.cat([value, other_value], dim=-1), torch.cat([slope, other_slope], dim=-1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the values of both halves, side by side."""
        first, second = _halves(inputs)
        return torch.cat([self.first(first), self.second(second)], dim=-1)

    def overwrite(self, inputs: Tensor) -> Tensor:
        """Return the same in place."""
        half = inputs.shape[-1] // 2
        for each, part in (self.first, inputs[..., :half]), (self.second, inputs[..., half:]):
            value = each.overwrite(part) if knows_overwrite(each) else each(part.clone())
            if value is not part:
                part.copy_(value)
        return inputs

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        """Return the curvatures of both halves, side by side."""
        half = value.shape[-1] // 2
        first = self.first.curvature(value[..., :half], slope[..., :half])
        second = self.second.curvature(value[..., half:], slope[..., half:])
        return torch.cat([first, second], dim=-1)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split the units in two; copies, because functions of strided memory cost more than that."""
    half = values.shape[-1] // 2
    return values[..., :half].contiguous(), values[..., half:].contiguous()


class Tanh(Activation):
    """a(x) = tanh(x), slope 1 - tanh(x)^2 in (0, 1]."""

    has_curvature = True

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (tanh x, 1 - tanh(x)^2)."""
        value = inputs.tanh()
        return value, 1 - value.square()

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        """Return -2 tanh(x) (1 - tanh(x)^2)."""
        return -2 * value * slope


class ELU(Activation):
    """a(x) = x for x > 0, exp(x) - 1 otherwise; slope in (0, 1].

    References:
        Clevert, Unterthiner, Hochreiter. Fast and accurate deep network learning by exponential
        linear units, 2016. Used by Behrmann et al., Invertible residual networks, 2019.
    """

    has_curvature = True

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (elu x, min(1, exp x))."""
        return F.elu(inputs), inputs.clamp(max=0).exp()

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        """Return exp x for x < 0, and 0 beyond."""
        return torch.where(value < 0, slope, 0.0)


class Softplus(Activation):
    """a(x) = log(1 + exp(x)), slope sigmoid(x) in (0, 1)."""

    has_curvature = True

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (softplus x, sigmoid x)."""
        return F.softplus(inputs), inputs.sigmoid()

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        """Return sigmoid(x) (1 - sigmoid(x))."""
        return slope * (1 - slope)


LIPSWISH_DIVISOR = 1.1
"""sup of d/dx [x sigmoid(b x)] is 1.09984 for every b > 0; Chen et al. divide by 1.1."""


def _lipswish(inputs: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(beta * inputs)
    value = inputs * gate
    slope = gate + beta * value * (1 - gate)
    return value / LIPSWISH_DIVISOR, slope / LIPSWISH_DIVISOR


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))


class LipSwish(Activation):
    """a(x) = x sigmoid(b x) / 1.1 with a learnable b > 0; slope in (-0.091, 0.99986).

    References:
        Chen, Behrmann, Duvenaud, Jacobsen. Residual flows for invertible generative modeling, 2019.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unconstrained_beta = nn.Parameter(torch.tensor(_inverse_softplus(1.0)))

    @property
    def beta(self) -> Tensor:
        """The steepness b > 0."""
        return F.softplus(self.unconstrained_beta)

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a(x), a'(x))."""
        return _lipswish(inputs, self.beta)


class CLipSwish(LipSwish):
    """Concatenated LipSwish, a(x) = [l(x), l(-x)] / c: twice as many outputs as inputs.

    With l = LipSwish the map x -> [l(x), l(-x)] has slope vector [l'(x), -l'(-x)] and, since
    l'(x) + l'(-x) = 1 / 1.1 for every x and b, its norm sqrt(l'(x)^2 + l'(-x)^2) is largest where
    l' is: sqrt(0.99986^2 + 0.09076^2) = 1.00397. Dividing by c = 1.004 makes it 1-Lipschitz.

    References:
        Perugachi-Diaz, Tomczak, Bhulai. Invertible DenseNets with concatenated LipSwish, 2021.
    """

    widening = 2
    _divisor = 1.004

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a(x), a'(x)), each of shape (*, 2 * units)."""
        value, slope = _lipswish(torch.cat([inputs, -inputs], dim=-1), self.beta)
        sign = torch.ones_like(slope)
        sign[..., inputs.shape[-1] :] = -1
        return value / self._divisor, slope * sign / self._divisor


class MaxMin(nn.Module):
    """Sorts units in pairs: (x1, x2) -> (max, min). Gradient-norm preserving, 1-Lipschitz.

    Piecewise linear: the log-determinant of a residual block with it is piecewise constant in x.

    References:
        Anil, Lucas, Grosse. Sorting out Lipschitz function approximation, 2019.
    """

    lipschitz = 1.0
    widening = 1

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sorted pairs, shape (*, units); the number of units must be even."""
        if inputs.shape[-1] % 2:
            raise ValueError(
                f"MaxMin sorts pairs, so it needs an even number of units, got {inputs.shape[-1]}; "
                "use an even hidden width"
            )
        first, second = inputs.chunk(2, dim=-1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=-1)
