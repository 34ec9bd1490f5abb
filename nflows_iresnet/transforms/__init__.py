"""Invertible maps in nflows' convention: forward is data to noise."""

from typing import TYPE_CHECKING

from nflows_iresnet.renamed import renamed
from nflows_iresnet.transforms.composite import CompositeTransform
from nflows_iresnet.transforms.conditional import ConditionalAffine
from nflows_iresnet.transforms.image import (
    InjectivePadding,
    LogitTransform,
    OutsideRangeError,
    SqueezeTransform,
    UniformDequantization,
    dequantize,
    multiscale,
)
from nflows_iresnet.transforms.initialization import initialize
from nflows_iresnet.transforms.linear import LinearTransform
from nflows_iresnet.transforms.monotone import MonotoneTransform
from nflows_iresnet.transforms.normalization import ActNorm
from nflows_iresnet.transforms.residual import ResidualTransform, using
from nflows_iresnet.transforms.splines import ElementwiseRationalQuadraticSpline

__all__ = [
    "ActNorm",
    "CompositeTransform",
    "ConditionalAffine",
    "ElementwiseRationalQuadraticSpline",
    "InjectivePadding",
    "LinearTransform",
    "LogitTransform",
    "MonotoneTransform",
    "OutsideRangeError",
    "ResidualTransform",
    "SqueezeTransform",
    "UniformDequantization",
    "dequantize",
    "initialize",
    "multiscale",
    "using",
]

if not TYPE_CHECKING:
    __getattr__ = renamed(
        __name__,
        {
            "MarginalSpline": "ElementwiseRationalQuadraticSpline",
            "UniformDequantisation": "UniformDequantization",
            "dequantise": "dequantize",
        },
    )
