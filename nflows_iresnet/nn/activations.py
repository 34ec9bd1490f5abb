"""Activation functions with a known Lipschitz constant.

An activation a is applied unit by unit. Its module states a constant `lipschitz` >= sup |a'| (for
activations that widen or mix units: the Lipschitz constant of the whole map), and returns the
slopes a' beside the values, from which a network assembles its Jacobian.

Implementing one: subclass `Activation`, implement `value_and_slope`, and state `lipschitz` if it is
not 1: certificates believe it. (`testing.check_lipschitz` searches for a stretch above what a
network claims.) Implement `curvature` too if a'' is a function of value and slope: it makes
training faster and changes nothing else.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.linearization import depth_of, is_hooked, is_traced


class Activation(nn.Module, ABC):
    """A unit-wise activation: values and slopes. Units lie along the last dimension.

    Networks of images hand over their channels as the last dimension.

    Attributes:
        lipschitz: certified Lipschitz constant of the map with respect to the 2-norm. It should
            not follow from parameters that are learned: weights depend on it, and gradients do not
            know. Give what bounds it for all of their values.
        widening: the number of output units per input unit. Output unit `j + i * n` of n inputs
            depends on input unit `j` alone.
    """

    lipschitz: float = 1.0
    widening: int = 1

    @abstractmethod
    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a(x), a'(x)), both of shape (*, widening * units)."""

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        """Return a''(x) where a(x) = value and a'(x) = slope.

        Raises:
            NotImplementedError: unless `has_curvature`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no curvature")

    def write(self, inputs: Tensor, value: Tensor, slope: Tensor | None = None) -> None:
        """Write a(x), and a'(x) if there is memory for it, to given memory; no graph is recorded.

        Args:
            inputs: x, shape (*, units).
            value: where a(x) goes, shape (*, widening * units).
            slope: where a'(x) goes, of the same shape, or None.
        """
        found = self.value_and_slope(inputs)
        value.copy_(found[0])
        if slope is not None:
            slope.copy_(found[1])

    def write_curvature(self, value: Tensor, slope: Tensor, curvature: Tensor) -> None:
        """Write a''(x) to given memory, see `curvature`; no graph is recorded."""
        curvature.copy_(self.curvature(value, slope))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Forget what was inherited from a class with other values and slopes."""
        super().__init_subclass__(**kwargs)
        of_values, of_curvature = depth_of(cls, "value_and_slope"), depth_of(cls, "curvature")
        if depth_of(cls, "forward") < of_values:
            raise TypeError(
                f"{cls.__name__} replaces forward alone, so that its slopes are those of another "
                "function: implement value_and_slope, from which forward follows"
            )
        for method in ("forward", "curvature", "write"):
            if depth_of(cls, method) > of_values:
                setattr(cls, method, getattr(Activation, method))
        if depth_of(cls, "write_curvature") > min(of_values, of_curvature):
            cls.write_curvature = Activation.write_curvature  # type: ignore[method-assign]

    @property
    def has_curvature(self) -> bool:
        """Whether `curvature` is implemented, and is all.

        Parameters would need derivatives too, and buffers may be others by the backward pass.
        """
        if type(self).curvature is Activation.curvature or self._parameters or self._buffers:
            return False
        tensors = itertools.chain(self.parameters(), self.buffers()) if self._modules else ()
        return next(iter(tensors), None) is None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return a(x), shape (*, widening * units)."""
        return self.value_and_slope(inputs)[0]


def called(activation: nn.Module, inputs: Tensor) -> Tensor:
    """Return activation(inputs), past the preparations of a call where there are no hooks."""
    outputs: Tensor = activation(inputs) if is_hooked(activation) else activation.forward(inputs)
    return outputs


def is_unit_wise(activation: nn.Module) -> bool:
    """Whether slopes are known, and are those of a call: there are no hooks to change it."""
    return isinstance(activation, Activation) and not _has_hooks(activation)


def _has_hooks(module: nn.Module | None) -> bool:
    """Whether a module or a part of it has hooks."""
    return module is not None and (
        is_hooked(module) or any(map(_has_hooks, module._modules.values()))
    )


def made_of(module: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> nn.Module:
    """Return a copy of a module that is made of other tensors.

    Args:
        module: the original, which stays as it is.
        state: the tensors by their names, each starting with `prefix`; others are shared.
        prefix: where the module stands in what the names are about.
    """
    made = type(module).__new__(type(module))
    made.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        own = module.__dict__[kind].items()
        made.__dict__[kind] = {name: state.get(prefix + name, each) for name, each in own}
    made.__dict__["_modules"] = {
        name: None if part is None else made_of(part, state, f"{prefix}{name}.")
        for name, part in module._modules.items()
    }
    return made


def widening_of(activation: nn.Module) -> int:
    """Return how many units an activation returns for each that it is given."""
    return int(getattr(activation, "widening", 1))


_ONE = torch.ones((), device="cpu")
"""A number, for functions of two tensors: of any precision, and on any device."""


class SmoothAbs(Activation):
    r"""Smooth absolute value, a(x) = sqrt(1 + x^2) - 1.

    The slope x / sqrt(1 + x^2) covers (-1, 1): unlike a monotone activation, it spends the whole
    Lipschitz budget on both sides, and it has no flat tail where the Jacobian would vanish.

    Example:
        >>> SmoothAbs().value_and_slope(torch.tensor([0.0, 1e6]))[1]
        tensor([0., 1.])
    """

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (sqrt(1 + x^2) - 1, x / sqrt(1 + x^2)), without overflow for large |x|."""
        root = torch.hypot(inputs, inputs.new_ones(()))
        return root - 1, inputs / root

    def forward(self, inputs: Tensor) -> Tensor:
        """Return sqrt(1 + x^2) - 1."""
        return torch.hypot(inputs, inputs.new_ones(())) - 1

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        """Return (1 + x^2)^{-3/2}."""
        return (value + 1).reciprocal().pow(3)

    def write(self, inputs: Tensor, value: Tensor, slope: Tensor | None = None) -> None:
        """Write the value, and the slope where there is memory for it."""
        torch.hypot(inputs, _ONE, out=value)
        if slope is not None:
            torch.div(inputs, value, out=slope)
        value.sub_(1)

    def write_curvature(self, value: Tensor, slope: Tensor, curvature: Tensor) -> None:
        """Write the curvature."""
        torch.add(value, 1, out=curvature).reciprocal_().pow_(3)


class Sine(Activation):
    """a(x) = sin(x), slope cos(x) in [-1, 1]."""

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (sin x, cos x)."""
        return inputs.sin(), inputs.cos()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return sin x."""
        return inputs.sin()

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        """Return -sin x."""
        return -value

    def write(self, inputs: Tensor, value: Tensor, slope: Tensor | None = None) -> None:
        """Write the value, and the slope where there is memory for it."""
        torch.sin(inputs, out=value)
        if slope is not None:
            torch.cos(inputs, out=slope)

    def write_curvature(self, value: Tensor, slope: Tensor, curvature: Tensor) -> None:
        """Write the curvature."""
        torch.neg(value, out=curvature)


class Mixed(Activation):
    r"""Half of the units one activation, the other half another.

    `Mixed(Sine(), SmoothAbs())` is the default of the networks here: the periodic half resolves
    detail, the half that grows linearly moves tails. Measured: docs/measurements.md#activations.

    Args:
        first: unit-wise activation of the first half of the units (rounded down), not widening.
        second: that of the rest.
    """

    def __init__(self, first: Activation, second: Activation) -> None:
        super().__init__()
        for each in (first, second):
            if not isinstance(each, Activation) or each.widening != 1:
                raise ValueError(
                    f"Mixed takes activations with one output per unit such as Sine(), got {each!r}"
                )
        self.first, self.second = first, second

    @property
    def lipschitz(self) -> float:  # type: ignore[override]
        """The larger constant of the two halves, as they are now."""
        return max(self.first.lipschitz, self.second.lipschitz)

    @property
    def has_curvature(self) -> bool:
        """Whether both halves have one, and it is theirs."""
        if type(self).curvature is not Mixed.curvature:
            return super().has_curvature
        return self.first.has_curvature and self.second.has_curvature

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values and slopes of both halves, side by side."""
        if _can_write():
            value, slope = torch.empty_like(inputs), torch.empty_like(inputs)
            self.write(inputs, value, slope)
            return value, slope
        first, second = _halves(inputs)
        value, slope = self.first.value_and_slope(first.contiguous())
        other_value, other_slope = self.second.value_and_slope(second.contiguous())
        return torch.cat([value, other_value], dim=-1), torch.cat([slope, other_slope], dim=-1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the values of both halves, side by side."""
        if _can_write() and not is_hooked(self.first) and not is_hooked(self.second):
            value = torch.empty_like(inputs)
            self.write(inputs, value)
            return value
        first, second = _halves(inputs)
        return torch.cat([called(self.first, first), called(self.second, second)], dim=-1)

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        """Return the curvatures of both halves, side by side."""
        if _can_write():
            curvature = torch.empty_like(value)
            self.write_curvature(value, slope, curvature)
            return curvature
        halves = zip(_halves(value), _halves(slope), strict=True)
        parts = zip((self.first, self.second), halves, strict=True)
        return torch.cat([part.curvature(*half) for part, half in parts], dim=-1)

    def write(self, inputs: Tensor, value: Tensor, slope: Tensor | None = None) -> None:
        """Write the values, and the slopes where there is memory for them, half by half."""
        slopes = (None, None) if slope is None else _halves(slope)
        first, second = zip(_halves(inputs), _halves(value), slopes, strict=True)
        self.first.write(*first)
        self.second.write(*second)

    def write_curvature(self, value: Tensor, slope: Tensor, curvature: Tensor) -> None:
        """Write the curvatures, half by half."""
        first, second = zip(_halves(value), _halves(slope), _halves(curvature), strict=True)
        self.first.write_curvature(*first)
        self.second.write_curvature(*second)


def _can_write() -> bool:
    """Whether results may go to memory of their own making: nothing records or follows them."""
    return not torch.is_grad_enabled() and not is_traced()


def _halves(values: Tensor) -> Sequence[Tensor]:
    """Split the units in two."""
    units = values.shape[-1]
    return values.split_with_sizes([units // 2, units - units // 2], -1)


class Tanh(Activation):
    """a(x) = tanh(x), slope 1 - tanh(x)^2 in (0, 1]."""

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

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (elu x, min(1, exp x))."""
        return F.elu(inputs), inputs.clamp(max=0).exp()

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        """Return exp x for x < 0, and 0 beyond."""
        return torch.where(value < 0, slope, 0.0)


class Softplus(Activation):
    """a(x) = log(1 + exp(x)), slope sigmoid(x) in (0, 1)."""

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (softplus x, sigmoid x)."""
        return -F.logsigmoid(-inputs), inputs.sigmoid()

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


def _elu(module: nn.ELU) -> float:
    return max(1.0, abs(module.alpha))


def _leaky_relu(module: nn.LeakyReLU) -> float:
    return max(1.0, abs(module.negative_slope))


_LEAST_THRESHOLD = 20
"""What torch's softplus leaves out is small from here on: where b x exceeds the threshold t it
returns x, without log(1 + exp(-t)) / b. Whatever b is, that is at most exp(-t) / t of x: 1e-10."""


def _softplus(module: nn.Softplus) -> float:
    if not module.threshold >= _LEAST_THRESHOLD:
        raise ValueError(
            f"no Lipschitz bound is known for {module}: it jumps at its threshold="
            f"{module.threshold}; use nflows_iresnet.nn.Softplus(), which has none, or a threshold "
            f"of at least {_LEAST_THRESHOLD}"
        )
    return 1.0


_CONSTANTS_OF_TORCH: dict[type[nn.Module], Callable[[Any], float]] = {
    nn.ELU: _elu,
    nn.LeakyReLU: _leaky_relu,
    nn.Identity: lambda _: 1.0,
    nn.ReLU: lambda _: 1.0,
    nn.Tanh: lambda _: 1.0,
    nn.Softplus: _softplus,
    nn.Sigmoid: lambda _: 0.25,
    nn.SiLU: lambda _: 1.1,
    nn.GELU: lambda _: 1.13,
}


def constant_of(activation: nn.Module) -> float | None:
    """Return a Lipschitz constant of an activation, ours or torch's; None if none is known.

    Raises:
        ValueError: for a softplus of torch that jumps, and for a constant that is no constant.
    """
    of_torch = _CONSTANTS_OF_TORCH.get(type(activation))
    if of_torch is not None:
        return of_torch(activation)
    constant = getattr(activation, "lipschitz", None)
    if isinstance(constant, bool) or not isinstance(constant, (int, float)):
        return None
    if not 0 <= constant < math.inf:
        raise ValueError(
            f"the Lipschitz constant of {type(activation).__name__} must be a number of at least "
            f"0, got {constant}"
        )
    return float(constant)
