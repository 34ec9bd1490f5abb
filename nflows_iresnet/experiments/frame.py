"""The square window that every picture of a plane data set shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nflows_iresnet.experiments.evaluation import Array

RESOLUTION = 128


@dataclass(frozen=True)
class Frame:
    """A square: its centre and half its side."""

    x: float
    y: float
    half: float

    @classmethod
    def around(cls, rows: Tensor) -> Frame:
        """Return the square around all rows (N, 2), with a margin of 10%."""
        low, high = rows.amin(dim=0), rows.amax(dim=0)
        centre = ((low + high) / 2).tolist()
        return cls(centre[0], centre[1], 0.55 * float((high - low).max()))

    @classmethod
    def from_array(cls, values: Array) -> Frame:
        """Rebuild a frame from `as_array`."""
        x, y, half = (float(value) for value in values)
        return cls(x, y, half)

    def as_array(self) -> Array:
        """Return the three numbers."""
        return np.array([self.x, self.y, self.half])

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top."""
        return (
            self.x - self.half,
            self.x + self.half,
            self.y - self.half,
            self.y + self.half,
        )

    def grid(self, resolution: int = RESOLUTION) -> Tensor:
        """Return the centres of the pixels, (resolution^2, 2), row by row from the bottom."""
        steps = (torch.arange(resolution) + 0.5) * (2 * self.half / resolution) - self.half
        ys, xs = torch.meshgrid(self.y + steps, self.x + steps, indexing="ij")
        return torch.stack([xs.flatten(), ys.flatten()], dim=1)
