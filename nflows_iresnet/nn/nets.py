"""Dense networks with a certified Lipschitz bound."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nflows_iresnet.nn.balanced import BalancedNet, default_activation, validated_hidden, widened
from nflows_iresnet.nn.bounds import spectral_norm_bound
from nflows_iresnet.nn.dense import DenseFunction
from nflows_iresnet.nn.layers import NormedLinear
from nflows_iresnet.nn.norms import MatrixNorm
from nflows_iresnet.nn.schatten import SchattenNorm
from nflows_iresnet.validation import validated_size


class LipschitzMLP(BalancedNet):
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

    The context enters through a network of its own, as a shift of every layer and as a stretch
    e(c) > 0 of every hidden unit, a(z) -> e a(z / e): neither changes a bound of a slope, so g is
    Lipschitz in x with the same certificate for every context of any magnitude, and unconstrained
    in the context.

    Stateless (unless `norm` is a `PowerIteration`): no buffer to update, the same function in
    training and evaluation, before and after loading a state_dict.

    Args:
        features: number of inputs and outputs.
        hidden_features: width of each hidden layer.
        context_features: number of context values, or None.
        activation: a unit-wise activation, copied for each hidden layer; by default
            `Mixed(Sine(), SmoothAbs())`.
        context_hidden_features: widths of the hidden layers of the context's network.
        coeff: bound of the Lipschitz constant of the WHOLE network, in (0, 1).
        norm: the norm that the weights are divided by; `SchattenNorm()` by default.

    Raises:
        ValueError: if a size is not positive or `coeff` is not in (0, 1).

    References:
        Behrmann et al. Invertible residual networks, 2019 (normalising each layer).
        Fazlyab et al. Efficient and accurate estimation of Lipschitz constants, 2019 (diagonal
        multipliers, here learned).

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
    ) -> None:
        features = validated_size("features", features)
        hidden = validated_hidden("hidden_features", hidden_features)
        activation = activation if activation is not None else default_activation()
        norm = norm if norm is not None else SchattenNorm()
        widths = zip([features, *widened(hidden, activation)], [*hidden, features], strict=True)
        super().__init__(
            [NormedLinear(inputs, outputs, norm=norm) for inputs, outputs in widths],
            hidden,
            features,
            activation=activation,
            context_features=context_features,
            context_hidden_features=context_hidden_features,
            coeff=coeff,
        )
        self.features = features

    def _function(
        self,
        weights: list[Tensor],
        shifts: list[Tensor],
        stretches: list[Tensor],
        lipschitz: float | None,
    ) -> DenseFunction:
        return DenseFunction(weights, shifts, list(self.activations), lipschitz, stretches)

    def _norm_bound(self, weight: Tensor) -> float:
        return spectral_norm_bound(weight)
