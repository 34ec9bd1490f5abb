"""What dense and convolutional networks share: a product budget, balancing scales, a context."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from nflows_iresnet.nn.activations import Activation, Mixed, Sine, SmoothAbs
from nflows_iresnet.nn.bounds import lipschitz_bound
from nflows_iresnet.nn.conditioning import bounded_exp, context_mlp
from nflows_iresnet.nn.layered import LayeredFunction
from nflows_iresnet.nn.layers import (
    NormedLayer,
    normalised,
    rounding_margin,
    validated_coeff,
    validated_size,
)

INITIAL_SCALE = 0.2
"""Start of the balancing scales t. Weights that respect a Lipschitz budget are small: with t = 1 a
network starts almost linear and learns slowly (checkerboard after 300 steps: 4.12 nats with t = 1,
3.81 with 0.3, 3.75 with 0.1; insensitive between 0.05 and 0.2)."""


class BalancedNet(nn.Module):
    """A network with Lip(g) <= coeff: normalised layers that share one budget, balanced by scales.

    See `LipschitzMLP` for the maths. Units are counted along dimension 1 of the weights' outputs.

    Args:
        layers: n layers with the sizes that `hidden` and `activation` ask for.
        hidden: width of each of the n - 1 hidden layers.
        outputs: number of units of the last layer.
        activation: copied for each hidden layer.
        context_features: number of context values, or None.
        context_hidden_features: widths of the hidden layers of the context's network.
        coeff: bound of the Lipschitz constant, in (0, 1).
    """

    def __init__(
        self,
        layers: Sequence[NormedLayer],
        hidden: Sequence[int],
        outputs: int,
        *,
        activation: nn.Module,
        context_features: int | None,
        context_hidden_features: Sequence[int],
        coeff: float,
    ) -> None:
        super().__init__()
        self.coeff = validated_coeff(coeff)
        self.layers = nn.ModuleList(layers)
        self.activations = nn.ModuleList(deepcopy(activation) for _ in hidden)
        self.log_scales = nn.ParameterList(
            torch.full((width,), math.log(INITIAL_SCALE))
            for width in hidden
            if isinstance(activation, Activation)
        )
        self.context_features = context_features
        self._context_sizes = [*hidden, outputs, *hidden[: len(self.log_scales)]]
        self.context_net = (
            None
            if context_features is None
            else context_mlp(
                validated_size("context_features", context_features),
                context_hidden_features,
                sum(self._context_sizes),
            )
        )

    @abstractmethod
    def _function(
        self,
        weights: list[Tensor],
        shifts: list[Tensor],
        stretches: list[Tensor],
        lipschitz: float | None,
    ) -> LayeredFunction:
        """Return g for weights (out, in, *), shifts (out,) or (B, out), and stretches (B, out)."""

    @abstractmethod
    def _norm_bound(self, weight: Tensor) -> float:
        """Return a certified upper bound of the norm of a weight."""

    @property
    def _normed_layers(self) -> list[NormedLayer]:
        return [layer for layer in self.layers if isinstance(layer, NormedLayer)]

    def effective_weights(self) -> list[Tensor]:
        """Return the weights W_i that are used, each of shape (out, in, *)."""
        return list(self.bind().weights)

    def _scales(self) -> list[Tensor]:
        """Return the diagonals T_1, ..., T_{n-1}, or nothing for activations that mix units."""
        return [bounded_exp(log_scale) for log_scale in self.log_scales]

    def _balance(self, weights: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
        """Return T_i^{-1} V_i T_{i-1}; with inverted scales, the way back."""
        balanced = list(weights)
        for index, scale in enumerate(scales):
            balanced[index] = balanced[index] / _along(scale, 0, balanced[index])
            widening = balanced[index + 1].shape[1] // len(scale)
            columns = _along(torch.cat([scale] * widening), 1, balanced[index + 1])
            balanced[index + 1] = balanced[index + 1] * columns
        return balanced

    def _log_budget(self) -> float:
        """Return log of the coefficient, less what activations and rounding may use of it."""
        log_margin = sum([math.log(rounding_margin(layer.weight)) for layer in self._normed_layers])
        return math.log(self.coeff / self._activation_constant()) + log_margin

    def _activation_constant(self) -> float:
        return math.prod([max(1.0, lipschitz_bound(each)) for each in self.activations])

    def bind(self, context: Tensor | None = None) -> LayeredFunction:
        """Return x -> g(x; context) with weights normalised and context shifts computed once.

        Args:
            context: shape (B, context_features), or None.

        Raises:
            ValueError: if a context is given to a network that was built without, or has another
                number of features.
        """
        scales = self._scales()
        shifts, stretches = self._conditions(context)
        hidden_shifts = [shift / scale for shift, scale in zip(shifts, scales, strict=False)]
        return self._function(
            weights=self._balance(normalised(self._normed_layers, self._log_budget()), scales),
            shifts=[*hidden_shifts, *shifts[len(hidden_shifts) :]],
            stretches=stretches,
            lipschitz=self.coeff if self._is_guaranteed() else None,
        )

    def _is_guaranteed(self) -> bool:
        return all(layer.norm.is_upper_bound for layer in self._normed_layers)

    def _conditions(self, context: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Return the shift of each layer and the stretch of each hidden one."""
        biases: list[Tensor] = [layer.bias for layer in self._normed_layers]  # type: ignore[misc]
        if context is None:
            return biases, []
        if self.context_net is None:
            raise ValueError("a context was given, but context_features is None; set it")
        if context.dim() != 2 or context.shape[1] != self.context_features:
            raise ValueError(
                f"the context must have shape (batch, {self.context_features}), got "
                f"{tuple(context.shape)}"
            )
        parts = self.context_net(context).split(self._context_sizes, dim=1)
        shifts = [bias + shift for bias, shift in zip(biases, parts, strict=False)]
        return shifts, [bounded_exp(log_stretch) for log_stretch in parts[len(biases) :]]

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Return g(x; context), of the shape of the inputs."""
        return self.bind(context)(inputs)

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        """Return a certified upper bound of Lip(g) from the weights W_i as they are used now.

        The W_i are brought back to V_i = T_i W_i T_{i-1}^{-1} in float64, so that their rounding
        is part of the bound.
        """
        used = [weight.double() for weight in self.effective_weights()]
        inverse_scales = [1 / scale.double() for scale in self._scales()]
        norms = [self._norm_bound(weight) for weight in self._balance(used, inverse_scales)]
        return math.prod(norms) * self._activation_constant()

    def extra_repr(self) -> str:
        """Show the coefficient."""
        return f"coeff={self.coeff}"


def _along(scale: Tensor, dim: int, weight: Tensor) -> Tensor:
    """Return a scale per unit of one dimension of a weight, shaped to multiply it."""
    return scale.reshape([-1 if each == dim else 1 for each in range(weight.dim())])


def default_activation() -> Activation:
    """Return the activation of networks that are not given one."""
    return Mixed(Sine(), SmoothAbs())


def validated_hidden(name: str, hidden: Sequence[int]) -> list[int]:
    """Return the sizes of hidden layers as a list, if they are sizes."""
    if not isinstance(hidden, Sequence):
        raise ValueError(f"{name} must be a sequence such as [64, 64], got {hidden!r}")
    return [validated_size(name, width) for width in hidden]


def widened(hidden: Sequence[int], activation: nn.Module) -> list[int]:
    """Return the number of units that each hidden layer hands on."""
    return [width * int(getattr(activation, "widening", 1)) for width in hidden]
