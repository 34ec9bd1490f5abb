"""Invertible maps in the convention of nflows: forward is data -> noise."""

from nflows_iresnet.transforms.actnorm import ActNorm
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
from nflows_iresnet.transforms.residual import ResidualTransform, using

__all__ = [
    "ActNorm",
    "ConditionalAffine",
    "InjectivePadding",
    "LogitTransform",
    "OutsideRangeError",
    "ResidualTransform",
    "SqueezeTransform",
    "UniformDequantisation",
    "dequantise",
    "multiscale",
    "using",
]
