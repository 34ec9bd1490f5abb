"""Convolutional networks with a certified Lipschitz bound."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nflows_iresnet.nn.balanced import BalancedNet, default_activation, validated_hidden, widened
from nflows_iresnet.nn.bounds import conv_norm_bound
from nflows_iresnet.nn.conv import ConvFunction
from nflows_iresnet.nn.conv_layers import NormedConv2d
from nflows_iresnet.nn.conv_norms import ConvNorm, SymbolNorm
from nflows_iresnet.nn.convolution import PaddingMode, validated_padding_mode
from nflows_iresnet.validation import validated_size


class LipschitzCNN(BalancedNet):
    r"""A convolutional network g with Lip(g) <= coeff, for ANY stored weights and ANY image size.

    g(x; c) = W_n * a(... a(W_1 * x + b_1 + C_1 c) ...) + b_n + C_n c on images, starting and ending
    with a linear map. As in `LipschitzMLP` only the product of the norms is constrained, learned
    positive scales per channel balance neighbouring layers, and a context shifts every channel of
    every layer and stretches every hidden one. The norms bound the symbols of the convolutions, so
    the one certificate holds for images of every size, without state.

    With two hidden layers and a 1 x 1 kernel in the middle (the default) the trace of the Jacobian
    is exact and cheap, see `ConvLinearization`.

    Args:
        channels: number of input and output channels.
        hidden_channels: channels of each hidden layer.
        context_features: number of context values, or None.
        kernel_sizes: odd, one per layer: one more than `hidden_channels`.
        activation: a unit-wise activation, copied for each hidden layer and applied along the
            channels; by default `Mixed(Sine(), SmoothAbs())`.
        padding_mode: 'zeros' or 'circular'.
        context_hidden_features: widths of the hidden layers of the context's network.
        coeff: bound of the Lipschitz constant of the WHOLE network, in (0, 1).
        norm: the norm that the weights are divided by; `SymbolNorm()` by default.

    Raises:
        ValueError: if a size is not positive, a kernel is even, their number is not that of the
            layers, or `coeff` is not in (0, 1).

    References:
        Behrmann et al. Invertible residual networks, 2019 (convolutions of 3, 1 and 3 in a block).
        See `LipschitzMLP` and `conv_norms`.

    Example:
        >>> import torch
        >>> net = LipschitzCNN(3, [16, 16], coeff=0.9)
        >>> net(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 3, 8, 8])
        >>> net.lipschitz_bound() <= 0.9
        True
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: Sequence[int],
        context_features: int | None = None,
        *,
        kernel_sizes: Sequence[int] = (3, 1, 3),
        activation: nn.Module | None = None,
        padding_mode: PaddingMode = "zeros",
        context_hidden_features: Sequence[int] = (64, 64),
        coeff: float = 0.97,
        norm: ConvNorm | None = None,
    ) -> None:
        channels = validated_size("channels", channels)
        hidden = validated_hidden("hidden_channels", hidden_channels)
        if len(kernel_sizes) != len(hidden) + 1:
            raise ValueError(
                f"{len(hidden)} hidden layers need {len(hidden) + 1} kernel_sizes, got "
                f"{tuple(kernel_sizes)}"
            )
        activation = activation if activation is not None else default_activation()
        sizes = zip(
            [channels, *widened(hidden, activation)], [*hidden, channels], kernel_sizes, strict=True
        )
        super().__init__(
            [
                NormedConv2d(*size, padding_mode=padding_mode, norm=norm or SymbolNorm())
                for size in sizes
            ],
            hidden,
            channels,
            activation=activation,
            context_features=context_features,
            context_hidden_features=context_hidden_features,
            coeff=coeff,
        )
        self.channels = channels
        self.padding_mode = validated_padding_mode(padding_mode)

    def _function(
        self,
        weights: list[Tensor],
        shifts: list[Tensor],
        stretches: list[Tensor],
        lipschitz: float | None,
    ) -> ConvFunction:
        return ConvFunction(
            weights,
            [shift if shift.dim() == 1 else shift[:, :, None, None] for shift in shifts],
            list(self.activations),
            lipschitz,
            [stretch[:, None, None, :] for stretch in stretches],
            self.padding_mode,
        )

    def _norm_bound(self, weight: Tensor) -> float:
        return conv_norm_bound(weight)
