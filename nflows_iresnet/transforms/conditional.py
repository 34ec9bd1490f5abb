"""An affine map whose scale and shift are functions of the context."""

from __future__ import annotations

import math

from nflows.transforms import Transform
from torch import Tensor, nn

from nflows_iresnet.conditioning import check_context, context_mlp
from nflows_iresnet.precision import (
    context_like_weights,
    full_precision,
    like_weights,
    training_precision,
)
from nflows_iresnet.validation import require_tensor, validated_size, validated_strategy

_HIDDEN_FEATURES = (64, 64)
_MAX_LOG_SCALE = 7.0


class ConditionalAffine(Transform):
    r"""y = exp(s(c)) x + t(c): what of location and scale the context explains, exactly invertible.

    Residual blocks cannot stretch by more than 1 + L each; where the width of p(x | c) varies with
    the context, this map does in one step what would take many blocks. log\|det\| = sum_j s_j(c),
    with s = 7 tanh(net / 7) bounded, so that no context makes it infinite.

    Cost: one evaluation of the network of the context.

    Args:
        features: number of features of x.
        context_features: number of context values C.
        net: maps a context (B, C) to (B, 2 * features): first s, then t. Start it near zero. By
            default `nn.context_mlp` with two hidden layers of 64 units.
        optional_context: whether it may be called without a context: it is the identity then.

    Raises:
        ValueError: if a size is not positive, or `net` is no module; in use, if the context is
            missing and not optional, or if inputs and context do not fit in shape or precision.

    Example:
        >>> import torch
        >>> affine = ConditionalAffine(features=3, context_features=2)
        >>> outputs, logabsdet = affine(torch.randn(5, 3), torch.randn(5, 2))
        >>> outputs.shape, logabsdet.shape
        (torch.Size([5, 3]), torch.Size([5]))
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
            net = context_mlp(self.context_features, _HIDDEN_FEATURES, 2 * self.features)
        example = "context_mlp(context_features, (64, 64), 2 * features)"
        self.net = validated_strategy("net", net, nn.Module, example)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, sum_j s_j), shapes (B, features) and (B,)."""
        inputs = self._checked(inputs, context)
        with training_precision(self, inputs.device, "anything"):
            log_scale, shift = self._log_scale_and_shift(inputs, context)
        return inputs * log_scale.exp() + shift, log_scale.sum(1)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, -sum_j s_j), shapes (B, features) and (B,)."""
        inputs = self._checked(inputs, context)
        with full_precision(inputs.device, "anything"):
            log_scale, shift = self._log_scale_and_shift(inputs, context)
        return (inputs - shift) * (-log_scale).exp(), -log_scale.sum(1)

    def lipschitz_constants(self) -> tuple[float, float]:
        """Return bounds of the Lipschitz constants of forward and inverse, for every context.

        Infinite where a parameter of the network is not finite: scales may be NaN then.
        """
        if not all(bool(each.isfinite().all()) for each in self.net.parameters()):
            return math.inf, math.inf
        largest = math.nextafter(math.exp(_MAX_LOG_SCALE), math.inf)
        return largest, largest

    def _log_scale_and_shift(self, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if context is None:
            zeros = inputs.new_zeros(inputs.shape)
            return zeros, zeros
        values = self.net(context_like_weights(context, self.net))
        if values.shape[1:] != (2 * self.features,):
            raise ValueError(
                f"net must return {2 * self.features} values per row, scales and shifts of "
                f"{self.features} features, but returned shape {tuple(values.shape)}"
            )
        raw, shift = values.chunk(2, dim=1)
        return _MAX_LOG_SCALE * (raw / _MAX_LOG_SCALE).tanh(), shift

    def _checked(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        require_tensor("inputs", inputs)
        if inputs.dim() != 2 or inputs.shape[1] != self.features:
            raise ValueError(
                f"expected inputs of shape (batch, {self.features}), got {tuple(inputs.shape)}"
            )
        if context is not None:
            require_tensor("context", context)
        check_context(context, self.context_features, optional=self.optional_context)
        if context is not None and context.shape[0] != inputs.shape[0]:
            raise ValueError(
                f"got {inputs.shape[0]} rows of inputs, but {context.shape[0]} of the context"
            )
        return like_weights(inputs, self)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return (
            f"features={self.features}, context_features={self.context_features}, "
            f"optional_context={self.optional_context}"
        )
