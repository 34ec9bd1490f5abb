"""One residual branch for every library: plain modules, frozen weights, counted evaluations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nflows_iresnet.nn import Mixed, Sine, SmoothAbs


class _Values(nn.Module):
    """The values of an activation of this library, without its slopes."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, inputs: Tensor) -> Tensor:
        return _values(self.activation, inputs)


def _values(activation: nn.Module, inputs: Tensor) -> Tensor:
    if isinstance(activation, Sine):
        return inputs.sin()
    if isinstance(activation, SmoothAbs):
        return torch.hypot(inputs, inputs.new_ones(())) - 1
    if isinstance(activation, Mixed):
        half = inputs.shape[-1] // 2
        first = _values(activation.first, inputs[..., :half])
        return torch.cat([first, _values(activation.second, inputs[..., half:])], dim=-1)
    values: Tensor = activation(inputs)
    return values


def values_of(activation: nn.Module) -> nn.Module:
    """Return an activation that spends nothing on slopes that a contestant does not use."""
    return _Values(activation)
