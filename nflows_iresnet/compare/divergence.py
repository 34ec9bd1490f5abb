"""Trainings whose loss is no longer a number."""

from __future__ import annotations

import math

REMEDY = "lower the learning rate (--learning-rate), or look for outliers in the data"


class TrainingDivergedError(ArithmeticError):
    """The loss is no longer a finite number."""


def check_finite(loss: float, step: int) -> None:
    """Check the loss of a step.

    Raises:
        TrainingDivergedError: it is not finite.
    """
    if not math.isfinite(loss):
        raise TrainingDivergedError(f"the training loss was {loss} at step {step}; {REMEDY}")
