"""Pictures of a benchmark: how costs scale, and likelihood over training time."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from nflows_iresnet.experiments.bench.contestants import CONTESTANTS
from nflows_iresnet.experiments.bench.items import BASELINE, FLOOR, OURS, CaseResult
from nflows_iresnet.experiments.bench.record import BenchRecord
from nflows_iresnet.experiments.bench.verdicts import Fit, fits

COLOURS = ("#1b1b3a", "#c8385a", "#7b8299", "#2a9d8f", "#e9a03b", "#8e5fb5", "#4c8bd6")
_COLUMNS = 3
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
        columns = min(len(panels), _COLUMNS)
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(3.6 * columns, 3.2 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for ax, found in zip(axes, panels, strict=False):
            _panel(ax, found)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        return _png(figure)


def _panel(ax: Axes, found: Sequence[Fit]) -> None:
    for fit in found:
        x, y = zip(*fit.points, strict=True)
        label = f"{fit.contestant}  ~ {fit.variable}^{fit.law.exponent:.2f}"
        ax.plot(x, y, "o-", markersize=3, color=_colour(fit.contestant), label=label)
    ax.set(title=found[0].item, xlabel=found[0].variable, ylabel=found[0].quantity)
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.legend(fontsize=7, frameon=False)


def _colour(contestant: str) -> str:
    """Return the same colour for the same contestant in every panel."""
    names = [
        BASELINE,
        OURS,
        FLOOR,
        *sorted({*CONTESTANTS, "ours-picard"} - {BASELINE, OURS, FLOOR}),
    ]
    return COLOURS[names.index(contestant) % len(COLOURS)] if contestant in names else "#000000"


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
        for cell in result.cells:
            label = None if first else cell.contestant
            colour = _colour(cell.contestant)
            ax.semilogx(cell.raw["seconds"], cell.raw["nll"], color=colour, label=label)
    ax.set(title=name, xlabel="seconds of training", ylabel="exact test NLL (nats)")
    ax.legend(fontsize=7, frameon=False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()
