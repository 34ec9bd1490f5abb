"""Pictures of a benchmark: how costs scale, and likelihood over training time."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nflows_iresnet.compare.bench.record import BenchRecord
from nflows_iresnet.compare.bench.verdicts import Fit, fits

COLOURS = ("#c8385a", "#1b1b3a", "#7b8299", "#2a9d8f", "#e9a03b", "#8e5fb5", "#4c8bd6")
_STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.edgecolor": "#c9ccd6", "figure.dpi": 100}


def draw(record: BenchRecord) -> dict[str, bytes]:
    """Return the pictures that the results allow, as PNG files by name."""
    panels = [
        found for name, item in record.items.items() if (found := fits(item, record.of(name)))
    ]
    return {"bench.png": _scaling(panels)} if panels else {}


def _scaling(panels: Sequence[Sequence[Fit]]) -> bytes:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, found in zip(axes, panels, strict=True):
            _panel(ax, found)
        return _png(figure)


def _panel(ax: Axes, found: Sequence[Fit]) -> None:
    for index, fit in enumerate(found):
        x, y = zip(*fit.points, strict=True)
        label = f"{fit.contestant}  ~ {fit.variable}^{fit.law.exponent:.2f}"
        ax.loglog(x, y, "o-", markersize=3, color=COLOURS[index % len(COLOURS)], label=label)
    ax.set(title=found[0].item, xlabel=found[0].variable, ylabel=found[0].quantity)
    ax.legend(fontsize=7, frameon=False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()
