"""All figures by name."""

from __future__ import annotations

from collections.abc import Sequence

from nflows_iresnet.experiments.config import suggest
from nflows_iresnet.experiments.figures import densities, digits, dynamics
from nflows_iresnet.experiments.figures.drawing import Figure

FIGURES: dict[str, Figure] = {
    "densities": Figure(
        "toy densities: data, truth, two residual flows, Glow and RealNVP",
        densities.count_models,
        densities.draw,
    ),
    "dynamics": Figure(
        "paths of points through a plain and an invertible residual network",
        dynamics.count_models,
        dynamics.draw,
    ),
    "digits": Figure(
        "images: samples, interpolations and reconstructions of a residual flow",
        digits.count_models,
        digits.draw,
    ),
}


def chosen_figures(only: Sequence[str] | None) -> dict[str, Figure]:
    """Return the figures that were asked for, all by default.

    Raises:
        ValueError: there is no such figure; the message names the nearest one.
    """
    for name in only or ():
        if name not in FIGURES:
            raise ValueError(f"unknown figure {name!r}: {suggest(name, FIGURES)}")
    return {name: figure for name, figure in FIGURES.items() if not only or name in only}
