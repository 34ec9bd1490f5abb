"""Dense networks with a certified Lipschitz bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.linearization import ForwardLinearization, Linearization, is_traced
from nflows_iresnet.nn.activations import widening_of
from nflows_iresnet.nn.base import (
    Evaluation,
    LayeredFunction,
    LayeredNet,
    validated_activation,
    validated_hidden,
)
from nflows_iresnet.nn.bounds import spectral_norm_bound
from nflows_iresnet.nn.fused import FusedLinearization, can_fuse
from nflows_iresnet.nn.layers import NormedLinear
from nflows_iresnet.nn.norms import MatrixNorm
from nflows_iresnet.precision import require_precision
from nflows_iresnet.validation import validated_size


class LipschitzMLP(LayeredNet):
    r"""A multilayer perceptron g with Lip(g) <= coeff in its inputs, for ANY stored weights.

    g(x; c) = W_n a(W_{n-1} ... a(W_1 x + b_1 + C_1 c) ...) + b_n + C_n c, starting and ending with
    a linear map, with W_i = T_i^{-1} V_i T_{i-1}, and V_i the stored weights divided by one number:

    * Only the PRODUCT of norms is constrained. With s = prod_i norm(V_i) of the stored weights,
      each is multiplied by min(1, coeff / s)^{1/n}, so that layers share the budget as training
      likes.
    * Learned positive diagonals T_i (T_0 = T_n = I) balance neighbouring layers. The slopes D_i of
      unit-wise activations are diagonal and commute with them, J = W_n D_{n-1} ... D_1 W_1
      = V_n D_{n-1} ... D_1 V_1, hence Lip(g) <= prod \|V_i\|_2 <= coeff for slopes of at most 1,
      whatever the norms of the W_i.

    Proof: docs/guarantees.md#one-budget-for-the-layers-of-a-network.

    The context enters through a network of its own, as a shift of every layer and as a stretch
    e(c) > 0 of every hidden unit, a(z) -> e a(z / e): neither changes a bound of a slope, so g is
    Lipschitz in x with the same certificate for every context of any magnitude, and unconstrained
    in the context.

    Stateless (unless `norm` is a `PowerIteration`): no buffer to update, the same function in
    training and evaluation, before and after loading a state_dict.

    References:
        Behrmann et al. Invertible residual networks, 2019 (normalising each layer).
        Fazlyab et al. Efficient and accurate estimation of Lipschitz constants, 2019 (diagonal
        multipliers, here learned).

    Args:
        features: number of inputs and outputs.
        hidden_features: width of each hidden layer.
        context_features: number of context values, or None.
        activation: a unit-wise activation, copied for each hidden layer; by default
            `Mixed(Sine(), SmoothAbs())`.
        context_hidden_features: widths of the hidden layers of the context's network.
        coeff: bound of the Lipschitz constant of the WHOLE network, in (0, 1).
        norm: the norm that the weights are divided by; by default `CholeskyNorm()`
            for matrices of 256 rows and columns or more, `SchattenNorm()` for others.
        optional_context: whether a network with a context works without one, too: as another
            function. By default a forgotten context is an error.

    Raises:
        ValueError: if a size is not positive or `coeff` is not in (0, 1).

    Example:
        >>> import torch
        >>> net = LipschitzMLP(2, [64, 64], coeff=0.9)
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
        features = validated_size("features", features)
        hidden = validated_hidden("hidden_features", hidden_features)
        activation = validated_activation(activation)
        fed = [features, *(width * widening_of(activation) for width in hidden)]
        widths = zip(fed, [*hidden, features], strict=True)
        super().__init__(
            [NormedLinear(inputs, outputs, norm=norm) for inputs, outputs in widths],
            hidden,
            features,
            activation=activation,
            coeff=coeff,
            context_features=context_features,
            context_hidden_features=context_hidden_features,
            optional_context=optional_context,
        )
        self.features = features

    def function(
        self,
        weights: list[Tensor],
        shifts: list[Tensor],
        stretches: list[Tensor],
        lipschitz: float | None,
    ) -> MLPFunction:
        """Return g for weights (out, in), shifts (out,) or (B, out), and stretches (B, out)."""
        return MLPFunction(weights, shifts, list(self.activations), lipschitz, stretches)

    def norm_bound(self, weight: Tensor) -> float:
        """Return a certified upper bound of the spectral norm."""
        return spectral_norm_bound(weight)


_CHUNK = 2**16
"""Values of a hidden layer that are computed together, where no graph keeps them.

They stay in the cache, and their memory is used again at once.
Measured: docs/measurements.md#values-in-parts.
"""


@dataclass(frozen=True)
class MLPFunction(LayeredFunction):
    """A `LayeredFunction` with matrices W_i, on rows (B, features)."""

    def affine(self, inputs: Tensor, index: int) -> Tensor:
        """Return W x + b."""
        weight, shift = self.weights[index], self.shifts[index]
        if index == 0:
            if inputs.dim() != 2 or inputs.shape[1] != weight.shape[1]:
                raise ValueError(
                    f"expected inputs of shape (batch, {weight.shape[1]}), got "
                    f"{tuple(inputs.shape)}"
                )
            require_precision(inputs, weight.dtype, "inputs")
        if shift.dim() == 1:
            return F.linear(inputs, weight, shift)
        return F.linear(inputs, weight) + shift

    def push(self, tangents: Tensor, index: int) -> Tensor:
        """Return W t, (k, B, in) -> (k, B, out)."""
        return F.linear(tangents, self.weights[index])

    def pull(self, cotangents: Tensor, index: int) -> Tensor:
        """Return W^T v, (k, B, out) -> (k, B, in)."""
        return cotangents @ self.weights[index]

    def outer(self, pairs: Sequence[tuple[Tensor, Tensor]], index: int) -> Tensor:
        """Return the sum of the outer products v t^T over tangents and rows, shape (out, in)."""
        (left, right), *others = [
            (v.reshape(-1, v.shape[-1]).mT, t.reshape(-1, t.shape[-1])) for v, t in pairs
        ]
        total = left @ right
        for left, right in others:
            total = torch.addmm(total, left, right)
        return total

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return g(inputs), shape (B, features); in parts where that is faster."""
        if torch.is_grad_enabled() or is_traced() or not self._is_to_be_cut(inputs):
            return self.evaluate(inputs, with_slopes=False).value
        step = self._chunk_rows
        parts = [slice(start, start + step) for start in range(0, inputs.shape[0], step)]
        values = [self.select(part).evaluate(inputs[part], with_slopes=False) for part in parts]
        return torch.cat([each.value for each in values])

    @cached_property
    def _chunk_rows(self) -> int:
        return max(1, _CHUNK // max(weight.shape[0] for weight in self.weights))

    def _is_to_be_cut(self, inputs: Tensor) -> bool:
        rows = inputs.shape[0]
        if rows <= self._chunk_rows or inputs.dim() != 2 or inputs.device.type != "cpu":
            return False
        of_rows = [each for each in (*self.shifts, *self.stretches) if each.dim() == 2]
        return all(each.shape[0] in (1, rows) for each in of_rows)

    def structured(self, evaluation: Evaluation) -> Linearization:
        """Return the linearisation by the slopes."""
        return MLPLinearization(evaluation.value, self.widened_weights(), evaluation.slopes)

    def linearize(self, inputs: Tensor) -> Linearization:
        """Return g at `inputs`: as one node of the graph where that is possible, see `fused`."""
        if inputs.dim() == 2 and can_fuse(self):
            return FusedMLPLinearization(self, inputs)
        return super().linearize(inputs)


class MLPLinearization(ForwardLinearization):
    r"""J = W_n D_{n-1} W_{n-1} ... D_1 W_1 with the diagonal slopes D_i = diag(a'(z_i)) saved.

    Cost: `vjp` and `jvp` are one pass through the weights, a third to a half of what automatic
    differentiation needs. `jacobian` is one matrix product per layer with D columns per row.
    `trace` is, for one hidden layer,

        tr J = sum_k D_1[k] (W_1 W_2)[k, k],

    and for two, tr J = D_2^T (W_2 o (W_1 W_3)^T) D_1: independent of the number of dimensions per
    row, after one product of weights per batch. It counts as cheap where that product costs at most
    half of what a product with J costs for the whole batch.

    Args:
        value: g(x), shape (B, features).
        weights: W_i, shapes (out, in).
        slopes: a'(z_i), shapes (B, hidden).
    """

    def __init__(self, value: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        self.value = value
        self._weights = weights
        self._slopes = slopes
        self.has_cheap_trace = has_cheap_trace(weights, value.shape[0])

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
        columns = self._weights[0].mT.expand(self.value.shape[0], -1, -1)
        for weight, slope in zip(self._weights[1:], self._slopes, strict=True):
            columns = F.linear(columns * slope[:, None, :], weight)
        return columns.mT

    def trace(self) -> Tensor:
        """Return tr J, shape (B,)."""
        if len(self._weights) == 1:
            return self._weights[0].trace().expand(self.value.shape[0])
        slopes = self._slopes
        if len(slopes) == 1:
            return slopes[0] @ (self._weights[0] * self._weights[1].mT).sum(1)
        if len(slopes) == 2:
            first, second, third = self._weights
            coupling = second * (first @ third).mT
            return ((slopes[1] @ coupling) * slopes[0]).sum(1)
        return super().trace()


def has_cheap_trace(weights: Sequence[Tensor], rows: int) -> bool:
    """Whether the one product of weights that the trace needs is small beside the batch."""
    if len(weights) <= 2:
        return True
    if torch.compiler.is_compiling():  # for batches whose size is not known yet
        return len(weights) == 3
    product = weights[0].numel() * weights[2].shape[1]
    return len(weights) == 3 and 2 * product <= rows * sum(weight.numel() for weight in weights)


class FusedMLPLinearization(FusedLinearization, MLPLinearization):  # type: ignore[override]
    """The linearisation of a dense network, with what is differentiated in one node."""

    def __init__(self, function: MLPFunction, inputs: Tensor) -> None:
        FusedLinearization.__init__(self, function, inputs)
        self._weights = function.weights
        self.has_cheap_trace = has_cheap_trace(function.weights, inputs.shape[0])

    def jacobian(self) -> Tensor:
        """Return J, shape (B, features, features)."""
        return self._node(None).pushed.permute(1, 2, 0)
