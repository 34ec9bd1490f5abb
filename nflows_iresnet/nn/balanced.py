"""What dense and convolutional networks share: a product budget, balancing scales, a context."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from nflows_iresnet.conditioning import bounded_exp, context_mlp
from nflows_iresnet.nn.activation import Activation
from nflows_iresnet.nn.activations import Mixed, Sine, SmoothAbs
from nflows_iresnet.nn.bounds import lipschitz_bound
from nflows_iresnet.nn.layered import LayeredFunction
from nflows_iresnet.nn.layers import (
    NormedLayer,
    normalised,
    rounding_margin,
    stacked,
    validated_coeff,
)
from nflows_iresnet.validation import validated_size

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

    def _kind(self) -> tuple[object, ...]:
        """Return what two networks must have in common to be bound together."""
        layers = self._normed_layers
        shapes = tuple(layer.weight.shape for layer in layers)
        norms = tuple(layer.norm for layer in layers)
        weight = layers[0].weight
        budget = self.coeff, self._activation_constant()
        return shapes, norms, weight.dtype, weight.device, len(self.log_scales), budget

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
        return self.bind_all([self], context)[0]

    @classmethod
    def bind_all(
        cls, nets: Sequence[BalancedNet], context: Tensor | None = None
    ) -> list[LayeredFunction]:
        """Return what `bind` returns for each network; those of one kind are normalised together.

        Args:
            nets: any networks.
            context: of all of them, shape (B, context_features), or None.
        """
        kinds: dict[tuple[object, ...], list[BalancedNet]] = {}
        for net in nets:
            kinds.setdefault(net._kind(), []).append(net)
        bound = {
            net: function
            for alike in kinds.values()
            for net, function in zip(alike, _bind_alike(alike, context), strict=True)
        }
        return [bound[net] for net in nets]

    def _bound(
        self,
        context: Tensor | None,
        weights: list[Tensor],
        biases: list[Tensor],
        scales: list[Tensor],
    ) -> LayeredFunction:
        """Return g for one context from balanced weights, balanced biases and the scales."""
        additions, stretches = self._conditions(context)
        shifts = list(biases)
        for index, addition in enumerate(additions):
            is_hidden = index < len(scales)
            shifts[index] = biases[index] + (addition / scales[index] if is_hidden else addition)
        lipschitz = self.coeff if self._is_guaranteed() else None
        return self._function(weights, shifts, stretches, lipschitz)

    def _is_guaranteed(self) -> bool:
        return all(layer.norm.is_upper_bound for layer in self._normed_layers)

    def _conditions(self, context: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the context adds to each bias, and the stretch of each hidden layer."""
        if context is None:
            return [], []
        if self.context_net is None:
            raise ValueError("a context was given, but context_features is None; set it")
        if context.dim() != 2 or context.shape[1] != self.context_features:
            raise ValueError(
                f"the context must have shape (batch, {self.context_features}), got "
                f"{tuple(context.shape)}"
            )
        parts = self.context_net(context).split(self._context_sizes, dim=1)
        shifts, log_stretches = parts[: len(self.layers)], parts[len(self.layers) :]
        return list(shifts), [bounded_exp(log_stretch) for log_stretch in log_stretches]

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
        one = torch.ones((), dtype=torch.float64, device=used[0].device)
        norms = [self._norm_bound(each) for each in _balanced(used, one, inverse_scales)]
        return math.prod(norms) * self._activation_constant()

    def extra_repr(self) -> str:
        """Show the coefficient."""
        return f"coeff={self.coeff}"


def _balanced(weights: Sequence[Tensor], factors: Tensor, scales: Sequence[Tensor]) -> list[Tensor]:
    """Return f T_i^{-1} V_i T_{i-1} for factors (*), scales (*, width), weights (*, out, in, k)."""
    balanced = []
    for index, weight in enumerate(weights):
        kernel = [1] * (weight.dim() - factors.dim() - 2)
        rows = factors[..., None]
        rows = rows / scales[index] if index < len(scales) else rows
        weight = weight * rows.reshape(*rows.shape, 1, *kernel)
        if 0 < index <= len(scales):
            widening = weight.shape[factors.dim() + 1] // scales[index - 1].shape[-1]
            columns = torch.cat([scales[index - 1]] * widening, dim=-1)
            weight = weight * columns[..., None, :].reshape(*factors.shape, 1, -1, *kernel)
        balanced.append(weight)
    return balanced


def _bind_alike(nets: Sequence[BalancedNet], context: Tensor | None) -> list[LayeredFunction]:
    """Bind networks whose weights have the same shapes, norms and budget."""
    layers = [net._normed_layers for net in nets]
    log_scales = zip(*[net.log_scales for net in nets], strict=True)
    scales = [bounded_exp(stacked(place)) for place in log_scales]
    weights = _balanced(*normalised(layers, nets[0]._log_budget()), scales)
    biases = [stacked(layer.bias for layer in place) for place in zip(*layers, strict=True)]
    for index, scale in enumerate(scales):
        biases[index] = biases[index] / scale
    parts = zip(*[_of_each(stacks, len(nets)) for stacks in (weights, biases, scales)], strict=True)
    return [net._bound(context, *part) for net, part in zip(nets, parts, strict=True)]


def _of_each(stacks: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """Return for each of `count` networks its part of every stack."""
    unbound = [stack.unbind(0) for stack in stacks]
    return [[parts[index] for parts in unbound] for index in range(count)]


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
