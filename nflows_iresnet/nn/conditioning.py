"""How a context enters: a small network, and scales that no value of the context makes infinite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_MAX_LOG_SCALE = 7.0
_INITIAL_GAIN = 0.1


def bounded_exp(log_scale: Tensor) -> Tensor:
    """Return exp(log_scale), kept between exp(-7) and exp(7)."""
    return log_scale.clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE).exp()


def context_mlp(context_features: int, hidden_features: Sequence[int], outputs: int) -> nn.Module:
    """Return a network of a context (B, context_features) whose outputs start near zero.

    Args:
        context_features: number of context values.
        hidden_features: widths of its hidden layers.
        outputs: number of outputs.
    """
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
