"""Convolutional networks with a certified Lipschitz bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nflows_iresnet.constants import made_once
from nflows_iresnet.linearization import ForwardLinearization, Linearization, is_traced
from nflows_iresnet.nn.activations import widening_of
from nflows_iresnet.nn.base import (
    Evaluation,
    LayeredFunction,
    LayeredNet,
    validated_activation,
    validated_hidden,
)
from nflows_iresnet.nn.bounds import conv_norm_bound
from nflows_iresnet.nn.conv_norms import ConvNorm, FourierNorm
from nflows_iresnet.nn.convolution import (
    PaddingMode,
    adjoint_kernel,
    convolve,
    half_widths,
    kernel_gradient,
    validated_padding_mode,
)
from nflows_iresnet.nn.fused import FusedLinearization, can_fuse
from nflows_iresnet.nn.layers import NormedConv2d
from nflows_iresnet.precision import require_precision
from nflows_iresnet.validation import validated_size


class LipschitzCNN(LayeredNet):
    r"""A convolutional network g with Lip(g) <= coeff, for ANY stored weights and ANY image size.

    g(x; c) = W_n * a(... a(W_1 * x + b_1 + C_1 c) ...) + b_n + C_n c on images, starting and ending
    with a linear map. As in `LipschitzMLP` only the product of the norms is constrained, learned
    positive scales per channel balance neighbouring layers, and a context shifts every channel of
    every layer and stretches every hidden one. The norms bound the symbols of the convolutions, so
    the one certificate holds for images of every size, without state. Proof:
    docs/guarantees.md#one-budget-for-the-layers-of-a-network.

    With two hidden layers and a 1 x 1 kernel in the middle (the default kernels) the trace of the
    Jacobian is exact and cheap, see `ConvLinearization`.

    References:
        Behrmann et al. Invertible residual networks, 2019 (convolutions of 3, 1 and 3 in a block).
        See `LipschitzMLP` and `conv_norms`.

    Args:
        channels: number of input and output channels.
        hidden_channels: channels of each hidden layer.
        context_features: number of context values, or None.
        kernel_sizes: odd, one per layer: one more than `hidden_channels`. By default 3 at both ends
            and 1 between.
        activation: a unit-wise activation, copied for each hidden layer and applied along the
            channels; by default `Mixed(Sine(), SmoothAbs())`.
        padding_mode: 'zeros' or 'circular'.
        context_hidden_features: widths of the hidden layers of the context's network.
        coeff: bound of the Lipschitz constant of the WHOLE network, in (0, 1).
        norm: the norm that the weights are divided by; `FourierNorm()` by default.
        optional_context: whether a network with a context works without one, too: as another
            function. By default a forgotten context is an error.

    Raises:
        ValueError: if a size is not positive, a kernel is even, their number is not that of the
            layers, or `coeff` is not in (0, 1).

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
        kernel_sizes: Sequence[int] | None = None,
        activation: nn.Module | None = None,
        padding_mode: PaddingMode = "zeros",
        context_hidden_features: Sequence[int] = (64, 64),
        coeff: float = 0.97,
        norm: ConvNorm | None = None,
        optional_context: bool = False,
    ) -> None:
        channels = validated_size("channels", channels)
        hidden = validated_hidden("hidden_channels", hidden_channels)
        kernels = _validated_kernel_sizes(kernel_sizes, len(hidden) + 1)
        activation = validated_activation(activation)
        norm = norm if norm is not None else FourierNorm()
        fed = [channels, *(width * widening_of(activation) for width in hidden)]
        sizes = zip(fed, [*hidden, channels], kernels, strict=True)
        super().__init__(
            [NormedConv2d(*size, padding_mode=padding_mode, norm=norm) for size in sizes],
            hidden,
            channels,
            activation=activation,
            coeff=coeff,
            context_features=context_features,
            context_hidden_features=context_hidden_features,
            optional_context=optional_context,
        )
        self.channels = channels
        self.padding_mode = validated_padding_mode(padding_mode)

    def function(
        self,
        weights: list[Tensor],
        shifts: list[Tensor],
        stretches: list[Tensor],
        lipschitz: float | None,
    ) -> ConvFunction:
        """Return g for weights (out, in, k, k), shifts (out,) or (B, out), stretches (B, out)."""
        return ConvFunction(
            weights,
            [shift if shift.dim() == 1 else shift[:, :, None, None] for shift in shifts],
            list(self.activations),
            lipschitz,
            [stretch[:, None, None, :] for stretch in stretches],
            self.padding_mode,
        )

    def norm_bound(self, weight: Tensor) -> float:
        """Return a certified upper bound of the norm on images of every size."""
        return conv_norm_bound(weight)

    def settings(self) -> Mapping[str, object]:
        """Return what the function depends on beside its weights."""
        return {**super().settings(), "padding_mode": self.padding_mode}


def _validated_kernel_sizes(kernel_sizes: Sequence[int] | None, num_layers: int) -> Sequence[int]:
    """Return one kernel size for each layer; by default 3 at both ends and 1 between."""
    if kernel_sizes is None:
        return [3 if index in (0, num_layers - 1) else 1 for index in range(num_layers)]
    if not isinstance(kernel_sizes, Sequence) or len(kernel_sizes) != num_layers:
        raise ValueError(
            f"{num_layers - 1} hidden layers need {num_layers} kernel_sizes, got {kernel_sizes!r}"
        )
    return kernel_sizes


@dataclass(frozen=True)
class ConvFunction(LayeredFunction):
    """g(x) = W_n * a(... a(W_1 * x + b_1) ...) + b_n on images (B, channels, H, W).

    See `LayeredFunction`: weights (out, in, k_1, k_2) with odd kernels, shifts (out,) or
    (B, out, 1, 1), stretches (B, 1, 1, hidden).

    Attributes:
        padding_mode: 'zeros' or 'circular'.
    """

    padding_mode: PaddingMode = "zeros"

    def affine(self, inputs: Tensor, index: int) -> Tensor:
        """Return W * x + b."""
        weight, shift = self.weights[index], self.shifts[index]
        if index == 0 and (inputs.dim() != 4 or inputs.shape[1] != weight.shape[1]):
            raise ValueError(
                f"expected images of shape (batch, {weight.shape[1]}, height, width), got "
                f"{tuple(inputs.shape)}"
            )
        if index == 0:
            require_precision(inputs, weight.dtype, "images")
        if shift.dim() == 1:
            return convolve(inputs, weight, self.padding_mode, shift)
        return convolve(inputs, weight, self.padding_mode) + shift

    def push(self, tangents: Tensor, index: int) -> Tensor:
        """Return W * t, (k, B, in, H, W) -> (k, B, out, H, W)."""
        return self._convolved(tangents, self.weights[index])

    def pull(self, cotangents: Tensor, index: int) -> Tensor:
        """Return the adjoint of the convolution, (k, B, out, H, W) -> (k, B, in, H, W)."""
        return self._convolved(cotangents, adjoint_kernel(self.weights[index]))

    def _convolved(self, images: Tensor, weight: Tensor) -> Tensor:
        outputs = convolve(_together(images), weight, self.padding_mode)
        return outputs.view(*images.shape[:2], *outputs.shape[1:])

    def outer(self, pairs: Sequence[tuple[Tensor, Tensor]], index: int) -> Tensor:
        """Return the derivative of sum <v, W * t> in the kernel, shape (out, in, k_1, k_2)."""
        kernel = self.weights[index]
        found = [
            kernel_gradient(_together(v), _together(t), kernel, self.padding_mode)
            for v, t in pairs
            if v.shape[0] > 0
        ]
        return found[0] if len(found) == 1 else found[0] + found[1]

    def linearize(self, inputs: Tensor) -> Linearization:
        """Return g at `inputs`: as one node of the graph where that is possible, see `fused`."""
        if inputs.dim() == 4 and can_fuse(self):
            return FusedConvLinearization(self, inputs)
        return super().linearize(inputs)

    def structured(self, evaluation: Evaluation) -> Linearization:
        """Return the linearisation by the slopes."""
        weights, slopes = self.widened_weights(), evaluation.slopes
        return ConvLinearization(evaluation.value, weights, slopes, self.padding_mode)

    def units_last(self, values: Tensor) -> Tensor:
        """Move the channels to the end."""
        return values.movedim(1, -1)

    def units_back(self, values: Tensor) -> Tensor:
        """Undo `units_last`."""
        return values.movedim(-1, 1)


class ConvLinearization(ForwardLinearization):
    r"""J = W_n D_{n-1} W_{n-1} ... D_1 W_1, W_i convolutions, D_i the diagonal slopes, saved.

    **Trace.** With Q_a = W_1[a] W_n[-a], the products of the matrices of opposite kernel entries,
    (W_1 W_n) maps a pixel p to itself by the sum of Q_a over the entries a that do not leave the
    image: those are the same for all pixels of the interior, and of each strip and corner of the
    border, so the image is a few rectangles R with one matrix Q_R each (one rectangle alone for
    circular padding). For one hidden layer,

        tr J = sum_R sum_{p in R} <diag Q_R, D_1(p)>,

    and for two, with a 1 x 1 convolution W_2 between them,

        tr J = sum_R sum_{p in R} D_2(p)^T (W_2 o Q_R^T) D_1(p).

    Cost: `vjp` and `jvp` are one pass of convolutions; `jacobian` is channels * H * W of them, in
    chunks. `trace` visits each pixel once, as much as the convolution W_2, after k^2 products of
    weights per batch. `has_cheap_trace` says whether this holds: at most one hidden layer, or two
    with a 1 x 1 convolution between; with circular padding not where the image is smaller than the
    kernels reach around it. Elsewhere `trace` takes the whole Jacobian.

    Args:
        value: g(x), shape (B, channels, H, W).
        weights: W_i, shapes (out, in, k_1, k_2), odd kernels.
        slopes: a'(z_i), shapes (B, hidden, H, W).
        padding_mode: 'zeros' or 'circular'.
    """

    _adjoints: list[Tensor] | None = None

    def __init__(
        self,
        value: Tensor,
        weights: Sequence[Tensor],
        slopes: Sequence[Tensor],
        padding_mode: PaddingMode = "zeros",
    ) -> None:
        self.value = value
        self._weights = weights
        self._slopes = slopes
        self._padding_mode = padding_mode
        self.has_cheap_trace = self._has_structured_trace(value.shape)

    def _has_structured_trace(self, shape: torch.Size) -> bool:
        middle = self._weights[1:-1]
        is_local = len(middle) == 0 or (len(middle) == 1 and middle[0].shape[2:].numel() == 1)
        return is_local and not self._wraps_around(shape)

    def _wraps_around(self, shape: torch.Size) -> bool:
        """Whether two different entries of first and last kernel can reach the same pixel."""
        ends = [self._weights[0], *self._weights[1:][-1:]]
        reach = [sum(each) for each in zip(*map(half_widths, ends), strict=True)]
        too_small = [far >= size for far, size in zip(reach, shape[2:], strict=True)]
        return self._padding_mode == "circular" and any(too_small)

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Return J^T v = W_1^T D_1 ... W_n^T v."""
        *others, last = self._adjoint_kernels()
        product = self._convolve(cotangent, last)
        for weight, slope in zip(others[::-1], self._slopes[::-1], strict=True):
            product = self._convolve(product * slope, weight)
        return product

    def _adjoint_kernels(self) -> list[Tensor]:
        """Return the kernels of W_i^T; those without a graph are kept for the next product."""
        if torch.is_grad_enabled() or is_traced():
            return list(map(adjoint_kernel, self._weights))
        self._adjoints = self._adjoints or list(map(adjoint_kernel, self._weights))
        return self._adjoints

    def jvp(self, tangent: Tensor) -> Tensor:
        """Return J v = W_n ... D_1 W_1 v."""
        product = self._convolve(tangent, self._weights[0])
        for weight, slope in zip(self._weights[1:], self._slopes, strict=True):
            product = self._convolve(product * slope, weight)
        return product

    def _convolve(self, inputs: Tensor, weight: Tensor) -> Tensor:
        return convolve(inputs, weight, self._padding_mode)

    def jacobian(self) -> Tensor:
        """Return J, shape (B, D, D) with D = channels * H * W, from many tangents at once."""
        shape, size = self.value.shape[1:], self.value.shape[1:].numel()
        identity = torch.eye(size, dtype=self.value.dtype, device=self.value.device)
        widest = max([slope.shape[1:].numel() for slope in self._slopes], default=size)
        rows = 1 if is_traced() else max(1, self.value.shape[0])  # which may be a symbol
        count = max(1, _CHUNK_ELEMENTS // (rows * widest))
        chunks = [self._columns(basis.reshape(-1, *shape)) for basis in identity.split(count)]
        return torch.cat(chunks, dim=1).mT

    def _columns(self, basis: Tensor) -> Tensor:
        """Return J e for tangents e (K, channels, H, W) shared by the rows: (B, K, D)."""
        batch = self.value.shape[0]
        columns = self._convolve(basis, self._weights[0]).expand(batch, -1, -1, -1, -1)
        for weight, slope in zip(self._weights[1:], self._slopes, strict=True):
            product = self._convolve((columns * slope[:, None]).flatten(0, 1), weight)
            columns = product.unflatten(0, (batch, basis.shape[0]))
        return columns.flatten(start_dim=2)

    def trace(self) -> Tensor:
        """Return tr J, shape (B,)."""
        if not self.has_cheap_trace:
            return super().trace()
        if len(self._slopes) == 0:
            row, column = half_widths(self._weights[0])
            pixels = self.value.shape[2:].numel()
            return (pixels * self._weights[0][:, :, row, column].trace()).expand(
                self.value.shape[0]
            )
        return self._one_hidden() if len(self._slopes) == 1 else self._two_hidden()

    def _one_hidden(self) -> Tensor:
        first, last = _opposite_entries(self._weights[0], self._weights[-1])
        of_entries = (first * last.transpose(0, 1)).sum(1).flatten(start_dim=1)
        of_pixels = of_entries @ self._regions(first).inside
        return self._slopes[0].flatten(start_dim=1) @ of_pixels.flatten()

    def _two_hidden(self) -> Tensor:
        first, last = _opposite_entries(self._weights[0], self._weights[-1])
        entries = torch.einsum("hcij,cgij->ijgh", first, last).flatten(0, 1)
        middle, regions = self._weights[1].flatten(start_dim=1), self._regions(first)
        couplings = middle * (regions.seen @ entries.flatten(start_dim=1)).view(-1, *middle.shape)
        before, after = [slope[:, :, regions.rows, regions.columns] for slope in self._slopes]
        coupled = before.movedim(1, -1).flatten(0, 2) @ couplings[0].mT
        total = (coupled.view_as(after.movedim(1, -1)) * after.movedim(1, -1)).sum((1, 2, 3))
        if len(couplings) == 1:
            return total
        before, after = [
            slope.flatten(start_dim=2)[:, :, regions.border].permute(2, 3, 0, 1)
            for slope in self._slopes
        ]
        coupled = torch.bmm(before.flatten(1, 2), couplings[1:].mT).view_as(after)
        of_pixels = (coupled * after).sum(3).flatten(0, 1)
        return total + torch.mv(of_pixels.mT, regions.is_pixel.flatten())

    def _regions(self, kernel: Tensor) -> Regions:
        """Return the regions of the image for a kernel (out, in, k_1, k_2)."""
        where: Any = self.value.shape[2:], kernel.shape[2:], self._padding_mode
        like = self.like
        is_plain = type(like) is Tensor and not like.is_meta and not is_traced()
        make: Any = regions_of if is_plain else _made_regions
        found: Regions = make(*where, like.dtype, like.device)
        return found


class Regions(NamedTuple):
    """The rectangles of an image whose pixels see the same entries of a kernel: the largest first.

    Attributes:
        inside: 1 where an entry does not leave the image, shape (k_1 k_2, H W).
        seen: the same for one pixel of each rectangle, shape (regions, k_1 k_2).
        rows: of the largest.
        columns: of the largest.
        border: the pixels of each other rectangle, all as many by repetition, (regions - 1, n).
        is_pixel: 0 for those that only fill up, of the same shape.
    """

    inside: Tensor
    seen: Tensor
    rows: slice
    columns: slice
    border: Tensor
    is_pixel: Tensor


@torch.inference_mode(False)
def _made_regions(
    size: tuple[int, int],
    kernel: tuple[int, int],
    padding_mode: PaddingMode,
    dtype: torch.dtype,
    device: torch.device,
) -> Regions:
    """Return the regions of images (H, W) for an odd kernel (k_1, k_2)."""
    runs, masks = [], []
    for length, entries in zip(size, kernel, strict=True):
        half = entries // 2
        steps = range(-half, half + 1)
        is_inside = [
            [padding_mode == "circular" or 0 <= position + step < length for step in steps]
            for position in range(length)
        ]
        alike = [list(run) for _, run in groupby(range(length), is_inside.__getitem__)]
        runs.append(sorted(alike, key=len, reverse=True))
        reached = torch.arange(length, device=device)[:, None] + torch.arange(
            -half, half + 1, device=device
        )
        mask = (reached >= 0) & (reached < length) | (padding_mode == "circular")
        masks.append(mask.to(dtype))
    inside = torch.einsum("ya,xb->abyx", *masks).flatten(0, 1).flatten(1)
    tiles = [(rows, columns) for rows in runs[0] for columns in runs[1]]
    corners = [rows[0] * size[1] + columns[0] for rows, columns in tiles]
    index = torch.arange(
        max([len(rows) * len(columns) for rows, columns in tiles[1:]], default=0), device=device
    )
    is_pixel: list[Tensor] = []
    border: list[Tensor] = []
    for corner, (rows, columns) in zip(corners[1:], tiles[1:], strict=True):
        is_pixel.append(index < len(rows) * len(columns))
        place = torch.where(is_pixel[-1], index, 0)
        row = torch.div(place, len(columns), rounding_mode="floor")
        border.append(corner + row * size[1] + place % len(columns))
    return Regions(
        inside=inside,
        seen=torch.stack([inside[:, corner] for corner in corners]),
        rows=slice(runs[0][0][0], runs[0][0][-1] + 1),
        columns=slice(runs[1][0][0], runs[1][0][-1] + 1),
        border=torch.stack(border) if border else index[None, :],
        is_pixel=(torch.stack(is_pixel) if is_pixel else index[None, :]).to(dtype),
    )


regions_of = made_once(64)(_made_regions)


def _together(images: Tensor) -> Tensor:
    """Return several images of each row, (k, B, channels, H, W), as (k B, channels, H, W)."""
    return images.reshape(-1, *images.shape[2:])


class FusedConvLinearization(FusedLinearization, ConvLinearization):  # type: ignore[override]
    """The linearisation of a convolutional network, with what is differentiated in one node."""

    def __init__(self, function: ConvFunction, inputs: Tensor) -> None:
        FusedLinearization.__init__(self, function, inputs)
        self._weights = function.weights
        self._padding_mode = function.padding_mode
        self.has_cheap_trace = self._has_structured_trace(inputs.shape)


_CHUNK_ELEMENTS = 2**24
"""Tangents are pushed forward together up to this many hidden values."""


def _opposite_entries(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return first[a] and last[-a] for the entries a that both kernels have."""
    return _cropped(first, last), _cropped(last.flip(2, 3), first)


def _cropped(kernel: Tensor, other: Tensor) -> Tensor:
    for dim in (2, 3):
        excess = kernel.shape[dim] - other.shape[dim]
        if excess > 0:
            kernel = kernel.narrow(dim, excess // 2, other.shape[dim])
    return kernel
