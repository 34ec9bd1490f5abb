"""Named models: presets of transforms with a base distribution."""

from nflows_iresnet.flows.base import Flow, StandardNormal
from nflows_iresnet.flows.residual import InvertibleResNet, ResidualFlow

__all__ = ["Flow", "InvertibleResNet", "ResidualFlow", "StandardNormal"]
