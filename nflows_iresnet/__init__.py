"""Invertible residual networks for nflows: every number is exact, or carries its error."""

__version__ = "0.1.0"
