"""A small certified convolution for tests of image flows, where the library has none yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nflows_iresnet import nn as lipschitz_nn


class SmallConvolution(nn.Module):
    """g = c k * tanh(K * x) with both kernels of norm 1 by the sum of their entries' magnitudes."""

    def __init__(
        self,
        channels: int,
        hidden_channels: Sequence[int],
        context_features: int | None = None,
        *,
        kernel_sizes: Sequence[int] = (3, 1, 3),
        activation: nn.Module | None = None,
        coeff: float = 0.97,
    ) -> None:
        super().__init__()
        del context_features, activation
        self.lipschitz = coeff
        widths = [channels, *hidden_channels, channels]
        self.kernels = nn.ParameterList(
            torch.randn(after, before, size, size)
            for before, after, size in zip(widths[:-1], widths[1:], kernel_sizes, strict=True)
        )
        self.biases = nn.ParameterList(torch.zeros(width) for width in widths[1:])

    def forward(self, inputs: Tensor) -> Tensor:
        values = inputs
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            bound = (kernel.abs().sum((0, 2, 3)).max() * kernel.abs().sum((1, 2, 3)).max()).sqrt()
            values = nn.functional.conv2d(
                torch.tanh(values), kernel / bound, bias, padding=kernel.shape[-1] // 2
            )
        return self.lipschitz * values

    def lipschitz_bound(self) -> float:
        return self.lipschitz


def provide_convolution() -> None:
    """Make `nn.LipschitzCNN` importable where it does not exist."""
    if not hasattr(lipschitz_nn, "LipschitzCNN"):
        setattr(lipschitz_nn, "LipschitzCNN", SmallConvolution)  # noqa: B010
