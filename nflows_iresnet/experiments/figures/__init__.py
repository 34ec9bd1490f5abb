"""The command `nflows-iresnet figures`: pictures of what the method does, all of them computed.

Here is what every figure is told and hands back, without torch, so that `--help` is there at once.
A figure is a module with `count_models` and `draw`: one line in `DESCRIPTIONS` and one in
`command.FIGURES` add it to the page and to the file of numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

Stage = Callable[[str], AbstractContextManager[None]]

DESCRIPTIONS = {
    "densities": "toy densities: data, truth, two residual flows, Glow and RealNVP",
    "dynamics": "paths of points through a plain and an invertible residual network",
    "digits": "images: samples, interpolations and reconstructions of a residual flow",
}
"""One line about each figure, for `--help` and `--list`."""


@dataclass(frozen=True)
class Settings:
    """What the figures depend on.

    Args:
        steps: optimiser steps per model, or None for what each figure needs.
        seed: seed of data, weights, batches and samples.
        quick: whether small models that are trained briefly will do.
        device: "cpu" or "cuda".
        threads: CPU threads that torch uses.
    """

    steps: int | None = None
    seed: int = 0
    quick: bool = False
    device: str = "cpu"
    threads: int = 1

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
