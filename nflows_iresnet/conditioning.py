"""How a context enters: checked, through a small network, as scales that stay finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

MAX_LOG_SCALE = 7.0
"""Bound of the logarithm of a scale."""
_INITIAL_GAIN = 0.1


def bounded_exp(log_scale: Tensor) -> Tensor:
    """Return exp(log_scale), kept between exp(-7) and exp(7)."""
    return log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp()


def context_mlp(context_features: int, hidden_features: Sequence[int], outputs: int) -> nn.Module:
    """Return a network of a context (B, context_features) whose outputs start near zero.

    Args:
        context_features: number of context values.
        hidden_features: widths of its hidden layers.
        outputs: number of outputs.
    """
    if isinstance(hidden_features, str) or not isinstance(hidden_features, Sequence):
        raise ValueError(
            f"hidden_features must be a sequence, [64] for one, got {hidden_features!r}"
        )
    layers: list[nn.Module] = []
    width = context_features
    for hidden in hidden_features:
        layers += [nn.Linear(width, hidden), nn.SiLU()]
        width = hidden
    last = nn.Linear(width, outputs)
    with torch.no_grad():
        last.weight.mul_(_INITIAL_GAIN)
        last.bias.zero_()
    return nn.Sequential(*layers, last)


def check_context(
    context: Tensor | None, context_features: int | None, *, optional: bool = False
) -> None:
    """Raise unless a context is what the model was built for.

    Args:
        context: shape (B, context_features), or None.
        context_features: number of context values, None for a model without.
        optional: whether a model with context may be called without one.

    Raises:
        ValueError: if a context is missing, has another shape, or is given to a model without.
    """
    if context is None:
        if context_features is not None and not optional:
            raise ValueError(
                f"this model was built with context_features={context_features}, but no context "
                "was given: without one it would be another density. Pass context=..., or build "
                "it with optional_context=True if it shall work without, too"
            )
        return
    if context_features is None:
        raise ValueError(
            f"a context of shape {tuple(context.shape)} was given to a model without: build it "
            "with context_features=..."
        )
    if context.dim() != 2 or context.shape[1] != context_features:
        raise ValueError(
            f"the context must have shape (batch, {context_features}), got {tuple(context.shape)}"
        )
