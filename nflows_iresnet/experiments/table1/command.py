"""`nflows-iresnet table1`: its record, the command, and the table, picture and page it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nflows_iresnet.datasets import ImageDataset
from nflows_iresnet.experiments import published, session
from nflows_iresnet.experiments.config import resolve_device
from nflows_iresnet.experiments.options import Table1Options
from nflows_iresnet.experiments.pictures import DATA, INK, MODEL, STYLE, as_png, label_plainly
from nflows_iresnet.experiments.record import RunRecord
from nflows_iresnet.experiments.report import Page, Section, command_of
from nflows_iresnet.experiments.session import Session
from nflows_iresnet.experiments.table1 import QUICK, TUNED, Settings
from nflows_iresnet.experiments.table1.classifiers import (
    ClassifierJob,
    Inversion,
    Outcome,
    Size,
    builders,
    load,
)
from nflows_iresnet.experiments.tables import (
    Column,
    bounded,
    make_console,
    number,
    print_grid,
    stopped_early,
)
from nflows_iresnet.files import write_atomically

# --- what is kept ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSummary:
    """What a reader needs to know about the images.

    Args:
        split: how the splits of the first repeat were made.
        levels: values that a pixel can take.
        num_train, num_test: images per repeat.
        num_distinct: distinct test images over all repeats.
    """

    name: str
    source: str
    split: str
    shape: tuple[int, ...]
    levels: int
    num_classes: int
    num_train: int
    num_test: int
    num_distinct: int


@dataclass(frozen=True)
class Row:
    """One classifier over all its repeats.

    Args:
        error_se: binomial standard error of the test error, for the distinct test images.
        lipschitz_bound: the largest over the repeats, None where none is known.
        guaranteed_inverse: whether that bound is below 1.
        inversion: the worst over the repeats, counts added up.
        train_seconds: mean over the repeats.
    """

    model: str
    error_percent: float | None
    error_se: float | None
    lipschitz_bound: float | None
    guaranteed_inverse: bool
    inversion: Inversion | None
    num_parameters: int
    train_seconds: float
    published: dict[str, str]
    failures: tuple[str, ...]


@dataclass(frozen=True)
class TableRecord(RunRecord):
    """The content of results.json; published are test errors in percent, by row and data set."""

    FORMAT = "table1-1"
    DERIVED = ("table",)
    command: ClassVar[str] = "table1"

    data: DataSummary
    published: dict[str, dict[str, str]]
    outcomes: tuple[Outcome, ...] = ()

    @property
    def described_data(self) -> DataSummary:
        """What is known of the images."""
        return self.data

    @property
    def table(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return [asdict(row) for row in self.rows()]

    def rows(self) -> list[Row]:
        """Return the rows of the table."""
        models = dict.fromkeys(outcome.model for outcome in self.outcomes)
        return [self._row([each for each in self.outcomes if each.model == m]) for m in models]

    def _row(self, outcomes: Sequence[Outcome]) -> Row:
        name, done = outcomes[0].model, [each for each in outcomes if each.failure is None]
        known = [each.lipschitz_bound for each in done if each.lipschitz_bound is not None]
        bound = max(known) if known and len(known) == len(done) else None
        error, standard_error = _test_error(done, self.data.num_distinct)
        return Row(
            model=name,
            error_percent=error,
            error_se=standard_error,
            lipschitz_bound=bound,
            guaranteed_inverse=bound is not None and bound < 1,
            inversion=_worst([each.inversion for each in done if each.inversion is not None]),
            num_parameters=outcomes[0].num_parameters,
            train_seconds=sum(each.train_seconds for each in done) / max(1, len(done)),
            published=self.published.get(name, {}),
            failures=tuple(each.failure for each in outcomes if each.failure is not None),
        )

    def early_stops(self) -> list[str]:
        """Say of each training that stopped before the end of its schedule where it was best."""
        return [
            stopped_early(f"{each.model}, repeat {each.repeat},", each.steps, each.best_step)
            for each in self.outcomes
            if each.stopped == "patience"
        ]

    def captures(self) -> list[str]:
        """Say of each row whose steps ran one by one on a GPU why they were not one graph."""
        reasons = {each.model: each.capture_reason for each in self.outcomes}
        return [
            f"{model}: its training step was not captured as one CUDA graph: {reason}"
            for model, reason in reasons.items()
            if reason is not None
        ]

    def caption(self) -> str:
        """Describe the images and the training in one line."""
        data, repeats = self.data, self.arguments["repeats"]
        budget = self.arguments.get("budget")
        length = (
            f"up to {self.arguments['steps']} steps"
            if budget is None
            else f"up to {budget:g} s of training"
        )
        return (
            f"{data.num_train} training and {data.num_test} test images of "
            f"{'x'.join(map(str, data.shape))}, {repeats} repeat{'s' if repeats > 1 else ''}, "
            f"{data.num_distinct} distinct test images, {length}"
        )


def _test_error(outcomes: Sequence[Outcome], distinct: int) -> tuple[float | None, float | None]:
    """Return the test error in percent and its binomial standard error."""
    total = sum(each.num_test for each in outcomes)
    if not total:
        return None, None
    rate = sum(each.num_wrong for each in outcomes) / total
    return 100 * rate, 100 * math.sqrt(rate * (1 - rate) / min(total, distinct))


def _worst(inversions: Sequence[Inversion]) -> Inversion | None:
    """Add the counts and take the largest errors; NaN is worse than any."""
    if not inversions:
        return None
    images, failed, *errors = zip(*map(astuple, inversions), strict=True)
    return Inversion(sum(images), sum(failed), *(float(np.max(each)) for each in errors))


# --- the command ----------------------------------------------------------------------------------


def to_settings(parsed: Table1Options) -> Settings:
    """Turn parsed arguments into settings.

    Raises:
        ValueError: a value cannot work.
    """
    device = resolve_device(parsed.device)
    defaults = asdict(Settings()) | TUNED.get(parsed.dataset, {}).get(device, {})
    chosen = parsed.choose(defaults | QUICK if parsed.quick else defaults)
    coeffs = tuple(dict.fromkeys(chosen["coeffs"]))
    return Settings(**{**chosen, "coeffs": coeffs, "device": device})


def open_session(parsed: Table1Options) -> TableSession:
    """Check everything that can be checked, then create the output folder.

    Raises:
        ValueError: something cannot work; the message names it and nothing was written.
    """
    settings = to_settings(parsed)
    session.check_places(parsed, settings.device)
    data = [load(settings, repeat) for repeat in range(settings.repeats)]
    for build in builders(settings.coeffs).values():
        build(Size.of(data[0], settings))  # an impossible size is said before anything is trained
    record = TableRecord.begin(
        settings.as_arguments(),
        settings.device,
        data=_described(data),
        published=published.CLASSIFICATION_ERROR,
    )
    jobs = [
        ClassifierJob(model, repeat, settings, each)
        for model in builders(settings.coeffs)
        for repeat, each in enumerate(data)
    ]
    table = TableSession(parsed, record, session.folder_of(parsed, "table1"), jobs=jobs)
    table.begin()
    return table


run = partial(session.run, open_session)
"""Run the subcommand and return the exit status."""


def _described(data: Sequence[ImageDataset]) -> DataSummary:
    first, tests = data[0], torch.cat([each.test for each in data]).flatten(start_dim=1)
    return DataSummary(
        name=first.name,
        source=first.source,
        split=first.split,
        shape=first.shape,
        levels=first.levels,
        num_classes=first.num_classes,
        num_train=len(first.train),
        num_test=len(first.test),
        num_distinct=len(torch.unique(tests, dim=0)),
    )


@dataclass(kw_only=True)
class TableSession(Session[TableRecord]):
    """A table under way, with every row and every repeat."""

    jobs: Sequence[ClassifierJob]

    @property
    def files(self) -> Sequence[str]:
        """The picture and the page."""
        return "table1.png", "report.html"

    @property
    def runs(self) -> tuple[int, int]:
        """How many runs are finished, and how many there are."""
        return len(self.record.outcomes), len(self.jobs)

    def to_do(self) -> Sequence[ClassifierJob]:
        """Return the runs without an outcome."""
        finished = {outcome.key for outcome in self.record.outcomes}
        return [job for job in self.jobs if job.key not in finished]

    def take_in(self, job: ClassifierJob, found: Outcome) -> str:
        """Keep an outcome, in the order of the table, and return a line about it."""
        places = {each.key: place for place, each in enumerate(self.jobs)}
        outcomes = sorted((*self.record.outcomes, found), key=lambda each: places[each.key])
        self.save(replace(self.record, outcomes=tuple(outcomes)))
        self.keeper(job).discard()
        if found.failure is not None:
            return f"{job.label}: FAILED {found.failure}"
        reason = found.capture_reason
        eager = "" if reason is None else f"; steps not captured: {reason}"
        return f"{job.label}: {found.num_wrong} of {found.num_test} test images wrong{eager}"

    def report(self) -> Path:
        """Draw the picture, write the page, and print the table."""
        record, picture = self.record, draw(self.record)
        write_atomically(self.folder.path / "table1.png", picture)
        page = self.folder.path / "report.html"
        write_atomically(page, render(record, picture).encode())
        if self.parsed.quiet:
            return page
        console = make_console(width=140)
        console.print(f"\n[bold]{record.data.name}[/]: {record.caption()}")
        print_grid(console, columns_for(record), record.rows())
        for line in record.early_stops():
            console.print(line, highlight=False, markup=False)
        for line in record.captures():
            console.print(line, style="yellow", markup=False)
        for row in record.rows():
            for failure in row.failures:
                console.print(f"{row.model} FAILED {failure}", style="red", markup=False)
        return page


# --- the columns ----------------------------------------------------------------------------------


def columns_for(record: TableRecord) -> list[Column[Row]]:
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
        lambda row: "none" if row.lipschitz_bound is None else bounded(row.lipschitz_bound),
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


def draw(record: TableRecord) -> bytes:
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
    label_plainly(axes.yaxis)
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
    "named below, if any, stops where the cross-entropy of the validation images has not fallen "
    "for a while, and the state with the best one is kept. The standard error counts each "
    "distinct test image once, however many repeats saw it. The guarantee is read off the "
    "certified bound of the trained weights."
)


def render(record: TableRecord, picture: bytes) -> str:
    """Render the page."""
    rows, columns = record.rows(), columns_for(record)
    arguments = dict(record.arguments)
    section = Section(
        caption=f"{record.caption()}. Source: {record.data.source}; {record.data.split}.",
        tables=[(columns, rows, "")],
        notes=record.early_stops() + record.captures(),
        failures=[f"{row.model} failed: {text}" for row in rows for text in row.failures],
        pictures=[("errors", picture, "")],
    )
    return Page(
        f"nflows-iresnet table1: {record.data.name}",
        f"What a guaranteed inverse costs a classifier: {record.data.name}",
        [section],
        record,
        command_of("table1", [arguments.pop("dataset")], arguments),
        glossary=columns,
        explanation=FAIRNESS,
    ).render()
