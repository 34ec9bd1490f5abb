"""Norms and linearisations of convolutions with one bug each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_iresnet import nn
from nflows_iresnet.nn.cnn import ConvLinearization, Regions, regions_of
from nflows_iresnet.nn.conv_norms import between_frequencies
from nflows_iresnet.nn.convolution import convolve


@dataclass(frozen=True)
class GridAlone(nn.FourierNorm):
    """Forgets what lies between the frequencies of the grid."""

    def value_and_gradient(self, weight: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        value, gradient = super().value_and_gradient(weight, state)
        excess = between_frequencies(3, self.oversampling or 32) ** 2
        return value / excess, gradient / excess


@dataclass(frozen=True)
class Reshaped(nn.FourierNorm):
    """The spectral norm of the kernel as a matrix (out, in k^2), as some libraries use it."""

    def value_and_gradient(self, weight: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        value, gradient = nn.SpectralNorm().value_and_gradient(weight.flatten(-3), state)
        return value, gradient.view_as(weight)


@dataclass(frozen=True)
class NoLags(nn.FourierNorm):
    """Sums the kernel: the symbol at frequency zero alone."""

    def value_and_gradient(self, weight: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        value, gradient = nn.SpectralNorm().value_and_gradient(weight.sum((-2, -1)), state)
        return value, gradient[..., None, None].expand_as(weight)


class TraceWithoutBorder(ConvLinearization):
    """Takes all pixels for interior ones."""

    def _regions(self, kernel: Tensor) -> Regions:
        where = self.value.shape[2:], kernel.shape[2:], "circular"
        return regions_of(*where, self.value.dtype, self.value.device)


class TraceWithoutReflection(ConvLinearization):
    """Multiplies equal entries of the first and last kernel, instead of opposite ones."""

    def trace(self) -> Tensor:
        weights = [*self._weights[:-1], self._weights[-1].flip(2, 3)]
        twin = ConvLinearization(self.value, weights, self._slopes, self._padding_mode)
        return twin.trace()


class AdjointWithoutReflection(ConvLinearization):
    """Transposes the channels of kernels, and does not turn them around."""

    def vjp(self, cotangent: Tensor) -> Tensor:
        kernels = [weight.transpose(0, 1) for weight in self._weights]
        product = convolve(cotangent, kernels[-1], self._padding_mode)
        for kernel, slope in zip(kernels[-2::-1], self._slopes[::-1], strict=True):
            product = convolve(product * slope, kernel, self._padding_mode)
        return product


class SlopesInTheWrongOrder(ConvLinearization):
    """Applies D_1 where D_2 belongs."""

    def jvp(self, tangent: Tensor) -> Tensor:
        slopes = list(reversed(self._slopes))
        twin = ConvLinearization(self.value, self._weights, slopes, self._padding_mode)
        return twin.jvp(tangent)


class RowsMixedInTheJacobian(ConvLinearization):
    """Unfolds tangents and rows in the wrong order."""

    def jacobian(self) -> Tensor:
        jacobian = super().jacobian()
        return torch.cat([jacobian[1:], jacobian[:1]])
