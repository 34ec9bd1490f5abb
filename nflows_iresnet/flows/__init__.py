"""Named models: presets of transforms with a base distribution."""

from nflows_iresnet.flows.base import Flow, StandardNormal
from nflows_iresnet.flows.hybrid import HybridFlow
from nflows_iresnet.flows.image import ImageResidualFlow
from nflows_iresnet.flows.lipschitz import FlowLipschitz
from nflows_iresnet.flows.partners import (
    Partner,
    affine_coupling,
    masked_autoregressive,
    spline_autoregressive,
    spline_coupling,
)
from nflows_iresnet.flows.residual import InvertibleResNet, ResidualFlow

__all__ = [
    "Flow",
    "FlowLipschitz",
    "HybridFlow",
    "ImageResidualFlow",
    "InvertibleResNet",
    "Partner",
    "ResidualFlow",
    "StandardNormal",
    "affine_coupling",
    "masked_autoregressive",
    "spline_autoregressive",
    "spline_coupling",
]
