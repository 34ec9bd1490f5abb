"""Named models: presets of transforms with a base distribution."""

from nflows_iresnet.flows.base import Flow, StandardNormal
from nflows_iresnet.flows.image import ImageResidualFlow
from nflows_iresnet.flows.lipschitz import FlowLipschitz
from nflows_iresnet.flows.residual import InvertibleResNet, ResidualFlow

__all__ = [
    "Flow",
    "FlowLipschitz",
    "ImageResidualFlow",
    "InvertibleResNet",
    "ResidualFlow",
    "StandardNormal",
]
