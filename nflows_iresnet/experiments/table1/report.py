"""What is shown of a table of classifiers: columns, picture and page."""

from __future__ import annotations

import math

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nflows_iresnet.experiments.pictures import DATA, INK, MODEL, STYLE, as_png
from nflows_iresnet.experiments.report import Page, Section, command_of
from nflows_iresnet.experiments.table1.record import Record, Row
from nflows_iresnet.experiments.tables import Column, number

# --- the columns ----------------------------------------------------------------------------------


def columns_for(record: Record) -> list[Column[Row]]:
    """Return the columns: what is measured, then what was published."""
    names = dict.fromkeys(name for row in record.published.values() for name in row)
    return [*COLUMNS, *map(_published, names)]


def _published(name: str) -> Column[Row]:
    return Column(
        f"published\n{name}",
        f"Not measured here: test error in percent on {name} as published for the i-ResNet "
        "(Behrmann et al., 2019), with hundreds of layers and days of training; resnet is "
        "ResNet-164 there. There c bounds each layer, here each whole block, which is "
        "stricter.",
        lambda row: row.published.get(name, "-"),
    )


def _error(row: Row) -> str:
    if row.error_percent is None or row.error_se is None:
        return "-"
    return f"{row.error_percent:.2f} ± {row.error_se:.2f}"


def _inverted(row: Row) -> str:
    if row.inversion is None:
        return "-"
    found = row.inversion.num_images - row.inversion.num_failed
    return f"{found} of {row.inversion.num_images}"


def _of_inversion(row: Row, name: str) -> str:
    return "-" if row.inversion is None else number(getattr(row.inversion, name), ".1e")


COLUMNS: tuple[Column[Row], ...] = (
    Column("model", "c=0.9 is the invertible classifier with Lip(g) ≤ 0.9.", lambda row: row.model),
    Column(
        "test\nerror %",
        "Misclassified test images over all repeats ± binomial standard error, in percent.",
        _error,
        lambda row: row.error_percent,
    ),
    Column(
        "certified\nbound",
        "Largest certified bound of Lip(g) over the residual blocks and the repeats, from the "
        "weights after training; none where no branch g has one.",
        lambda row: "none" if row.lipschitz_bound is None else f"≤ {row.lipschitz_bound:.3f}",
    ),
    Column(
        "guaranteed\ninverse",
        "Whether the certified bound is below 1.",
        lambda row: "yes" if row.guaranteed_inverse else "no",
    ),
    Column(
        "inverse\nfound",
        "Test images for which fixed-point iteration reached its tolerance in every block.",
        _inverted,
    ),
    Column(
        "worst\nresidual",
        "Largest residual ‖x + g(x) - y‖ of a block, where the solver stopped or gave up.",
        lambda row: _of_inversion(row, "residual_max"),
    ),
    Column(
        "recon-\nstruction",
        "Largest error of a pixel of a test image after encode and decode; a level has width 1. "
        "Where the solver gave up, of the best point that it found.",
        lambda row: _of_inversion(row, "error_max"),
    ),
    Column("para-\nmeters", "Trained parameters.", lambda row: f"{row.num_parameters:,}"),
    Column(
        "training\n(s)",
        "Seconds of training per repeat, validation not counted.",
        lambda row: number(row.train_seconds, ".1f"),
    ),
)


# --- the picture ----------------------------------------------------------------------------------


def draw(record: Record) -> bytes:
    """Draw test errors, and what the inverse misses, against the bound c, as a PNG.

    Certified classifiers are red, those without guarantee grey.
    """
    rows = [row for row in record.rows() if row.error_percent is not None]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_errors(left, rows)
        left.set_ylabel(f"test error on {record.data.name} (%)")
        _draw_reconstructions(right, [row for row in rows if row.inversion is not None])
        return as_png(figure)


def _draw_errors(axes: Axes, rows: list[Row]) -> None:
    for place, row in enumerate(rows):
        error, color = row.error_percent or 0.0, _color(row)
        axes.errorbar(place, error, yerr=row.error_se, fmt="o", capsize=4, color=color)
    _name_rows(axes, rows)
    axes.set_ylim(bottom=0)


def _draw_reconstructions(axes: Axes, rows: list[Row]) -> None:
    errors = [math.nan if row.inversion is None else row.inversion.error_max for row in rows]
    axes.bar(range(len(rows)), errors, color=[_color(row) for row in rows], width=0.6)
    _name_rows(axes, rows)
    axes.set_yscale("log")
    axes.set_ylabel("largest reconstruction error\n(levels of a pixel)")
    axes.axhline(0.5, color=INK, lw=0.8, ls=":")
    axes.annotate(
        "above: pixels are lost", (1, 0.5), xycoords=("axes fraction", "data"), ha="right",
        xytext=(-4, 3), textcoords="offset points", color=INK,
    )  # fmt: skip


def _name_rows(axes: Axes, rows: list[Row]) -> None:
    axes.set_xticks(range(len(rows)), [row.model for row in rows])
    axes.set_xlabel("red: inverse guaranteed, grey: not")
    axes.spines[["top", "right"]].set_visible(False)


def _color(row: Row) -> str:
    return MODEL if row.guaranteed_inverse else DATA


# --- the page -------------------------------------------------------------------------------------

FAIRNESS = (
    "All rows but resnet are one architecture, with ordinary or with certified convolutions; "
    "resnet has as many blocks and the width that comes nearest to as many parameters. Every "
    "row sees the same images in the same order, is trained by Adam with the same learning "
    "rate, cosine schedule and gradient clipping, without augmentation but the random shifts "
    "named below, if any, and the state with the "
    "best cross-entropy on the validation images is kept. The standard error counts each "
    "distinct test image once, however many repeats saw it. The guarantee is read off the "
    "certified bound of the trained weights."
)


def render(record: Record, picture: bytes) -> str:
    """Render the page."""
    rows, columns = record.rows(), columns_for(record)
    section = Section(
        caption=f"{record.caption()}. Source: {record.data.source}; {record.data.split}.",
        tables=[(columns, rows, "")],
        notes=record.captures(),
        failures=[f"{row.model} failed: {text}" for row in rows for text in row.failures],
        pictures=[("errors", picture, "")],
    )
    return Page(
        f"nflows-iresnet table1: {record.data.name}",
        f"What a guaranteed inverse costs a classifier: {record.data.name}",
        [section],
        record,
        command_line(record),
        glossary=columns,
        explanation=FAIRNESS,
    ).render()


def command_line(record: Record) -> str:
    """Return the command that repeats the run."""
    arguments = dict(record.arguments)
    return command_of("table1", [arguments.pop("dataset")], arguments)
