"""How long and how every model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Steps:
    """Train for a number of optimiser steps."""

    count: int

    def progress(self, steps: int, seconds: float) -> float:
        """Return the fraction of the training that is done, 1 at the end."""
        return steps / self.count


@dataclass(frozen=True)
class Seconds:
    """Train for a time in seconds, validation not counted."""

    budget: float

    def progress(self, steps: int, seconds: float) -> float:
        """Return the fraction of the training that is done, 1 at the end."""
        return min(seconds / self.budget, 1.0)


@dataclass(frozen=True)
class TrainingPlan:
    """How every model is trained: Adam, cosine schedule, gradient clipping, early stopping.

    Args:
        learning_rate: initial learning rate, annealed to zero.
        length: how long to train.
        clip_norm: largest norm of the gradient.
        validations: how often the validation set is evaluated, at equal intervals.
        patience: validations without a new best after which training stops.
        average_decay: decay of the moving average of the weights that is validated and kept, None
            to validate and keep the weights themselves.
        warmup: part of the training in which the learning rate rises from a tenth.
        tf32: whether steps, but no validation, may use TensorFloat-32 on a GPU.
    """

    learning_rate: float
    length: Steps | Seconds
    clip_norm: float = 10.0
    validations: int = 20
    patience: int = 8
    average_decay: float | None = None
    warmup: float = 0.0
    tf32: bool = False

    def learning_rate_at(self, progress: float) -> float:
        """Return the learning rate, warmed up and annealed by a cosine."""
        rising = 1.0 if progress >= self.warmup else max(0.1, progress / self.warmup)
        return 0.5 * self.learning_rate * rising * (1.0 + math.cos(math.pi * progress))
