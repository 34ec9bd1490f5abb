"""Invertible maps in nflows' convention: forward is data to noise."""

from nflows_iresnet.transforms.actnorm import ActNorm
from nflows_iresnet.transforms.composite import CompositeTransform
from nflows_iresnet.transforms.conditional import ConditionalAffine
from nflows_iresnet.transforms.image import (
    InjectivePadding,
    LogitTransform,
    OutsideRangeError,
    SqueezeTransform,
    UniformDequantisation,
    dequantise,
    multiscale,
)
from nflows_iresnet.transforms.linear import LinearTransform
from nflows_iresnet.transforms.marginal import MarginalSpline
from nflows_iresnet.transforms.residual import ResidualTransform, using

__all__ = [
    "ActNorm",
    "CompositeTransform",
    "ConditionalAffine",
    "InjectivePadding",
    "LinearTransform",
    "LogitTransform",
    "MarginalSpline",
    "OutsideRangeError",
    "ResidualTransform",
    "SqueezeTransform",
    "UniformDequantisation",
    "dequantise",
    "multiscale",
    "using",
]
