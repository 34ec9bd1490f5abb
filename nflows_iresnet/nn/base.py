"""What networks share: one forward loop, one product budget, balancing scales, a context."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from nflows_iresnet.conditioning import bounded_exp, check_context, context_mlp
from nflows_iresnet.linearization import (
    AutogradLinearization,
    Linearization,
    Rebuild,
    ResidualFunction,
    is_hooked,
    select_rows,
    state_of,
)
from nflows_iresnet.nn.activations import (
    Activation,
    Mixed,
    Sine,
    SmoothAbs,
    called,
    is_unit_wise,
    made_of,
    widening_of,
)
from nflows_iresnet.nn.balancing import Stored, balanced, balanced_weights
from nflows_iresnet.nn.bounds import lipschitz_bound
from nflows_iresnet.nn.layers import (
    NormedLayer,
    adopt_norms,
    rounding_margin,
    stacked,
    validated_coeff,
    weights_and_norms,
)
from nflows_iresnet.settings import SettingsInState
from nflows_iresnet.tensor_float import in_full_products
from nflows_iresnet.validation import validated_size, validated_strategy


@dataclass
class Evaluation:
    """What one evaluation of a layered network leaves behind, per hidden layer.

    Units lie where the inputs have their channels: (B, hidden), or (B, hidden, H, W).

    Attributes:
        units: u_i = z_i / e_i.
        activated: a(u_i).
        hidden: h_i = e_i a(u_i).
        slopes: s_i = a'(u_i), the derivative of h_i in z_i.
        value: g(x), of the shape of the inputs.
    """

    value: Tensor
    units: list[Tensor] = field(default_factory=list)
    activated: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class LayeredFunction(ResidualFunction):
    r"""g(x) = W_n h_{n-1} + b_n, h_i = e_i a(z_i / e_i), z_i = W_i h_{i-1} + b_i, h_0 = x.

    Attributes:
        weights: W_i, shapes (out, in, *).
        shifts: b_i, shapes (out,), or (B, out, *) where they depend on a context.
        activations: one per hidden layer.
        lipschitz: a bound of Lip(g) that is guaranteed, or None.
        stretches: e_i > 0, shapes (hidden,) or (B, *, hidden), one per hidden layer where its units
            are stretched, which changes no slope's bound; none by default.
    """

    weights: Sequence[Tensor]
    shifts: Sequence[Tensor]
    activations: Sequence[nn.Module]
    lipschitz: float | None = None
    stretches: Sequence[Tensor] = ()

    @abstractmethod
    def affine(self, inputs: Tensor, index: int) -> Tensor:
        """Return z = W_index inputs + b_index.

        Raises:
            ValueError: if the inputs have another number of features, or another rank.
        """

    @abstractmethod
    def push(self, tangents: Tensor, index: int) -> Tensor:
        """Return W_index t for several tangents of each row, (k, B, in, *) -> (k, B, out, *)."""

    @abstractmethod
    def pull(self, cotangents: Tensor, index: int) -> Tensor:
        """Return W_index^T v for several cotangents of each row, the other way round."""

    @abstractmethod
    def outer(self, pairs: Sequence[tuple[Tensor, Tensor]], index: int) -> Tensor:
        """Return the derivative of sum <v, W_index t> in the weight, of the weight's shape.

        Args:
            pairs: v of shape (k, B, out, *) and t of shape (k, B, in, *), with k of each pair.
            index: of the layer.
        """

    @abstractmethod
    def structured(self, evaluation: Evaluation) -> Linearization:
        """Return the linearisation of a network whose slopes are known."""

    def units_last(self, values: Tensor) -> Tensor:
        """Move the dimension of the units to the end, where activations expect it."""
        return values

    def units_back(self, values: Tensor) -> Tensor:
        """Undo `units_last`."""
        return values

    def handed_on(self, given: Tensor, values: Tensor, index: int) -> Tensor:
        """Return what the next layer is given, from what this one was and what it returned."""
        return values

    def evaluate(self, inputs: Tensor, *, with_slopes: bool) -> Evaluation:
        """Evaluate the network: the one forward loop.

        Args:
            inputs: x, shape (B, *).
            with_slopes: whether to keep what a linearisation needs; all activations must then be
                unit-wise.
        """
        kept = Evaluation(inputs)
        hidden = inputs
        for index, activation in enumerate(self.activations):
            units = self.units_last(self.affine(hidden, index))
            stretch = self.stretches[index] if self.stretches else None
            units = units if stretch is None else units / stretch
            if with_slopes:
                activated, slope = cast(Activation, activation).value_and_slope(units)
            else:
                activated = called(activation, units)
            values = activated if stretch is None else activated * widened(stretch, activation)
            hidden = self.handed_on(hidden, self.units_back(values), index)
            if with_slopes:
                kept.units.append(units)
                kept.activated.append(activated)
                kept.hidden.append(hidden)
                kept.slopes.append(self.units_back(slope))
        kept.value = self.affine(hidden, len(self.activations))
        return kept

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return g(inputs), of the shape of the inputs."""
        return self.evaluate(inputs, with_slopes=False).value

    def split(self) -> tuple[list[Tensor], Rebuild]:
        """Return the tensors that the function is made of, those of activations last."""
        tensors, rebuild = super().split()
        activations, states = list(self.activations), [state_of(each) for each in self.activations]
        names, rests = [list(saved) for saved, _ in states], [rest for _, rest in states]
        count = len(tensors)

        def rebuild_all(others: Sequence[Tensor]) -> ResidualFunction:
            remaining, made = iter(others[count:]), []
            for activation, own, rest in zip(activations, names, rests, strict=True):
                state = {**rest, **{name: next(remaining) for name in own}}
                made.append(made_of(activation, state) if state else activation)
            return replace(cast(LayeredFunction, rebuild(others[:count])), activations=made)

        return [*tensors, *(each for saved, _ in states for each in saved.values())], rebuild_all

    def linearize(self, inputs: Tensor) -> Linearization:
        """Return g at `inputs`: structured if all activations are unit-wise, else by autograd."""
        if not all(map(is_unit_wise, self.activations)):
            return AutogradLinearization(self, inputs)
        return self.structured(self.evaluate(inputs, with_slopes=True))

    def widened_weights(self) -> list[Tensor]:
        """Return the weights, rows repeated for activations that give several outputs per unit."""
        last = len(self.activations)
        return [
            torch.cat([weight] * widening_of(self.activations[index]))
            if index < last and widening_of(self.activations[index]) > 1
            else weight
            for index, weight in enumerate(self.weights)
        ]

    def select(self, rows: Tensor | slice) -> LayeredFunction:
        """Return the same function with the shifts and stretches of `rows` only."""
        if all(each.dim() == 1 for each in (*self.shifts, *self.stretches)):
            return self
        shifts, stretches = [
            [each if each.dim() == 1 else select_rows(each, rows) for each in group]
            for group in (self.shifts, self.stretches)
        ]
        return replace(self, shifts=shifts, stretches=stretches)


def widened(stretch: Tensor, activation: nn.Module) -> Tensor:
    """Return the stretch of each output of an activation, from that of each unit."""
    widening = widening_of(activation)
    return stretch if widening == 1 else torch.cat([stretch] * widening, dim=-1)


INITIAL_SCALE = 0.2
"""Start of the balancing scales t. Weights that respect a Lipschitz budget are small: with t = 1 a
network starts almost linear and learns slowly.
Measured: docs/measurements.md#start-of-the-balancing-scales."""


class LipschitzNet(SettingsInState, ABC):
    """A network g with a certified Lip(g) <= coeff in its inputs, for any stored weights.

    **Rounding.** The budget allows for the rounding of normal numbers, which is relative. So
    Lip(g) <= coeff holds as long as the weights that are used are normal: at least 6.1e-5 in
    float16, 1.3e-35 in float32 and bfloat16 (the smallest normal number, times exp(7) for scales);
    a few smaller ones beside others do no harm. Stored weights whose norms are tens of decades
    apart break it in float32, those a few decades apart in float16; norms above 8e37, which have
    subnormal reciprocals, exceed it slightly in float32. `lipschitz_bound` measures the weights as
    they are used, whatever they are.

    Implementing one (`nn.dense` is an example): call `super().__init__` with the layers; implement
    `lipschitz_bound`, and `bind`, which returns a `ResidualFunction` made of

    * the weights, as a `layers.weights_and_norms` of `self.normed_layers` allows them,
    * `bounded_exp(self.log_scales)`, the learned scales of the hidden units, and
    * `self.conditions(context)`, what the context shifts and stretches.

    Where its `linearize` knows the structure, estimators and solvers are as fast as that allows.
    `testing.check_linearization`, `check_lipschitz` and `check_transform` check it.

    Args:
        layers: n layers, whose norms the certificate rests on.
        hidden: width of each of the n - 1 hidden layers.
        outputs: number of units of the last layer.
        activation: copied for each hidden layer. Unit-wise ones get a learned scale t per unit,
            t a(z / t), in `log_scales`.
        coeff: bound of the Lipschitz constant, in (0, 1).
        context_features: number of context values, or None.
        context_hidden_features: widths of the hidden layers of the context's network.
        optional_context: whether a network with a context works without one, too.
    """

    def __init__(
        self,
        layers: Sequence[NormedLayer],
        hidden: Sequence[int],
        outputs: int,
        *,
        activation: nn.Module,
        coeff: float,
        context_features: int | None,
        context_hidden_features: Sequence[int],
        optional_context: bool,
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
        self.optional_context = optional_context
        self.context_features: int | None = None
        self.context_net: nn.Module | None = None
        self._conditioned = [*hidden, outputs, *hidden[: len(self.log_scales)]]
        widths = validated_hidden("context_hidden_features", context_hidden_features)
        if context_features is not None:
            self.context_features = validated_size("context_features", context_features)
            self.context_net = context_mlp(self.context_features, widths, sum(self._conditioned))

    @abstractmethod
    def bind(self, context: Tensor | None = None) -> ResidualFunction:
        """Return x -> g(x; context) with weights normalised and the context's part computed once.

        Args:
            context: shape (B, context_features), or None.

        Raises:
            ValueError: if the context is missing, is given to a network that was built without, or
                has another number of features.
        """

    @abstractmethod
    def lipschitz_bound(self) -> float:
        """Return a certified upper bound of Lip(g) from the weights as they are used now."""

    @property
    def normed_layers(self) -> list[NormedLayer]:
        """The layers whose norms the certificate rests on."""
        return [each for each in self.layers if isinstance(each, NormedLayer)]

    @property
    def lipschitz(self) -> float | None:
        """The bound of Lip(g) that is guaranteed without looking at the weights, or None."""
        is_guaranteed = all(layer.norm.is_upper_bound for layer in self.normed_layers)
        return self.coeff if is_guaranteed else None

    def conditions(self, context: Tensor | None) -> tuple[list[Tensor], list[Tensor]] | None:
        """Return what the context adds to the layers' outputs, and the stretches of hidden units.

        Args:
            context: shape (B, context_features), or None.

        Returns:
            Shifts (B, out) for all layers and stretches (B, hidden) > 0 for the hidden ones with
            unit-wise activations; None without a context.

        Raises:
            ValueError: see `bind`.
        """
        check_context(context, self.context_features, optional=self.optional_context)
        if context is None or self.context_net is None:
            return None
        values = self.context_net(context).split(self._conditioned, dim=1)
        count = len(self.layers)
        return list(values[:count]), [bounded_exp(each) for each in values[count:]]

    @in_full_products()
    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Return g(x; context), of the shape of the inputs."""
        return self.bind(context)(inputs)

    def settings(self) -> Mapping[str, object]:
        """Return what the function depends on beside its weights."""
        norms = [layer.norm for layer in self.normed_layers]
        return {"coeff": self.coeff, "norm": norms, "activation": list(self.activations)}

    def adopt(self, saved: Mapping[str, str]) -> None:
        """Take over the norms of an older default."""
        adopt_norms(self.normed_layers, saved.get("norm", ""))

    def extra_repr(self) -> str:
        """Show the coefficient."""
        return f"coeff={self.coeff}"


class LayeredNet(LipschitzNet):
    """A network whose layers share one budget of norms and are balanced by scales.

    See `LipschitzMLP` for the maths. Units are counted along dimension 1 of the weights' outputs.
    """

    @abstractmethod
    def function(
        self,
        weights: list[Tensor],
        shifts: list[Tensor],
        stretches: list[Tensor],
        lipschitz: float | None,
    ) -> LayeredFunction:
        """Return g for weights (out, in, *), shifts (out,) or (B, out), and stretches (B, out)."""

    @abstractmethod
    def norm_bound(self, weight: Tensor) -> float:
        """Return a certified upper bound of the norm of a weight."""

    def bind(self, context: Tensor | None = None) -> LayeredFunction:
        """Return x -> g(x; context), see `LipschitzNet.bind`."""
        return self.bind_together([self], context)[0]

    def binding_key(self) -> Hashable | None:
        """Return what networks must have in common to be normalised together."""
        is_own = type(self).bind is LayeredNet.bind and "bind" not in vars(self)
        if not is_own or is_hooked(self):
            return None
        layers = self.normed_layers
        weight = layers[0].weight
        shapes = tuple((layer.weight.shape, layer.norm) for layer in layers)
        return shapes, weight.dtype, weight.device, len(self.log_scales), self._log_budget()

    @classmethod
    def bind_together(
        cls, nets: Sequence[LayeredNet], context: Tensor | None = None
    ) -> list[LayeredFunction]:
        """Return what `bind` returns for each of several networks with one `binding_key`.

        Args:
            nets: the networks.
            context: of all of them, shape (B, context_features), or None.
        """
        of_each = [
            [list(parts) for parts in zip(*[stack.unbind(0) for stack in group], strict=True)]
            if group
            else [[] for _ in nets]
            for group in LayeredNet._used(nets)
        ]
        parts = zip(nets, *of_each, strict=True)
        return [net._with_context(context, *tensors) for net, *tensors in parts]

    @staticmethod
    def _used(nets: Sequence[LayeredNet]) -> tuple[Sequence[Tensor], ...]:
        """Return the weights W_i, biases and scales of networks, those at each place together."""
        layers = [net.normed_layers for net in nets]
        for layer in [layer for each in layers for layer in each]:
            layer.refuse_other_hooks()
        stacks, norms = weights_and_norms(layers)
        biases = [stacked(layer.bias for layer in place) for place in zip(*layers, strict=True)]
        log_scales = [
            stacked(place) for place in zip(*[net.log_scales for net in nets], strict=True)
        ]
        stored = Stored(stacks, biases[: len(log_scales)], log_scales)
        weights, shifts, scales = balanced(stored, norms, nets[0]._log_budget())
        return weights, [*shifts, *biases[len(shifts) :]], scales

    def _with_context(
        self,
        context: Tensor | None,
        weights: list[Tensor],
        biases: list[Tensor],
        scales: list[Tensor],
    ) -> LayeredFunction:
        """Return g for one context from balanced weights, balanced biases and the scales."""
        conditions = self.conditions(context)
        if conditions is None:
            return self.function(weights, biases, [], self.lipschitz)
        additions, stretches = conditions
        for index, scale in enumerate(scales):
            additions[index] = additions[index] / scale
        shifts = [bias + addition for bias, addition in zip(biases, additions, strict=True)]
        return self.function(weights, shifts, stretches, self.lipschitz)

    def _log_budget(self) -> float:
        """Return log of the coefficient, less what activations and rounding may use of it."""
        margins = [math.log(rounding_margin(layer.weight)) for layer in self.normed_layers]
        coeff = validated_coeff(self.coeff)
        return math.log(coeff / self._activation_constant()) + sum(margins)

    def _activation_constant(self) -> float:
        return math.prod([max(1.0, lipschitz_bound(each)) for each in self.activations])

    def effective_weights(self) -> list[Tensor]:
        """Return the weights W_i that are used, each of shape (out, in, *)."""
        return [stack[0] for stack in LayeredNet._used([self])[0]]

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        """Return a certified upper bound of Lip(g) from the weights W_i as they are used now.

        The W_i are brought back to V_i = T_i W_i T_{i-1}^{-1} in float64, so that their rounding
        is part of the bound.
        """
        used = [stack[0].double() for stack in LayeredNet._used([self])[0]]
        inverse_scales = [1 / bounded_exp(each).double() for each in self.log_scales]
        one = torch.ones((), dtype=torch.float64, device=used[0].device)
        norms = [self.norm_bound(each) for each in balanced_weights(used, one, inverse_scales)]
        return math.prod(norms) * self._activation_constant()


def default_activation() -> Activation:
    """Return the activation of networks that are not given one."""
    return Mixed(Sine(), SmoothAbs())


def validated_activation(activation: nn.Module | None) -> nn.Module:
    """Return an activation if it is a module, by default `default_activation()`."""
    if activation is None:
        return default_activation()
    return validated_strategy("activation", activation, nn.Module, "nn.Sine()")


def validated_hidden(name: str, hidden: Sequence[int]) -> list[int]:
    """Return the sizes of hidden layers as a list, if they are sizes."""
    if isinstance(hidden, str) or not isinstance(hidden, Sequence):
        raise ValueError(f"{name} must be a sequence such as [64, 64], got {hidden!r}")
    return [validated_size(name, width) for width in hidden]
