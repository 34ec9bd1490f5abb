"""Named models: presets of transforms with a base distribution."""

from nflows_iresnet.flows.base import StandardNormal
from nflows_iresnet.flows.residual import InvertibleResNet, ResidualFlow

__all__ = ["InvertibleResNet", "ResidualFlow", "StandardNormal"]
