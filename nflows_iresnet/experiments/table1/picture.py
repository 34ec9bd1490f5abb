"""The picture of table 1: test error, and what the inverse misses, against the bound c."""

from __future__ import annotations

import math

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nflows_iresnet.experiments.pictures import DATA, INK, MODEL, STYLE, as_png
from nflows_iresnet.experiments.table1.record import Record, Row


def draw(record: Record) -> bytes:
    """Draw both panels as a PNG: certified classifiers in red, those without guarantee in grey."""
    rows = [row for row in record.rows() if row.error_percent is not None]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _errors(left, rows)
        left.set_ylabel(f"test error on {record.data.name} (%)")
        _reconstructions(right, [row for row in rows if row.inversion is not None])
        return as_png(figure)


def _errors(axes: Axes, rows: list[Row]) -> None:
    for place, row in enumerate(rows):
        axes.errorbar(
            *(place, row.error_percent or 0.0),
            yerr=row.error_se,
            fmt="o",
            capsize=4,
            color=_color(row),
        )
    _label(axes, rows)
    axes.set_ylim(bottom=0)


def _reconstructions(axes: Axes, rows: list[Row]) -> None:
    for place, row in enumerate(rows):
        error = math.nan if row.inversion is None else row.inversion.error_max
        axes.bar(place, error, color=_color(row), width=0.6)
    _label(axes, rows)
    axes.set_yscale("log")
    axes.set_ylabel("largest reconstruction error\n(levels of a pixel)")
    axes.axhline(0.5, color=INK, lw=0.8, ls=":")
    axes.annotate(
        "above: pixels are lost", (1, 0.5), xycoords=("axes fraction", "data"), ha="right",
        xytext=(-4, 3), textcoords="offset points", color=INK,
    )  # fmt: skip


def _label(axes: Axes, rows: list[Row]) -> None:
    axes.set_xticks(range(len(rows)), [row.model for row in rows])
    axes.set_xlabel("red: inverse guaranteed, grey: not")
    axes.spines[["top", "right"]].set_visible(False)


def _color(row: Row) -> str:
    return MODEL if row.guaranteed_inverse else DATA
