"""What every figure is told, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

Stage = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Settings:
    """What the figures depend on.

    Args:
        steps: optimiser steps per model, or None for what each figure needs.
        seed: seed of data, weights, batches and samples.
        quick: whether small models that are trained briefly will do.
    """

    steps: int | None = None
    seed: int = 0
    quick: bool = False

    def steps_or(self, usual: int, quick: int) -> int:
        """Return the steps that were asked for, or else those that the figure needs."""
        if self.steps is not None:
            return self.steps
        return quick if self.quick else usual


@dataclass(frozen=True)
class Drawing:
    """A figure that is done.

    Args:
        title: a few words.
        caption: what is seen, with the numbers that were measured.
        picture: the content of a PNG.
        numbers: everything that was chosen or measured, as plain JSON data.
    """

    title: str
    caption: str
    picture: bytes
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure that can be drawn.

    Args:
        description: one line for `--help`.
        stages: how many models it trains.
        draw: trains, measures and draws; uses its second argument as `with stage(label):` around
            each model.
    """

    description: str
    stages: Callable[[Settings], int]
    draw: Callable[[Settings, Stage], Drawing]
