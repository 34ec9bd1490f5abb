"""The densely connected network with a certified Lipschitz bound (i-DenseNet)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.conditioning import bounded_exp
from nflows_iresnet.linearization import ForwardLinearization, Linearization
from nflows_iresnet.nn.activations import widening_of
from nflows_iresnet.nn.balancing import multiplied
from nflows_iresnet.nn.base import (
    Evaluation,
    LayeredFunction,
    LipschitzNet,
    validated_activation,
    validated_hidden,
)
from nflows_iresnet.nn.bounds import lipschitz_bound, spectral_norm_bound
from nflows_iresnet.nn.layers import (
    NormedLinear,
    rounding_margin,
    validated_coeff,
    weights_and_norms,
)
from nflows_iresnet.nn.mlp import MLPFunction
from nflows_iresnet.nn.norms import MatrixNorm
from nflows_iresnet.validation import validated_size


class LipschitzDenseNet(LipschitzNet):
    r"""A densely connected g with Lip(g) <= coeff in its inputs, for ANY stored weights.

    Each hidden layer hands on what it was given beside what it computed, with learned weights
    p_i, q_i > 0 of the two parts:

        h_0 = x,    h_i = [p_i h_{i-1}, q_i a(W_i h_{i-1} + b_i)],    g(x) = W h_n + b.

    **Certificate of the whole.** With s_i >= \|W_i\|_2 and l >= Lip(a),

        Lip(g) <= \|W\| prod_i sqrt(p_i^2 + (q_i l s_i)^2),

    because the two parts are orthogonal, and W is the stored last weight times
    min(1, coeff / that bound): only the product is constrained, whatever the parts are.
    (Perugachi-Diaz et al. normalise p_i and q_i instead, layer by layer.)
    Proof: docs/guarantees.md#the-densely-connected-network.

    Units are balanced by learned scales t, t a(z / t), and a context shifts every layer and
    stretches every hidden unit, as in `LipschitzMLP`: neither changes a bound of a slope.

    References:
        Perugachi-Diaz, Tomczak, Bhulai. Invertible DenseNets with concatenated LipSwish, 2021.

    Args:
        features: number of inputs and outputs.
        hidden_features: what each hidden layer adds, before an activation widens it.
        context_features: number of context values, or None.
        activation: copied for each hidden layer; by default `Mixed(Sine(), SmoothAbs())`. The
            paper's is `CLipSwish()`.
        context_hidden_features: widths of the hidden layers of the context's network.
        coeff: bound of the Lipschitz constant of the WHOLE network, in (0, 1).
        norm: the norm that the weights are measured by; by default `CholeskyNorm()`
            for matrices of 256 rows and columns or more, `SchattenNorm()` for others.
        optional_context: whether a network with a context works without one, too: as another
            function. By default a forgotten context is an error.

    Raises:
        ValueError: if a size is not positive or `coeff` is not in (0, 1).

    Example:
        >>> import torch
        >>> net = LipschitzDenseNet(2, [16, 16], coeff=0.9)
        >>> net(torch.zeros(5, 2)).shape
        torch.Size([5, 2])
        >>> net.lipschitz_bound() <= 0.9
        True
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int],
        context_features: int | None = None,
        *,
        activation: nn.Module | None = None,
        context_hidden_features: Sequence[int] = (64, 64),
        coeff: float = 0.97,
        norm: MatrixNorm | None = None,
        optional_context: bool = False,
    ) -> None:
        self.features = features = validated_size("features", features)
        hidden = validated_hidden("hidden_features", hidden_features)
        activation = validated_activation(activation)
        added = [width * widening_of(activation) for width in hidden]
        fed = accumulate([features, *added])
        super().__init__(
            [
                NormedLinear(inputs, outputs, norm=norm)
                for inputs, outputs in zip(fed, [*hidden, features], strict=True)
            ],
            hidden,
            features,
            activation=activation,
            coeff=coeff,
            context_features=context_features,
            context_hidden_features=context_hidden_features,
            optional_context=optional_context,
        )
        self.log_parts = nn.Parameter(torch.full((2, len(hidden)), -0.5 * math.log(2)))

    def bind(self, context: Tensor | None = None) -> DenselyConnectedFunction:
        """Return x -> g(x; context), see `LipschitzNet.bind`."""
        weights, parts = self.effective_weights()
        shifts = [cast(Tensor, layer.bias) for layer in self.normed_layers]
        stretches = [bounded_exp(each) for each in self.log_scales]
        conditions = self.conditions(context)
        if conditions is not None:
            additions, factors = conditions
            shifts = [bias + addition for bias, addition in zip(shifts, additions, strict=True)]
            stretches = [scale * by for scale, by in zip(stretches, factors, strict=True)]
        activations = list(self.activations)
        return DenselyConnectedFunction(
            weights, shifts, activations, self.lipschitz, stretches, parts=parts
        )

    def effective_weights(self) -> tuple[list[Tensor], Tensor]:
        """Return the weights W_i that are used, (out, in), and the parts p and q, (2, hidden)."""
        for layer in self.normed_layers:
            layer.refuse_other_hooks()
        stacks, norms = weights_and_norms([self.normed_layers])
        *hidden, last = [stack[0] for stack in stacks]
        parts = bounded_exp(self.log_parts)
        kept, added = parts.double()
        each_constant = [norms.new_full((1,), lipschitz_bound(each)) for each in self.activations]
        constants = torch.cat([norms.new_empty(0), *each_constant])  # without a copy from the host
        growths = kept.square() + (added * constants * norms[:-1, 0]).square()
        log_bound = norms[-1, 0].log() + growths.log().sum() / 2
        log_target = math.log(validated_coeff(self.coeff) * rounding_margin(last))
        factor = (log_target - log_bound).clamp_max(0).exp()
        return [*hidden, multiplied(last, factor)], parts

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        """Return a certified upper bound of Lip(g) from the weights as they are used now."""
        (*hidden, last), parts = self.effective_weights()
        bound = spectral_norm_bound(last)
        for weight, (kept, added), activation in zip(
            hidden, parts.double().mT.tolist(), self.activations, strict=True
        ):
            slope = lipschitz_bound(activation) * spectral_norm_bound(weight)
            bound *= math.hypot(kept, added * slope)
        return bound


@dataclass(frozen=True)
class DenselyConnectedFunction(MLPFunction):
    r"""A `LayeredFunction` whose layers hand on [p h, q a] beside what they computed, a.

    Attributes:
        parts: p and q of each hidden layer, shape (2, n).
    """

    parts: Tensor = field(kw_only=True)

    def handed_on(self, given: Tensor, values: Tensor, index: int) -> Tensor:
        """Return the two parts, side by side."""
        kept, added = self.parts[:, index]
        return torch.cat([kept * given, added * values], dim=-1)

    def structured(self, evaluation: Evaluation) -> Linearization:
        """Return the linearisation by the slopes."""
        slopes = [
            added * slope for added, slope in zip(self.parts[1], evaluation.slopes, strict=True)
        ]
        weights = self.widened_weights()
        return DenselyConnectedLinearization(evaluation.value, weights, slopes, self.parts[0])

    def linearize(self, inputs: Tensor) -> Linearization:
        """Return g at `inputs`: structured if all activations are unit-wise, else by autograd."""
        return LayeredFunction.linearize(self, inputs)


class DenselyConnectedLinearization(ForwardLinearization):
    r"""J = W M_n ... M_1 with M_i = [p_i I; q_i D_i W_i] and the diagonal slopes D_i saved.

    Cost: `vjp` and `jvp` are one pass through the weights. `jacobian` is one product per layer with
    D columns per row.

    Args:
        value: g(x), shape (B, features).
        weights: W_1, ..., W_n, W, shapes (out, in).
        slopes: q_i a'(z_i), shapes (B, hidden).
        kept: p_i, shape (n,).
    """

    def __init__(
        self, value: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor], kept: Tensor
    ) -> None:
        self.value = value
        *self._weights, self._last = weights
        self._slopes, self._kept = slopes, kept

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Return J^T v = M_1^T ... M_n^T W^T v."""
        product = cotangent @ self._last
        for weight, slope, kept in zip(
            reversed(self._weights), reversed(self._slopes), self._kept.flip(0), strict=True
        ):
            passed, computed = product.split([weight.shape[1], weight.shape[0]], dim=-1)
            product = kept * passed + (computed * slope) @ weight
        return product

    def jvp(self, tangent: Tensor) -> Tensor:
        """Return J v = W M_n ... M_1 v."""
        return self._pushed(tangent, self._slopes)

    def _pushed(self, tangent: Tensor, slopes: Sequence[Tensor]) -> Tensor:
        for weight, slope, kept in zip(self._weights, slopes, self._kept, strict=True):
            tangent = torch.cat([kept * tangent, F.linear(tangent, weight) * slope], dim=-1)
        return F.linear(tangent, self._last)

    def jacobian(self) -> Tensor:
        """Return J, shape (B, features, features), from the tangents of all coordinates at once."""
        features = self.value.shape[-1]
        basis = torch.eye(features, dtype=self.value.dtype, device=self.value.device)
        columns = basis.expand(self.value.shape[0], -1, -1)
        return self._pushed(columns, [slope[:, None, :] for slope in self._slopes]).mT
