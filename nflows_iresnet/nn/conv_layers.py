"""Convolutional layers with a certified Lipschitz constant."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nflows_iresnet.nn.bounds import conv_norm_bound
from nflows_iresnet.nn.conv_norms import ConvNorm, ConvPowerIteration, SymbolNorm
from nflows_iresnet.nn.convolution import PaddingMode, convolve, validated_padding_mode
from nflows_iresnet.nn.layers import (
    NormedLayer,
    normalised,
    rounding_margin,
    validated_coeff,
)
from nflows_iresnet.validation import validated_size


class NormedConv2d(NormedLayer, nn.Conv2d):
    r"""A convolution that keeps the image's size and knows a norm of its weight, but uses none.

    The building block of networks that normalise several layers together.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: odd.
        bias: whether to add a bias.
        padding_mode: 'zeros' or 'circular'.
        norm: the strategy for the operator norm.
    """

    padding_mode: PaddingMode

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        norm: ConvNorm,
    ) -> None:
        size = validated_kernel_size(kernel_size)
        super().__init__(
            validated_size("in_channels", in_channels),
            validated_size("out_channels", out_channels),
            size,
            padding=size // 2,
            bias=bias,
            padding_mode=validated_padding_mode(padding_mode),
        )
        if isinstance(norm, ConvPowerIteration) and norm.padding_mode != padding_mode:
            raise ValueError(
                f"the layer has padding_mode {padding_mode!r}, but its norm iterates with "
                f"{norm.padding_mode!r}; give {norm} the same"
            )
        self._adopt(norm, ConvNorm)


def validated_kernel_size(kernel_size: int) -> int:
    """Return the size of a kernel if it is odd."""
    if validated_size("kernel_size", kernel_size) % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd, got {kernel_size}: an even kernel has no centre, so it "
            "cannot keep the size of an image"
        )
    return int(kernel_size)


class LipschitzConv2d(NormedConv2d):
    r"""x -> W * x + b with \|W *\| <= coeff at every moment, for images of every size.

    W = V min(1, coeff / norm(V)) of the stored V, with stride 1 and a padding that keeps the size.
    Stateless: the stored weight V may be anything, at any time, in any mode; the weight used is
    computed from it in each call, whatever the size of the images.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: odd.
        bias: whether to add a bias.
        padding_mode: 'zeros' or 'circular'.
        coeff: the bound, in (0, 1).
        norm: an upper bound of the operator norm; `SymbolNorm()` by default. With
            `ConvPowerIteration` nothing is guaranteed.

    Raises:
        ValueError: if `coeff` is not in (0, 1), the kernel is even, or the padding mode is another.

    Example:
        >>> layer = LipschitzConv2d(3, 4, 3, coeff=0.9)
        >>> with torch.no_grad():
        ...     _ = layer.weight.mul_(1e6)
        >>> layer(torch.zeros(2, 3, 8, 5)).shape
        torch.Size([2, 4, 8, 5])
        >>> layer.lipschitz_bound() <= 0.9
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        *,
        padding_mode: PaddingMode = "zeros",
        coeff: float = 0.97,
        norm: ConvNorm | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            bias=bias,
            padding_mode=padding_mode,
            norm=norm or SymbolNorm(),
        )
        self.coeff = validated_coeff(coeff)

    def effective_weight(self) -> Tensor:
        """Return W, the weight that is used, shape (out, in, k, k)."""
        log_target = math.log(self.coeff * rounding_margin(self.weight))
        (weight,), factor = normalised([[self]], log_target)
        return weight[0] * factor

    def forward(self, input: Tensor) -> Tensor:
        """Return W * x + b, shape (B, out, H, W)."""
        return convolve(input, self.effective_weight(), self.padding_mode, self.bias)

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        """Return a certified upper bound of the norm of the convolution that is used."""
        return conv_norm_bound(self.effective_weight())

    def extra_repr(self) -> str:
        """Show the sizes, the norm and the coefficient."""
        return f"{super().extra_repr()}, coeff={self.coeff}"
