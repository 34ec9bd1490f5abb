"""Invertible maps in nflows' convention: forward is data to noise."""

from nflows_iresnet.transforms.actnorm import ActNorm
from nflows_iresnet.transforms.composite import CompositeTransform
from nflows_iresnet.transforms.conditional import ConditionalAffine
from nflows_iresnet.transforms.residual import ResidualTransform, using

__all__ = ["ActNorm", "CompositeTransform", "ConditionalAffine", "ResidualTransform", "using"]
