"""Convolutions that keep the size of an image, and their adjoints."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_iresnet.linearization import is_traced
from nflows_iresnet.tensor_float import conv2d, conv2d_weight

PaddingMode = Literal["zeros", "circular"]


def validated_padding_mode(padding_mode: PaddingMode) -> PaddingMode:
    """Return a padding mode if it is one for which norms are certified here."""
    if padding_mode not in get_args(PaddingMode):
        raise ValueError(
            f"padding_mode must be 'zeros' or 'circular', got {padding_mode!r}: padding that "
            "repeats values in another way has another norm"
        )
    return padding_mode


def half_widths(weight: Tensor) -> tuple[int, int]:
    """Return (m_1, m_2) of a weight (out, in, 2 m_1 + 1, 2 m_2 + 1)."""
    return weight.shape[2] // 2, weight.shape[3] // 2


def padded(inputs: Tensor, weight: Tensor, padding_mode: PaddingMode) -> Tensor:
    """Return an image with the margin that a kernel needs to keep its size."""
    rows, columns = half_widths(weight)
    if rows == columns == 0:
        return inputs
    if padding_mode == "circular" and (rows > inputs.shape[-2] or columns > inputs.shape[-1]):
        raise ValueError(
            f"circular padding by ({rows}, {columns}) pixels would wrap around an image of "
            f"{tuple(inputs.shape[-2:])} more than once; use a smaller kernel or padding with zeros"
        )
    mode = "circular" if padding_mode == "circular" else "constant"
    return F.pad(inputs, (columns, columns, rows, rows), mode=mode)


def convolve(
    inputs: Tensor, weight: Tensor, padding_mode: PaddingMode, bias: Tensor | None = None
) -> Tensor:
    """Return the convolution of images (B, in, H, W) with an odd kernel: (B, out, H, W).

    On the CPU 1 x 1 kernels, and kernels that end in few channels, are products of matrices, which
    take a third to two thirds of the time of torch's convolution there, with their gradients.
    """
    if inputs.device.type == "cpu" and not is_traced():
        if weight.shape[2:].numel() == 1:
            return _with_bias(_pointwise(inputs, weight.flatten(start_dim=1)), bias)
        is_thin = weight[:, 0].numel() <= weight.shape[1]
        if is_thin and padding_mode == "zeros":
            return _with_bias(_scattered(inputs, weight), bias)
    if padding_mode == "zeros":
        return conv2d(inputs, weight, bias, padding=half_widths(weight))
    return conv2d(padded(inputs, weight, padding_mode), weight, bias)


def _with_bias(outputs: Tensor, bias: Tensor | None) -> Tensor:
    return outputs if bias is None else outputs + bias[:, None, None]


def _as_columns(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) as (B, C, H W); not by `flatten`, which batched gradients lack."""
    return images.reshape(*images.shape[:2], images.shape[2:].numel())


def _pointwise(inputs: Tensor, matrix: Tensor) -> Tensor:
    """Apply a matrix (out, in) to every pixel."""
    pixels = torch.bmm(matrix.expand(len(inputs), -1, -1), _as_columns(inputs))
    return pixels.view(len(inputs), len(matrix), *inputs.shape[2:])


def _scattered(inputs: Tensor, weight: Tensor) -> Tensor:
    """Convolve by what each pixel adds to its neighbours: one product, then one sum over entries.

    Entry a of the kernel links output p to input p + a, so input q gives to output q - a.
    """
    _, in_channels, rows, columns = weight.shape
    spread = weight.flip(2, 3).movedim(1, -1).reshape(-1, in_channels)
    given = torch.bmm(spread.expand(len(inputs), -1, -1), _as_columns(inputs))
    return F.fold(given, inputs.shape[2:], (rows, columns), padding=half_widths(weight))


def adjoint_kernel(weight: Tensor) -> Tensor:
    """Return the kernel of the transposed convolution, shape (in, out, k_1, k_2).

    With an odd kernel and an unchanged size, entry a links position p to p + a; its transpose links
    p + a to p, which is entry -a. This holds for both kinds of padding.
    """
    transposed = weight.transpose(0, 1)
    return transposed if weight.shape[2:].numel() == 1 else transposed.flip(2, 3)


def kernel_gradient(
    of_outputs: Tensor, inputs: Tensor, weight: Tensor, padding_mode: PaddingMode
) -> Tensor:
    """Return the derivative of <v, W * x> in the kernel W, (out, in, k_1, k_2).

    Args:
        of_outputs: v, shape (B, out, H, W).
        inputs: x, shape (B, in, H, W).
        weight: W, of which the shape counts alone.
        padding_mode: of the convolution.
    """
    if inputs.device.type == "cpu" and weight.shape[2:].numel() == 1:
        pairs = torch.bmm(_as_columns(of_outputs), _as_columns(inputs).mT)
        return pairs.sum(0)[:, :, None, None]
    padding = half_widths(weight) if padding_mode == "zeros" else (0, 0)
    images = inputs if padding_mode == "zeros" else padded(inputs, weight, padding_mode)
    return conv2d_weight(of_outputs, images, weight, padding)
