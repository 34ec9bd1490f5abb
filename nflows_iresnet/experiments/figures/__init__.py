"""The command `nflows-iresnet figures`: pictures of what the method does, all of them computed.

Here is what every figure is called and hands back, without torch, so that `--help` is there at
once. A line in `DESCRIPTIONS` and one in `command.FIGURES` add a figure to the page and to the file
of numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DESCRIPTIONS = {
    "densities": "toy densities: data, truth, two residual flows, Glow and RealNVP",
    "dynamics": "paths of points through a plain and an invertible residual network",
    "digits": "images: samples, interpolations and reconstructions of a residual flow",
}
"""One line about each figure, for `--help` and `--list`."""


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
