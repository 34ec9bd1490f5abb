"""Pictures of a benchmark: how costs scale, and likelihood over training time."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nflows_iresnet.compare.bench.items import CaseResult
from nflows_iresnet.compare.bench.record import BenchRecord
from nflows_iresnet.compare.bench.verdicts import Fit, fits

COLOURS = ("#c8385a", "#1b1b3a", "#7b8299", "#2a9d8f", "#e9a03b", "#8e5fb5", "#4c8bd6")
_STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.edgecolor": "#c9ccd6", "figure.dpi": 100}


def draw(record: BenchRecord) -> dict[str, bytes]:
    """Return the pictures that the results allow, as PNG files by name."""
    panels = [
        found for name, item in record.items.items() if (found := fits(item, record.of(name)))
    ]
    pictures = {"bench.png": _scaling(panels)} if panels else {}
    trained = [result for result in record.results if any("nll" in c.raw for c in result.cells)]
    return {**pictures, "quality.png": _quality(trained)} if trained else pictures


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


def _quality(results: Sequence[CaseResult]) -> bytes:
    names = list(dict.fromkeys(result.case.split()[0] for result in results))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.6 * len(names), 3.4), layout="constrained")
        axes = figure.subplots(1, len(names), squeeze=False)[0]
        for ax, name in zip(axes, names, strict=True):
            _curves(ax, name, [result for result in results if result.case.split()[0] == name])
        return _png(figure)


def _curves(ax: Axes, name: str, results: Sequence[CaseResult]) -> None:
    for first, result in enumerate(results):
        for cell, colour in zip(result.cells, COLOURS, strict=False):
            label = None if first else cell.contestant
            ax.semilogx(cell.raw["seconds"], cell.raw["nll"], color=colour, label=label)
    ax.set(title=name, xlabel="seconds of training", ylabel="exact test NLL (nats)")
    ax.legend(fontsize=7, frameon=False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()
