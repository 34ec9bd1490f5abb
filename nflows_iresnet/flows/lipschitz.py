"""Certified Lipschitz constants of whole flows, from those of their parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce, singledispatch

import torch
from nflows.transforms import (
    CompositeTransform,
    InverseTransform,
    MultiscaleCompositeTransform,
    Permutation,
    PointwiseAffineTransform,
    Transform,
)
from nflows.transforms.reshape import SqueezeTransform
from torch import nn

from nflows_iresnet.transforms import ResidualTransform

Constants = tuple[float, float]
UNKNOWN = math.inf


@dataclass(frozen=True)
class FlowLipschitz:
    r"""What is certified of a flow's map T from data to noise.

    Attributes:
        blocks: bounds of Lip(g) of its residual blocks, from data to noise.
        forward: \|T(x) - T(x')\| <= forward \|x - x'\|; infinite where no bound is known.
        inverse: \|x - x'\| <= inverse \|T(x) - T(x')\|; infinite where no bound is known.
    """

    blocks: tuple[float, ...]
    forward: float
    inverse: float


def lipschitz_of_flow(transform: Transform) -> FlowLipschitz:
    """Return certified bounds for the present weights of a transform and of its residual blocks.

    The constants of maps one after the other multiply. A map of one's own takes part that has a
    method `lipschitz_constants() -> (forward, inverse)`; of unknown ones the constants are
    infinite.

    Args:
        transform: from data to noise.

    Raises:
        ValueError: if the network of a block has no certified bound.
    """
    blocks = [each for each in transform.modules() if isinstance(each, ResidualTransform)]
    bounds = tuple(block.lipschitz_bound() for block in blocks)
    return FlowLipschitz(bounds, *constants_of(transform))


@singledispatch
def constants_of(transform: nn.Module) -> Constants:
    """Return bounds of the Lipschitz constants of a transform and of its inverse."""
    own = getattr(transform, "lipschitz_constants", None)
    return own() if callable(own) else (UNKNOWN, UNKNOWN)


@constants_of.register
def _(transform: CompositeTransform) -> Constants:
    return reduce(_product, map(constants_of, transform._transforms), (1.0, 1.0))


def _product(first: Constants, second: Constants) -> Constants:
    return first[0] * second[0], first[1] * second[1]


@constants_of.register
def _(transform: InverseTransform) -> Constants:
    forward, inverse = constants_of(transform._transform)
    return inverse, forward


@constants_of.register
def _(transform: MultiscaleCompositeTransform) -> Constants:
    """Half of what a scale returns goes on: the next ones stretch that part, or leave it alone."""
    total: Constants = (1.0, 1.0)
    for scale in reversed(transform._transforms):
        rest = max(1.0, total[0]), max(1.0, total[1])
        total = _product(constants_of(scale), rest)
    return total


@constants_of.register(Permutation)
@constants_of.register(SqueezeTransform)
def _(transform: nn.Module) -> Constants:
    return 1.0, 1.0


@constants_of.register
def _(transform: PointwiseAffineTransform) -> Constants:
    scales = transform._scale.double().abs()
    forward, inverse = scales.max(), scales.reciprocal().max()
    return _above(float(forward)), _above(float(inverse))


def _above(value: float) -> float:
    return value * (1 + 8 * torch.finfo(torch.float64).eps)
