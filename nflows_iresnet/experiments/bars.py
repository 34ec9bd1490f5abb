"""The bars of table 2: what was measured here, and what was published, each in its own panel."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nflows_iresnet.experiments.plots import DATA, INK, MODEL, STYLE, as_png
from nflows_iresnet.experiments.record import DatasetSummary, Folder, Record
from nflows_iresnet.experiments.summary import Row, rows_of

Bars = dict[str, tuple[float, float | None]]


def draw(record: Record, folder: Folder, dataset: DatasetSummary) -> dict[Path, bytes]:
    """Draw the scores of every model, best last, and the published ones in the same order.

    Returns:
        A PNG, by its path.
    """
    rows = [row for row in rows_of(record, dataset.name) if row.metrics.test_nll is not None]
    measured = {row.model: _score(row) for row in rows}
    published = _published(record, list(measured)) if dataset.levels is not None else {}
    with mpl.rc_context(STYLE):
        width = 4.6 + 2.3 * len(published)
        figure = Figure(figsize=(width, 0.9 + 0.34 * len(rows)), layout="constrained")
        ours, *theirs = figure.subplots(
            1,
            1 + len(published),
            sharey=True,
            squeeze=False,
            width_ratios=[2, *[1] * len(published)],
        )[0]
        unit = "nats" if dataset.levels is None else "bits per dimension"
        _bars(ours, measured, f"{dataset.name}: measured here", unit, MODEL)
        ours.invert_yaxis()
        for axes, (name, bars) in zip(theirs, published.items(), strict=True):
            _bars(axes, bars, f"{name}: published", unit, DATA)
    return {folder.picture(dataset.name, "bars"): as_png(figure)}


def _score(row: Row) -> tuple[float, float | None]:
    metrics = row.metrics
    if metrics.bits_per_dim is not None:
        return metrics.bits_per_dim, metrics.bits_per_dim_se
    return metrics.test_nll or math.nan, metrics.test_nll_se


def _published(record: Record, models: list[str]) -> dict[str, Bars]:
    names = dict.fromkeys(name for row in record.published.values() for name in row)
    return {
        name: {
            model: (float(record.published.get(model, {}).get(name, "nan").strip("†")), None)
            for model in models
        }
        for name in names
    }


def _bars(axes: Axes, bars: Bars, title: str, unit: str, color: str) -> None:
    values = [value for value, _ in bars.values()]
    errors = [error or 0.0 for _, error in bars.values()]
    axes.barh(list(bars), values, xerr=errors, color=color, height=0.62, ecolor=INK, capsize=2)
    for place, value in enumerate(values):
        axes.annotate(
            f"{value:.2f}", (value, place), xytext=(6, 0), textcoords="offset points", va="center"
        )
    axes.set_title(title, color=INK)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.2)
