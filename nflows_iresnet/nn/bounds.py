"""Certified upper bounds of the Lipschitz constant of a network, from its weights as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


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
    if not bool(weight.isfinite().all()):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has entries that are not finite, so no "
            "Lipschitz bound exists; training has diverged: lower the learning rate or clip "
            "gradients"
        )
    norm = torch.linalg.matrix_norm(weight.double(), ord=2)
    return float(norm) * (1 + 32 * max(weight.shape) * torch.finfo(torch.float64).eps)


def _sequential(module: nn.Sequential) -> float:
    return math.prod(lipschitz_bound(child) for child in module)


def _elu(module: nn.ELU) -> float:
    return max(1.0, abs(module.alpha))


def _leaky_relu(module: nn.LeakyReLU) -> float:
    return max(1.0, abs(module.negative_slope))


_TORCH_BOUNDS: dict[type[nn.Module], Callable[[Any], float]] = {
    nn.Linear: lambda module: spectral_norm_bound(module.weight),
    nn.Sequential: _sequential,
    nn.ELU: _elu,
    nn.LeakyReLU: _leaky_relu,
    nn.Identity: lambda _: 1.0,
    nn.Flatten: lambda _: 1.0,
    nn.ReLU: lambda _: 1.0,
    nn.Tanh: lambda _: 1.0,
    nn.Softplus: lambda _: 1.0,
    nn.Sigmoid: lambda _: 0.25,
    nn.SiLU: lambda _: 1.1,
    nn.GELU: lambda _: 1.13,
}


def lipschitz_bound(module: nn.Module) -> float:
    """Return a certified upper bound of the Lipschitz constant of a module in its inputs.

    The bound is computed in float64 from the weights as they are at this moment, rounding
    included; it relies on no estimate and on no earlier call. It bounds the exact map that the
    stored weights define: an evaluation in floating point adds its own rounding on top.

    Args:
        module: a network of this package, a unit-wise activation of torch, `torch.nn.Linear`, a
            `Sequential` of such, or any module with a method `lipschitz_bound() -> float` or an
            attribute `lipschitz`.

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
        return bound(module)
    if isinstance(constant := getattr(module, "lipschitz", None), float):
        return constant
    raise ValueError(
        f"no Lipschitz bound is known for {type(module).__name__}; give it a method "
        "lipschitz_bound() -> float, or build it from layers of nflows_iresnet.nn"
    )


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
