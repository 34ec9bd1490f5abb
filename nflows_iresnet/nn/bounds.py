"""Certified upper bounds of the Lipschitz constant of a network, from its weights as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from nflows_iresnet.linearization import run_weight_hooks
from nflows_iresnet.nn.activations import constant_of
from nflows_iresnet.nn.conv_norms import (
    OVERSAMPLINGS,
    between_frequencies,
    grid_size,
    symbol_rounding,
)
from nflows_iresnet.nn.convolution import PaddingMode
from nflows_iresnet.tensor_float import in_full_products


@in_full_products()
@torch.no_grad()
def spectral_norm_bound(weight: Tensor) -> float:
    r"""Return an upper bound of \|W\|_2 of a matrix, tight to rounding.

    The largest singular value in float64, times 1 + 32 max(out, in) eps for the rounding of the
    decomposition (whose backward error is a small multiple of eps \|W\|_2).

    Args:
        weight: shape (out, in), any floating dtype.

    Raises:
        ValueError: if the weight has entries that are not finite.
    """
    _require_finite(weight)
    norm = torch.linalg.matrix_norm(weight.double(), ord=2)
    return float(norm) * (1 + 32 * max(weight.shape) * torch.finfo(torch.float64).eps)


def _require_finite(weight: Tensor) -> None:
    if not bool(weight.isfinite().all()):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has entries that are not finite, so no "
            "Lipschitz bound exists; training has diverged: lower the learning rate or clip "
            "gradients"
        )


@in_full_products()
@torch.no_grad()
def conv_norm_bound(weight: Tensor) -> float:
    r"""Return an upper bound of the norm of a convolution on images of every size.

    The norm of the symbol S(t) = sum_a W_a exp(-i <a, t>) in float64 on nested grids of
    frequencies, each with the factor for what lies between its frequencies (see `conv_norms`), and
    of these bounds the smallest; at most 1 % above the supremum of the symbol. Valid for zero
    padding of any kind, stride and dilation (each only crops or selects values of the infinite
    convolution), and for circular padding. The weight is divided by its largest entry before, so
    that no square over- or underflows.

    Cost: eigenvalues of 128 (k - 1)^2 Hermitian matrices of size min(out, in).

    Args:
        weight: shape (out, in, k_1, k_2), any floating dtype.

    Raises:
        ValueError: if the weight has entries that are not finite.
    """
    if weight.shape[2:].numel() == 1:
        return spectral_norm_bound(weight[:, :, 0, 0])
    _require_finite(weight)
    largest = max(float(weight.abs().max()), torch.finfo(torch.float64).tiny)
    norms = _symbol_norms(weight.double() / largest)
    finest = max(OVERSAMPLINGS)
    bounds = [
        largest
        * float(norms[:: finest // each, :: finest // each].max())
        * math.prod(between_frequencies(size, each) for size in weight.shape[2:])
        for each in OVERSAMPLINGS
    ]
    return min(bounds) * symbol_rounding(weight, 32)


def _symbol_norms(weight: Tensor) -> Tensor:
    r"""Return \|S(t)\|_2 on the finest grid, half of it in the second frequency."""
    thin = weight if weight.shape[0] <= weight.shape[1] else weight.transpose(0, 1)
    first, second = (grid_size(size, max(OVERSAMPLINGS)) for size in weight.shape[2:])
    entries = torch.arange(weight.shape[2], dtype=weight.dtype, device=weight.device)
    rows = []
    for index in range(first):  # row by row, so that wide layers fit into memory
        angle = entries * (2 * math.pi * index / first)
        row = (thin * torch.polar(torch.ones_like(angle), -angle)[:, None]).sum(2)
        symbol = torch.fft.fft(row, n=second)[..., : second // 2 + 1].movedim(-1, 0)
        rows.append(torch.linalg.eigvalsh(symbol @ symbol.mH)[:, -1])
    return torch.stack(rows).clamp_min(0).sqrt()


def _sequential(module: nn.Sequential) -> float:
    return math.prod(lipschitz_bound(child) for child in module)


def _conv2d(module: nn.Conv2d) -> float:
    margins = module._reversed_padding_repeated_twice
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    repeats = any(sum(margins[2 * i : 2 * i + 2]) > span for i, span in enumerate(spans[::-1]))
    if module.padding_mode not in get_args(PaddingMode) or (
        module.padding_mode == "circular" and repeats
    ):
        raise ValueError(
            f"no Lipschitz bound is known for {module}: use padding_mode 'zeros', or 'circular' "
            "with padding='same'"
        )
    return max(conv_norm_bound(group) for group in module.weight.chunk(module.groups))


_TORCH_BOUNDS: dict[type[nn.Module], Callable[[Any], float]] = {
    nn.Linear: lambda module: spectral_norm_bound(module.weight),
    nn.Conv2d: _conv2d,
    nn.Sequential: _sequential,
    nn.Flatten: lambda _: 1.0,
}


def lipschitz_bound(module: nn.Module) -> float:
    """Return a certified upper bound of the Lipschitz constant of a module in its inputs.

    The bound is computed in float64 from the weights as they are at this moment, rounding
    included; it relies on no estimate and on no earlier call. It bounds the exact map that the
    stored weights define: an evaluation in floating point adds its own rounding on top.

    Args:
        module: a network of this package, a unit-wise activation of torch, `torch.nn.Linear`,
            `torch.nn.Conv2d`, a `Sequential` of such, or any module with a method
            `lipschitz_bound() -> float` or an attribute `lipschitz`.

    Raises:
        ValueError: if no bound is known for the module, or a weight is not finite.

    Example:
        >>> import torch
        >>> bound = lipschitz_bound(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ELU()))
    """
    own = getattr(module, "lipschitz_bound", None)
    if callable(own):
        return float(own())
    bound = _TORCH_BOUNDS.get(type(module))
    if bound is not None:
        _compute_weight(module)
        return bound(module)
    if (constant := constant_of(module)) is not None:
        return constant
    raise ValueError(
        f"no Lipschitz bound is known for {type(module).__name__}; give it a method "
        "lipschitz_bound() -> float, or build it from layers of nflows_iresnet.nn"
    )


@torch.no_grad()
def _compute_weight(module: nn.Module) -> None:
    """Let hooks compute a weight as the next call in evaluation mode would."""
    is_training, module.training = module.training, False
    try:
        run_weight_hooks(module)
    finally:
        module.training = is_training


def spectral_penalty(module: nn.Module, weight: float = 1e-3) -> Tensor:
    r"""Return lambda * sum \|W\|_2^2 over all matrices of a module: a term to add to a loss.

    A soft constraint: it makes norms small, and guarantees nothing.

    Args:
        module: any module; its parameters with two dimensions are the matrices.
        weight: lambda.

    Returns:
        A scalar, differentiable in the weights.

    Example:
        >>> import torch
        >>> float(spectral_penalty(torch.nn.Linear(2, 2), weight=0.0))
        0.0
    """
    if weight < 0:
        raise ValueError(f"the weight of the penalty must not be negative, got {weight}")
    matrices = [parameter for parameter in module.parameters() if parameter.dim() == 2]
    if not matrices:
        raise ValueError(f"{type(module).__name__} has no matrix to penalise")
    norms = [torch.linalg.matrix_norm(matrix, ord=2) for matrix in matrices]
    return weight * torch.stack(norms).square().sum()
