"""The tables of results: their columns, their rows, and how a terminal and Markdown show them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nflows_iresnet.experiments.config import describe
from nflows_iresnet.experiments.evaluation import CHUNK, NUM_VALIDATION_ROWS, Array, Metrics
from nflows_iresnet.experiments.folder import Folder
from nflows_iresnet.experiments.record import DatasetSummary, Record, Result

_WIDE = 124
DIVERGED = 1e6
"""Nats from which an NLL is not that of a model which learned something."""


class Named(Protocol):
    """A row of a table."""

    @property
    def model(self) -> str:
        """What the row is about."""


R = TypeVar("R", bound=Named)


def _unranked(row: object) -> None:
    """Rank no row of a column before another."""


@dataclass(frozen=True)
class Column(Generic[R]):
    """One column of a table.

    Args:
        title: its heading, in one or two lines.
        help: one sentence on how to read it, with the unit.
        text: the cell of a row.
        rank: the number of which the smallest is best, or None for no ranking.
        tables: the kinds of tables of `compare` and `table2` that have it.
        when: whether it says something about a data set.
    """

    title: str
    help: str
    text: Callable[[R], str]
    rank: Callable[[R], float | None] = _unranked
    tables: tuple[str, ...] = ("compare", "race", "table2")
    when: Callable[[Record, DatasetSummary], bool] = lambda record, dataset: True

    @property
    def name(self) -> str:
        """The heading in one line."""
        return self.title.replace("-\n", "").replace("\n", " ")


def number(value: float | None, style: str = ".3f", error: float | None = None) -> str:
    """Return a number in a format, with its error if there is one, or a dash."""
    if value is None:
        return "-"
    if abs(value) >= DIVERGED and style in (".2f", ".3f", ".4f"):
        style = ".3e"
    return f"{value:{style}}" if error is None else f"{value:{style}} ± {error:{style}}"


def bounded(value: float) -> str:
    """Return that something is at most a number, which is rounded up.

    Example:
        >>> bounded(0.7613), bounded(0.97)
        ('≤ 0.762', '≤ 0.970')
    """
    nearest = f"{value:.3f}"
    return f"≤ {nearest}" if float(nearest) >= value else f"≤ {value + 0.001:.3f}"


# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One model on one data set, over its repeats; `_OVER_REPEATS` says how.

    Args:
        failures: what went wrong in any repeat.
        repeats: how many repeats count.
        repeats_se: standard error of the test NLL over repeats, None for one repeat.
        repeats_bits_se: the same of the bits per dimension.
        seconds: time of a training, validation not counted.
    """

    model: str
    failures: tuple[str, ...]
    metrics: Metrics
    num_parameters: int
    repeats: int
    repeats_se: float | None = None
    repeats_bits_se: float | None = None
    ms_per_step: float | None = None
    seconds: float | None = None
    steps: float | None = None
    best_step: float | None = None
    learning_rate: float | None = None


_METRICS = [each.name for each in fields(Metrics)]
_LIKELIHOODS = ("test_nll", "bits_per_dim", "above_optimum", "exact_gap")
_OVER_REPEATS = {
    **dict.fromkeys(("num_parameters", "learning_rate"), "first"),
    **dict.fromkeys(("ms_per_step", "seconds", *_METRICS), "median"),
    **dict.fromkeys(("steps", "best_step", *_LIKELIHOODS), "mean"),
    **dict.fromkeys((f"{name}_se" for name in _LIKELIHOODS), "mean"),
    **dict.fromkeys(("round_trip_max", "lipschitz"), "max"),
    **dict.fromkeys(("test_nll_exact", "lipschitz_certified"), "min"),
}
"""What of several repeats is shown. A maximum, a bound and a guarantee are those of all."""


def rows_of(record: Record, dataset: str) -> list[Row]:
    """Return one row per model, the best test NLL first and failures last."""
    results = record.of(dataset)
    if not results:
        return []
    runs = pd.json_normalize([asdict(each) for each in results])
    numbers = runs.rename(columns=lambda name: re.sub(r"^(training|metrics)\.", "", name))
    numbers = numbers.reindex(columns=list(_OVER_REPEATS)).astype(float)
    groups = numbers.groupby(runs["model"], sort=False)
    table = groups.agg(_OVER_REPEATS)
    table["repeats"], table["repeats_se"] = groups["test_nll"].count(), groups["test_nll"].sem()
    table["repeats_bits_se"] = groups["bits_per_dim"].sem()
    ranked = table.sort_values("test_nll", kind="stable")
    return [_row(str(model), dict(values.dropna()), results) for model, values in ranked.iterrows()]


def _row(model: str, known: dict[str, Any], results: list[Result]) -> Row:
    failures = (text for each in results if each.model == model for text in each.failures)
    metrics = {name: known.pop(name) for name in _METRICS if name in known}
    counts = {name: int(known.pop(name)) for name in ("num_parameters", "repeats")}
    return Row(model, tuple(dict.fromkeys(failures)), Metrics(**metrics), **counts, **known)


# --- columns --------------------------------------------------------------------------------------


def columns_for(record: Record, dataset: DatasetSummary) -> list[Column[Row]]:
    """Return the columns of a data set's table: those of `COLUMNS` that apply, then published."""
    kind = "race" if record.is_race else record.command
    names = dict.fromkeys(name for row in record.published.values() for name in row)
    return [
        column
        for column in (*COLUMNS, *(_published(record, name) for name in names))
        if kind in column.tables and column.when(record, dataset)
    ]


def check_columns(record: Record) -> None:
    """Look at every column of a model of which nothing is known, before any is trained.

    Raises:
        ValueError: one cannot be shown; the message names it, and where its number is to come from.
    """
    nothing = Row("", (), Metrics(), num_parameters=1, repeats=1)
    for column in COLUMNS:
        try:
            if any(column.when(record, dataset) for dataset in record.datasets):
                cells([column], [nothing])
        except Exception as error:
            raise ValueError(
                f"column {column.name!r} of experiments/tables.py: {describe(error)}; a row has the"
                " fields of Row, and of Metrics in experiments/evaluation.py: None if not measured"
            ) from error


def _published(record: Record, name: str) -> Column[Row]:
    return Column(
        f"published\n{name}",
        f"Not measured here: bits per dimension on {name} as its authors published it, with large "
        "networks and days of training. † with ZCA, not comparable.",
        lambda row: record.published.get(row.model, {}).get(name, "-"),
        tables=("table2",),
        when=lambda record, dataset: dataset.levels is not None,
    )


def _measured(
    title: str, help: str, name: str, style: str = ".3f", *, error: str = "", **others: Any
) -> Column[Row]:
    """Return a column of one attribute of the rows, of which the smallest is best."""
    value, spread = attrgetter(name), attrgetter(error) if error else _unranked
    text: Callable[[Row], str] = lambda row: number(value(row), style, spread(row))  # noqa: E731
    return Column(title, help, text, **{"rank": value, **others})


def _bits(row: Row) -> str:
    value, error = row.metrics.bits_per_dim, row.metrics.bits_per_dim_se
    if error is None:
        return number(value)
    return number(value, ".4f", error) + ("" if row.metrics.test_nll_exact else "\nestimated")


def _round_trip(row: Row) -> str:
    largest, median = (
        re.sub(r"e([-+])0", r"e\1", number(value, ".0e"))
        for value in (row.metrics.round_trip_max, row.metrics.round_trip_median)
    )
    return "-" if largest == "-" else f"{largest} ({median})"


def _gap(row: Row) -> str:
    gap, rows = row.metrics.exact_gap, number(row.metrics.exact_rows, ".0f")
    error = row.metrics.exact_gap_se
    digits = min(8, max(3, 1 - math.floor(math.log10(error)))) if error and error > 0 else 3
    return "-" if gap is None else f"{number(gap, f'.{digits}f', error)}\nof {rows}"


def _lipschitz(row: Row) -> str:
    if row.metrics.lipschitz is None:
        return "-"
    certified, value = row.metrics.lipschitz_certified, row.metrics.lipschitz
    return bounded(value) if certified else f"≈ {value:.3f}\nnot guaranteed"


def in_bits(record: Record, dataset: DatasetSummary) -> bool:
    """Whether a table has bits per dimension, and no nats."""
    return record.command == "table2" and not record.is_race and dataset.levels is not None


def _is_repeated(record: Record, dataset: DatasetSummary) -> bool:
    return any(each.repeat for each in record.of(dataset.name))


_NOT_RACE = ("compare", "table2")
COLUMNS: tuple[Column[Row], ...] = (
    Column("model", "Its name; nflows-iresnet compare --list describes it.", lambda row: row.model),
    Column(
        "bits\nper dim",
        "The test NLL as bits per dimension of the quantised source, lower is better.",
        _bits,
        lambda row: row.metrics.bits_per_dim,
        tables=_NOT_RACE,
        when=lambda record, dataset: dataset.levels is not None,
    ),
    _measured(
        "bits\nper dim",
        "The test NLL as bits per dimension of the quantised source, lower is better: mean over "
        "the seeds ± its standard error over the seeds.",
        "metrics.bits_per_dim",
        ".4f",
        error="repeats_bits_se",
        tables=("race",),
        when=lambda record, dataset: dataset.levels is not None,
    ),
    _measured(
        "test NLL\n(nats)",
        "Mean negative log-likelihood of the test rows, lower is better, ± its standard error over "
        "the rows. The log-determinant is exact for every model, also where training estimates it, "
        "unless it says otherwise.",
        "metrics.test_nll",
        error="metrics.test_nll_se",
        tables=_NOT_RACE,
        when=lambda record, dataset: record.command == "compare" or dataset.levels is None,
    ),
    _measured(
        "test NLL\n(nats)",
        "Mean negative log-likelihood of the test rows over the seeds, lower is better, ± the "
        "standard error of that mean over the seeds (none for one seed). The log-determinant is "
        "exact, but for large images.",
        "metrics.test_nll",
        error="repeats_se",
        tables=("race",),
    ),
    Column(
        "seeds",
        "Seeds over which the mean is taken.",
        lambda row: str(row.repeats),
        tables=("race",),
    ),
    _measured(
        "± over\nrepeats",
        "Standard error of the test NLL over repeats with other seeds, in nats.",
        "repeats_se",
        rank=_unranked,
        tables=_NOT_RACE,
        when=lambda record, dataset: (
            _is_repeated(record, dataset) and (record.command == "compare" or not dataset.levels)
        ),
    ),
    _measured(
        "± over\nrepeats",
        "Standard error of the bits per dimension over repeats with other seeds.",
        "repeats_bits_se",
        ".4f",
        rank=_unranked,
        tables=("table2",),
        when=lambda record, dataset: bool(dataset.levels) and _is_repeated(record, dataset),
    ),
    _measured(
        "above\noptimum",
        "Nats lost to the true density: mean difference on the same test rows ± its standard "
        "error. Zero is perfect.",
        "metrics.above_optimum",
        error="metrics.above_optimum_se",
        tables=_NOT_RACE,
        when=lambda record, dataset: dataset.optimum is not None,
    ),
    _measured(
        "steps",
        "Optimiser steps in the time, mean over the seeds.",
        "steps",
        ".0f",
        rank=_unranked,
        tables=("race",),
    ),
    _measured(
        "best\nat step",
        "The step whose state validated best, and is what is tested; mean over the seeds.",
        "best_step",
        ".0f",
        rank=_unranked,
        tables=("race",),
    ),
    Column("para-\nmeters", "Trained parameters.", lambda row: f"{row.num_parameters:,}"),
    _measured(
        "ms per\nstep",
        "Median time of a training step in milliseconds: forward, backward and update.",
        "ms_per_step",
        ".1f",
        tables=("compare", "race"),
    ),
    _measured(
        "training\n(s)",
        "Seconds of training, validation not counted.",
        "seconds",
        ".1f",
        tables=("race", "table2"),
    ),
    _measured(
        "learning\nrate",
        "Initial learning rate, chosen on the validation rows where several were tried.",
        "learning_rate",
        "g",
        rank=_unranked,
        tables=("race", *_NOT_RACE),
        when=lambda record, dataset: record.is_race or bool(record.trials),
    ),
    *(
        _measured(
            f"sample\n{count} (s)",
            f"Seconds to draw {count} samples.",
            "metrics.sample_seconds",
            ".2f",
            tables=_NOT_RACE,
            when=when,
        )
        for count, when in (
            ("10,000", lambda record, dataset: dataset.shape is None),
            ("256", lambda record, dataset: dataset.shape is not None),
        )
    ),
    Column(
        "round trip\nmax (median)",
        "How far data -> noise -> data misses the test rows, in the units that a model sees: of "
        "tables standard deviations of the training rows, of images levels of a pixel. The largest "
        "coordinate, its maximum over the rows and repeats, and its median over the rows.",
        _round_trip,
        lambda row: row.metrics.round_trip_max,
        tables=("compare",),
    ),
    _measured(
        "memory\n(MB)",
        "Peak of tensor memory in forward and backward of one batch, in MB.",
        "metrics.peak_memory_mb",
        ".1f",
        tables=("compare",),
    ),
    Column(
        "estimate\n- exact",
        "Mean of estimated minus exact log-density in nats, on as many test images as it says, ± "
        "its standard error over the draws of the estimator. Zero within the error, for it is "
        "unbiased.",
        _gap,
        tables=_NOT_RACE,
        when=lambda record, dataset: dataset.shape is not None,
    ),
    Column(
        "Lipschitz\nbound",
        "Largest Lipschitz constant of a residual block, over the repeats; below 1 the inverse "
        "exists. ≤ is a certified bound; ≈ is a product of measured norms that nothing in the "
        "library guarantees.",
        _lipschitz,
        tables=_NOT_RACE,
    ),
)


# --- what is said beside a table ------------------------------------------------------------------


def caption(dataset: DatasetSummary) -> str:
    """Describe a data set in one line."""
    used = NUM_VALIDATION_ROWS
    some = f" ({used} of them looked at)" if dataset.num_validation > used else ""
    text = (
        f"{dataset.num_train} training, {dataset.num_validation} validation{some} and "
        f"{dataset.num_test} test rows of {dataset.features} dimensions"
    )
    if dataset.shape is not None:
        return f"{text}: images of {'x'.join(map(str, dataset.shape))}, {dataset.levels} levels"
    if dataset.optimum is not None:
        optimum = number(dataset.optimum, error=dataset.optimum_se)
        text += f"; the true density scores {optimum} nats"
    if dataset.log_scale:
        text += f"; standardised: add {dataset.log_scale:.3f} nats for the units of the source"
    return text


def rates_tried(record: Record, dataset: str) -> list[str]:
    """Say what each learning rate validated that was tried, and what the trials took."""
    trials = [each for each in record.trials if each.dataset == dataset]
    lines = []
    for model in dict.fromkeys(each.model for each in trials):
        tried = (
            f"{each.learning_rate:g}: "
            + ("failed" if each.validation is None else number(each.validation))
            for each in record.trials_of(dataset, model)
        )
        lines.append(f"- {model}: {', '.join(tried)}")
    spent = sum(each.seconds for each in trials)
    about = (
        f"Validation NLL by learning rate, with the first seed ({spent:.0f} s in all; the best "
        "goes on as the first repeat):"
    )
    return [about, *lines] if lines else []


def early_stops(record: Record, dataset: str) -> list[str]:
    """Say of each training that stopped before the end of its schedule where it was best."""
    return [
        stopped_early(
            f"{each.model}{f', repeat {each.repeat},' if each.repeat else ''}",
            each.training.steps,
            each.training.best_step,
        )
        for each in record.of(dataset)
        if each.training is not None and each.training.stopped == "patience"
    ]


def stopped_early(who: str, steps: int, best_step: int) -> str:
    """Say where a training stopped before the end of its schedule, and where it was best."""
    return f"{who} stopped early, at step {steps}: its best validation was at step {best_step}"


def captures(record: Record, dataset: str) -> list[str]:
    """Say of each model whose steps ran one by one on a GPU why they were not one graph."""
    logs = {each.model: each.training for each in record.of(dataset) if each.training is not None}
    return [
        f"{model}: its training step was not captured as one CUDA graph: {log.capture_reason}"
        for model, log in logs.items()
        if log.capture_reason is not None
    ]


def verdict(record: Record, folder: Folder, dataset: str) -> str:
    """Say which model has the best test NLL, and whether it leads in spite of rows and seeds."""
    rows = [row for row in rows_of(record, dataset) if row.metrics.test_nll is not None]
    if not rows:
        return "No model finished."
    if len(rows) == 1:
        return f"Only {rows[0].model} finished."
    first, second = rows[:2]
    if (nll := first.metrics.test_nll or 0.0) >= DIVERGED:
        return f"No model is best, for all diverged: {first.model} has {number(nll)} nats."
    if (nll := second.metrics.test_nll or 0.0) >= DIVERGED:
        return f"{first.model} is best: all others diverged, {second.model} at {number(nll)} nats."
    better, worse = (_mean_log_prob(record, folder, dataset, row.model) for row in (first, second))
    if better is None or worse is None:
        return f"{first.model} is best; by how much, its arrays would say, and they are gone."
    summary = next(each for each in record.datasets if each.name == dataset)
    bits = in_bits(record, summary)
    ahead = pd.Series(better - worse) / (summary.features * math.log(2) if bits else 1.0)
    if len(ahead) == 1:
        return f"{first.model} is best on the one test row, which says nothing of others."
    lead, over_rows = ahead.mean(), ahead.sem()
    if False in (first.metrics.test_nll_exact, second.metrics.test_nll_exact):
        chunks = ahead.groupby(ahead.index // CHUNK).mean()[: len(ahead) // CHUNK]
        over_rows = max(over_rows, chunks.sem() if len(chunks) > 1 else 0.0)
    spreads = [row.repeats_bits_se if bits else row.repeats_se for row in (first, second)]
    error = math.hypot(over_rows, *(each or 0.0 for each in spreads))
    unit, style = ("bits per dimension", ".4f") if bits else ("nats", ".3f")
    gap = f"by {number(lead, style, error)} {unit} on the same test rows"
    if lead < 2 * error:
        return f"{first.model} and {second.model} are level: they differ {gap}."
    return f"{first.model} is best: ahead of {second.model} {gap}."


def _mean_log_prob(record: Record, folder: Folder, dataset: str, model: str) -> Array | None:
    """Return the log-density of each test row, (N,); None if its files are gone."""
    keys = [result.key for result in record.of(dataset) if result.model == model]
    arrays = [folder.load_arrays(key) for key in keys]
    found = [array["test_log_prob"] for array in arrays if "test_log_prob" in array]
    return np.mean(found, axis=0, dtype="float64") if found else None


# --- the terminal and Markdown --------------------------------------------------------------------


def make_console(width: int = _WIDE) -> Console:
    """Return a console on stdout; without a terminal it is wide enough for the table."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def print_table(console: Console, record: Record, folder: Folder, dataset: DatasetSummary) -> None:
    """Print one data set: its table, what failed, and who won."""
    console.print(f"\n[bold]{escape(dataset.name)}[/]: {caption(dataset)}", highlight=False)
    for note in dataset.notes:
        console.print(note, highlight=False, markup=False)
    rows = rows_of(record, dataset.name)
    print_grid(console, columns_for(record, dataset), rows)
    for row in rows:
        for failure in row.failures:
            console.print(f"{row.model} FAILED {failure}", style="red", markup=False)
    for line in (*rates_tried(record, dataset.name), *early_stops(record, dataset.name)):
        console.print(line, highlight=False, markup=False)
    for line in captures(record, dataset.name):
        console.print(line, style="yellow", markup=False)
    console.print(verdict(record, folder, dataset.name), highlight=False)


def print_grid(console: Console, columns: Sequence[Column[R]], rows: Sequence[R]) -> None:
    """Print rows and columns, the best of each column in bold, folded where they are too wide."""
    wide = _grid(columns, rows, folded=False)
    fits = Console(width=1000).measure(wide).maximum <= console.width
    console.print(wide if fits else _grid(columns, rows, folded=True))


def _grid(columns: Sequence[Column[R]], rows: Sequence[R], *, folded: bool) -> Table:
    """Return the table; folded, it breaks titles at spaces, and cells before errors."""
    padding = (0, 0, 0, 0 if folded else 1)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=padding, leading=int(folded))
    for column in columns:
        title = column.title.replace(" ", "\n") if folded else column.title
        if column.title == "model":
            table.add_column(title, vertical="bottom", no_wrap=True)
        else:
            table.add_column(title, justify="right", vertical="bottom", overflow="fold")
    for line in cells(columns, rows):
        texts = [re.sub(r" (?=[±(])", "\n", text) if folded else text for text, _ in line]
        styles = ["bold green" if is_best else "" for _, is_best in line]
        table.add_row(*map(Text, texts, styles))
    return table


def cells(columns: Sequence[Column[R]], rows: Sequence[R]) -> list[list[tuple[str, bool]]]:
    """Return for each row the text of every column, and whether it is the column's best."""
    winners = [_best(rows, column) for column in columns]
    pairs = list(zip(columns, winners, strict=True))
    return [[(column.text(row), row.model in best) for column, best in pairs] for row in rows]


def _best(rows: Sequence[R], column: Column[R]) -> set[str]:
    """Return the models whose cell is the best of its column, as far as it can be read."""
    ranks = {row.model: rank for row in rows if (rank := column.rank(row)) is not None}
    if len(ranks) < 2:
        return set()
    least = min(ranks.values())
    texts = {column.text(row) for row in rows if ranks.get(row.model) == least}
    return {row.model for row in rows if column.text(row) in texts}


def markdown(columns: Sequence[Column[R]], rows: Sequence[R]) -> str:
    """Render rows and columns in Markdown, which pandas would need another library for."""
    body = [[text.replace("\n", " ") for text, _ in line] for line in cells(columns, rows)]
    head = [column.name for column in columns]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
