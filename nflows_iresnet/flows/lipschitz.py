"""Certified bi-Lipschitz constants of transforms, from those of their parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from nflows import transforms as nflows_transforms
from torch import nn

from nflows_iresnet.linearization import depth_of, run_weight_hooks
from nflows_iresnet.transforms import (
    ActNorm,
    CompositeTransform,
    InjectivePadding,
    LinearTransform,
    LogitTransform,
    MonotoneTransform,
    ResidualTransform,
    SqueezeTransform,
    UniformDequantization,
)
from nflows_iresnet.transforms.image import CenteringTransform, MultiscaleTransform
from nflows_iresnet.transforms.normalization import infinite_if_nan

Constants = tuple[float, float]
_ISOMETRY: Constants = (1.0, 1.0)


@dataclass(frozen=True)
class FlowLipschitz:
    """Certified Lipschitz constants of a flow.

    Attributes:
        blocks: bounds of Lip(g) of the residual blocks, from data to noise; infinite for a network
            without a certificate.
        forward: bound for data -> noise; infinite where none exists, or none is known.
        inverse: bound for noise -> data; infinite where none exists, or none is known.
    """

    blocks: tuple[float, ...]
    forward: float
    inverse: float


def certified_blocks(transform: nn.Module) -> tuple[float, ...]:
    """Return the bounds of Lip(g) of all residual blocks of a transform, in their order."""
    return tuple(
        _residual_bound(each) for each in transform.modules() if isinstance(each, ResidualTransform)
    )


def lipschitz_constants(transform: nn.Module) -> Constants:
    """Return bounds of the Lipschitz constants of a transform's forward and inverse.

    A transform states its own by a method `lipschitz_constants() -> tuple[float, float]`. What has
    none, or a `forward` or `inverse` of a class below it, and is none of the kinds known here
    (subclasses may do anything), is unknown: infinite. So is a bound that is NaN, as that of
    parameters that are.

    Args:
        transform: of this package, of nflows, or of yours.
    """
    own = _own_constants(transform)
    found = _CONSTANTS.get(type(transform), _unknown)(transform) if own is None else own()
    forward, inverse = map(float, found)
    return infinite_if_nan(forward), infinite_if_nan(inverse)


def _own_constants(transform: nn.Module) -> Callable[[], Constants] | None:
    """Return the method by which a transform states the constants of the maps that it has."""
    name, kind = "lipschitz_constants", type(transform)
    own: Callable[[], Constants] | None = getattr(transform, name, None)
    of_maps = min(depth_of(kind, "forward"), depth_of(kind, "inverse"))
    is_its_own = name in vars(transform) or depth_of(kind, name) <= of_maps
    return own if is_its_own and callable(own) else None


def _residual(transform: ResidualTransform) -> Constants:
    bound = _residual_bound(transform)
    if not bound < 1:
        return _up(1 + bound), math.inf
    return _up(1 + bound), _up(1 / math.nextafter(1 - bound, 0))


def _monotone(transform: MonotoneTransform) -> Constants:
    """(I - g)(I + g)^{-1}, which with -g in place of g is its own inverse."""
    stretch, shrinkage = _residual(transform)
    bound = _up(stretch * shrinkage)
    return bound, bound


def _composite(transform: nflows_transforms.CompositeTransform) -> Constants:
    return reduce(_chained, map(lipschitz_constants, transform._transforms), _ISOMETRY)


def _multiscale(transform: nflows_transforms.MultiscaleCompositeTransform) -> Constants:
    """Half of what a scale returns goes on: |(a, F(b))| <= max(1, Lip F) |(a, b)|."""
    total = _ISOMETRY
    for each in reversed(transform._transforms):
        rest = max(1.0, total[0]), max(1.0, total[1])
        total = _chained(lipschitz_constants(each), rest)
    return total


def _inverse(transform: nflows_transforms.InverseTransform) -> Constants:
    forward, inverse = lipschitz_constants(transform._transform)
    return inverse, forward


def _pointwise_affine(transform: nflows_transforms.PointwiseAffineTransform) -> Constants:
    scales = transform._scale.detach().double()
    return float(scales.max()), _up(1 / float(scales.min()))


def _matrix(transform: LinearTransform | nflows_transforms.LULinear) -> Constants:
    """The extreme singular values, less what their decomposition may err by (Weyl)."""
    with torch.no_grad():
        run_weight_hooks(transform)  # computed with a graph it could not be copied
        weight = deepcopy(transform).double().weight()
    try:
        singular = torch.linalg.svdvals(weight)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return _unknown(transform)
    largest, smallest = float(singular[0]), float(singular[-1])
    error = 64 * weight.shape[0] * torch.finfo(torch.float64).eps * largest
    return largest + error, 1 / (smallest - error) if smallest > error else math.inf


def _centring(transform: CenteringTransform) -> Constants:
    return _up(1 / transform.levels), float(transform.levels)


def _logit(transform: LogitTransform) -> Constants:
    """The logit has slopes from 4 to infinity."""
    return math.inf, _up(_up(1 / transform._slope) / 4)


def _dequantization(transform: nn.Module) -> Constants:
    """A shift for each draw of the noise; rounding down has jumps."""
    return 1.0, math.inf


def _isometry(transform: nn.Module) -> Constants:
    return _ISOMETRY


def _unknown(transform: nn.Module) -> Constants:
    return math.inf, math.inf


_CONSTANTS: dict[type[nn.Module], Callable[[Any], Constants]] = {
    ResidualTransform: _residual,
    MonotoneTransform: _monotone,
    CompositeTransform: _composite,
    nflows_transforms.CompositeTransform: _composite,
    MultiscaleTransform: _multiscale,
    nflows_transforms.MultiscaleCompositeTransform: _multiscale,
    nflows_transforms.InverseTransform: _inverse,
    nflows_transforms.ActNorm: ActNorm.lipschitz_constants,
    nflows_transforms.PointwiseAffineTransform: _pointwise_affine,
    LinearTransform: _matrix,
    nflows_transforms.LULinear: _matrix,
    CenteringTransform: _centring,
    LogitTransform: _logit,
    UniformDequantization: _dequantization,
    InjectivePadding: _isometry,
    SqueezeTransform: _isometry,
    nflows_transforms.SqueezeTransform: _isometry,
    nflows_transforms.IdentityTransform: _isometry,
    nflows_transforms.Permutation: _isometry,
    nflows_transforms.RandomPermutation: _isometry,
    nflows_transforms.ReversePermutation: _isometry,
}


def _residual_bound(block: ResidualTransform) -> float:
    try:
        return infinite_if_nan(block.lipschitz_bound())
    except ValueError:
        return math.inf


def _chained(first: Constants, second: Constants) -> Constants:
    return _up(first[0] * second[0]), _up(first[1] * second[1])


def _up(value: float) -> float:
    """Return a number above the exact result of one operation that was rounded to a value.

    Of NaN, as 0 times infinity is, infinity.
    """
    return math.nextafter(infinite_if_nan(value), math.inf)
