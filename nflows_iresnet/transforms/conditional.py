"""An affine map whose scale and shift are functions of the context."""

from __future__ import annotations

import math

from nflows.transforms import Transform
from torch import Tensor, nn

from nflows_iresnet.conditioning import check_context, context_mlp
from nflows_iresnet.precision import full_precision, like_weights
from nflows_iresnet.validation import validated_size, validated_strategy

_MAX_LOG_SCALE = 7.0
_HIDDEN = (64, 64)


class ConditionalAffine(Transform):
    r"""y = exp(s(c)) x + t(c): what of location and scale the context explains, exactly invertible.

    Residual blocks cannot stretch by more than 1 + L each; where the width of p(x | c) varies with
    the context, this map does in one step what would take many blocks. log\|det\| = sum_j s_j(c),
    with s = 7 tanh(net / 7) bounded, so that no context makes it infinite.

    Cost: one evaluation of the network of the context.

    Args:
        features: number of features of x.
        context_features: number of context values.
        net: maps a context (B, C) to (B, 2 * features): first s, then t. Start it near zero. By
            default `conditioning.context_mlp` with two hidden layers of 64 units.
        optional_context: whether the map is the identity without a context; by default a forgotten
            context is an error.

    Raises:
        ValueError: if a size is not positive, or the network is no module.
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        net: nn.Module | None = None,
        optional_context: bool = False,
    ) -> None:
        super().__init__()
        self.features = validated_size("features", features)
        self.context_features = validated_size("context_features", context_features)
        self.optional_context = optional_context
        if net is None:
            net = context_mlp(self.context_features, _HIDDEN, 2 * self.features)
        self.net = validated_strategy("net", net, nn.Module, "nn.context_mlp(3, [64], 4)")

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, sum_j s_j), shapes (B, features) and (B,)."""
        inputs, log_scale, shift = self._prepared(inputs, context)
        return inputs * log_scale.exp() + shift, log_scale.sum(1)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, -sum_j s_j), shapes (B, features) and (B,)."""
        inputs, log_scale, shift = self._prepared(inputs, context)
        return (inputs - shift) * (-log_scale).exp(), -log_scale.sum(1)

    def lipschitz_constants(self) -> tuple[float, float]:
        """Return bounds of the Lipschitz constants of forward and inverse, for every context."""
        bound = math.exp(_MAX_LOG_SCALE)
        return bound, bound

    def _prepared(self, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs in the right precision, the logarithm of the scale, and the shift."""
        if inputs.dim() != 2 or inputs.shape[1] != self.features:
            raise ValueError(
                f"expected inputs of shape (batch, {self.features}), got {tuple(inputs.shape)}"
            )
        inputs = like_weights(inputs, self.net)
        check_context(context, self.context_features, optional=self.optional_context)
        if context is None:
            zeros = inputs.new_zeros(inputs.shape)
            return inputs, zeros, zeros
        with full_precision(inputs.device):
            values = self.net(like_weights(context, self.net, "context"))
        raw, shift = values.split(self.features, dim=1)
        return inputs, _MAX_LOG_SCALE * (raw / _MAX_LOG_SCALE).tanh(), shift
