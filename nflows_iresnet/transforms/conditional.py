"""An affine map whose scale and shift are functions of the context."""

from __future__ import annotations

from nflows.transforms import Transform
from torch import Tensor, nn

from nflows_iresnet.precision import full_precision, like_weights


class ConditionalAffine(Transform):
    r"""y = exp(s(c)) x + t(c): what of location and scale the context explains, exactly invertible.

    Residual blocks cannot stretch by more than 1 + L each; where the width of p(x | c) varies with
    the context, this map does in one step what would take many blocks. log\|det\| = sum_j s_j(c),
    with s = 7 tanh(net / 7) bounded, so that no context makes it infinite. Without a context it is
    the identity.

    Cost: one evaluation of the network of the context.

    Args:
        net: maps a context (B, C) to (B, 2 * features): first s, then t. Start it near zero.
        features: number of features of x.
        context_features: number of context values, checked where it is given.
    """

    _max_log_scale = 7.0

    def __init__(self, net: nn.Module, features: int, context_features: int | None = None) -> None:
        super().__init__()
        self.context_features = context_features
        self.net = net
        self.features = features

    def _log_scale_and_shift(self, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if context is None:
            zeros = inputs.new_zeros(inputs.shape)
            return zeros, zeros
        if self.context_features not in (None, context.shape[-1]):
            raise ValueError(
                f"the context must have shape (batch, {self.context_features}), got "
                f"{tuple(context.shape)}"
            )
        with full_precision(inputs.device):
            values = self.net(like_weights(context, self.net))
        raw, shift = values.split(self.features, dim=1)
        return self._max_log_scale * (raw / self._max_log_scale).tanh(), shift

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, sum_j s_j), shapes (B, features) and (B,)."""
        log_scale, shift = self._log_scale_and_shift(inputs, context)
        return inputs * log_scale.exp() + shift, log_scale.sum(1)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, -sum_j s_j), shapes (B, features) and (B,)."""
        log_scale, shift = self._log_scale_and_shift(inputs, context)
        return (inputs - shift) * (-log_scale).exp(), -log_scale.sum(1)
