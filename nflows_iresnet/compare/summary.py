"""From results to the rows and columns that the terminal and the report both show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nflows_iresnet.compare.evaluation import Array, Metrics, mean_and_error
from nflows_iresnet.compare.results import DatasetSummary, Folder, Record, Result


@dataclass(frozen=True)
class Row:
    """One model on one data set: the median over repeats, for likelihoods the mean.

    Args:
        model: its name.
        num_parameters: trained parameters.
        ms_per_step: median time of a training step, milliseconds.
        repeats: how many repeats count.
        repeats_se: standard error of the test NLL over repeats, None for one repeat.
        failures: what went wrong in any repeat.
        metrics: the measurements.
    """

    model: str
    num_parameters: int
    ms_per_step: float | None
    repeats: int
    repeats_se: float | None
    failures: tuple[str, ...]
    metrics: Metrics


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Args:
        title: its heading, in one or two lines.
        help: one sentence on how to read it, with the unit.
        text: the cell of a row.
        rank: the number of which the smallest is best, or None for no ranking.
    """

    title: str
    help: str
    text: Callable[[Row], str]
    rank: Callable[[Row], float | None] = lambda row: None


def rows_of(record: Record, dataset: str) -> list[Row]:
    """Return one row per model, the best test NLL first and failures last."""
    results = record.of(dataset)
    models = dict.fromkeys(result.model for result in results)
    rows = [_row([result for result in results if result.model == model]) for model in models]
    return sorted(rows, key=lambda row: _or_infinity(row.metrics.test_nll))


def _row(results: list[Result]) -> Row:
    nlls = [r.metrics.test_nll for r in results if r.metrics.test_nll is not None]
    times = [r.training.ms_per_step for r in results if r.training is not None]
    return Row(
        model=results[0].model,
        num_parameters=results[0].num_parameters,
        ms_per_step=statistics.median(times) if times else None,
        repeats=len(nlls),
        repeats_se=mean_and_error(torch.tensor(nlls))[1] if nlls else None,
        failures=tuple(dict.fromkeys(text for r in results for text in r.failures)),
        metrics=_combine([r.metrics for r in results]),
    )


_MEANS = (
    "test_nll",
    "test_nll_se",
    "bits_per_dim",
    "bits_per_dim_se",
    "above_optimum",
    "above_optimum_se",
    "exact_gap",
)


def _combine(metrics: list[Metrics]) -> Metrics:
    combined: dict[str, float | None] = {}
    for name in Metrics.__dataclass_fields__:
        values = [getattr(m, name) for m in metrics if getattr(m, name) is not None]
        average = statistics.fmean if name in _MEANS else statistics.median_high
        combined[name] = average(values) if values else None
    return Metrics(**combined)  # type: ignore[arg-type]


def best(rows: list[Row], column: Column) -> set[str]:
    """Return the models whose cell is the best of its column, as far as it can be read."""
    ranks = {row.model: column.rank(row) for row in rows}
    known = [rank for rank in ranks.values() if rank is not None]
    if len(known) < 2:
        return set()
    winners = {row.model for row in rows if ranks[row.model] == min(known)}
    texts = {column.text(row) for row in rows if row.model in winners}
    return {row.model for row in rows if column.text(row) in texts}


def columns_for(record: Record, dataset: DatasetSummary) -> list[Column]:
    """Return the columns that a data set's table needs."""
    repeated = any(result.repeat for result in record.of(dataset.name))
    optimal = dataset.optimum is not None
    left_out = {ABOVE.title: not optimal, REPEATS.title: not repeated}
    columns = [column for column in COLUMNS if not left_out.get(column.title, False)]
    if dataset.shape is not None:
        return _image_columns(dataset, columns)
    return columns if dataset.levels is None else [*columns[:2], _bits(dataset), *columns[2:]]


def caption(dataset: DatasetSummary) -> str:
    """Describe a data set in one line."""
    text = (
        f"{dataset.num_train} training, {dataset.num_validation} validation and "
        f"{dataset.num_test} test rows of {dataset.features} dimensions"
    )
    if dataset.shape is not None:
        return f"{text}: images of {'x'.join(map(str, dataset.shape))}, {dataset.levels} levels"
    if dataset.optimum is not None:
        text += f"; the true density scores {_with_error(dataset.optimum, dataset.optimum_se)} nats"
    if dataset.log_scale:
        text += f"; standardised: add {dataset.log_scale:.3f} nats for the units of the source"
    return text


def verdict(record: Record, folder: Folder, dataset: str) -> str:
    """Say in one line which model has the best test NLL, and whether the lead is significant."""
    rows = [row for row in rows_of(record, dataset) if row.metrics.test_nll is not None]
    if not rows:
        return "No model finished."
    if len(rows) == 1:
        return f"Only {rows[0].model} finished."
    first, second = rows[:2]
    better, worse = (_mean_log_prob(record, folder, dataset, row.model) for row in (first, second))
    lead, error = mean_and_error(torch.from_numpy(better - worse))
    gap = f"by {_with_error(lead, error)} nats on the same test rows"
    if lead < 2 * (error or 0.0):
        return f"{first.model} and {second.model} are level: they differ {gap}."
    return f"{first.model} is best: ahead of {second.model} {gap}."


def _mean_log_prob(record: Record, folder: Folder, dataset: str, model: str) -> Array:
    keys = [result.key for result in record.of(dataset) if result.model == model]
    arrays = [folder.load_arrays(key) for key in keys]
    found = [array["test_log_prob"] for array in arrays if "test_log_prob" in array]
    total: Array = sum(found[1:], start=found[0].astype("float64"))
    return total / len(found)


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def _power(value: float | None) -> str:
    return _number(value, ".0e").replace("e-0", "e-").replace("e+0", "e+")


def _round_trip(row: Row) -> str:
    largest, median = row.metrics.round_trip_max, row.metrics.round_trip_median
    return "-" if largest is None else f"{_power(largest)} ({_power(median)})"


def _bits(dataset: DatasetSummary) -> Column:
    def bits(row: Row) -> float | None:
        return None if row.metrics.test_nll is None else dataset.bits_per_dim(row.metrics.test_nll)

    def text(row: Row) -> str:
        value, error = bits(row), row.metrics.bits_per_dim_se
        if value is None or error is None:
            return _number(value, ".3f")
        sign = "" if row.metrics.test_nll_exact else "\nestimated"
        return f"{value:.4f} ± {error:.4f}{sign}"

    return Column(
        "bits\nper dim",
        "The test NLL as bits per dimension of the quantised source, lower is better.",
        text,
        bits,
    )


def _image_columns(dataset: DatasetSummary, columns: list[Column]) -> list[Column]:
    """Return the columns for images: bits instead of nats, and the estimator beside the truth."""
    kept = [IMAGE_SAMPLES if column is SAMPLES else column for column in columns]
    return [kept[0], _bits(dataset), *kept[1:-1], AGREEMENT, kept[-1]]


def _gap(row: Row) -> str:
    gap, rows = row.metrics.exact_gap, row.metrics.exact_rows
    return "-" if gap is None else f"{_with_error(gap, row.metrics.exact_gap_se)}\nof {rows}"


def _lipschitz(row: Row) -> str:
    if row.metrics.lipschitz is None:
        return "-"
    certified, value = row.metrics.lipschitz_certified, row.metrics.lipschitz
    return f"≤ {value:.3f}" if certified else f"≈ {value:.3f}\nnot guaranteed"


ABOVE = Column(
    "above\noptimum",
    "Nats lost to the true density: mean difference on the same test rows ± its standard error. "
    "Zero is perfect.",
    lambda row: _with_error(row.metrics.above_optimum, row.metrics.above_optimum_se),
    lambda row: row.metrics.above_optimum,
)
REPEATS = Column(
    "± over\nrepeats",
    "Standard error of the test NLL over repeats with other seeds, in nats.",
    lambda row: _number(row.repeats_se, ".3f"),
)
SAMPLES = Column(
    "sample\n10,000 (s)",
    "Seconds to draw 10,000 samples.",
    lambda row: _number(row.metrics.sample_seconds, ".2f"),
    lambda row: row.metrics.sample_seconds,
)
IMAGE_SAMPLES = replace(SAMPLES, title="sample\n256 (s)", help="Seconds to draw 256 samples.")
AGREEMENT = Column(
    "estimate\n- exact",
    "Mean of estimated minus exact log-density in nats, on as many test images as it says, ± its "
    "standard error over the draws of the estimator. Zero within the error, for it is unbiased.",
    _gap,
)
COLUMNS = (
    Column("model", "Its name; nflows-iresnet compare --list describes it.", lambda row: row.model),
    Column(
        "test NLL\n(nats)",
        "Mean negative log-likelihood of the test rows, lower is better, ± its standard error over "
        "the rows. The log-determinant is exact for every model, also where training estimates it, "
        "unless it says otherwise.",
        lambda row: _with_error(row.metrics.test_nll, row.metrics.test_nll_se),
        lambda row: row.metrics.test_nll,
    ),
    REPEATS,
    ABOVE,
    Column("para-\nmeters", "Trained parameters.", lambda row: f"{row.num_parameters:,}"),
    Column(
        "ms per\nstep",
        "Median time of a training step in milliseconds: forward, backward and update.",
        lambda row: _number(row.ms_per_step, ".1f"),
        lambda row: row.ms_per_step,
    ),
    SAMPLES,
    Column(
        "round trip\nmax (median)",
        "How far data -> noise -> data misses the test rows, in the units of the data: the largest "
        "coordinate, its maximum and its median over the rows.",
        _round_trip,
        lambda row: row.metrics.round_trip_max,
    ),
    Column(
        "memory\n(MB)",
        "Peak of tensor memory in forward and backward of one batch, in MB.",
        lambda row: _number(row.metrics.peak_memory_mb, ".1f"),
        lambda row: row.metrics.peak_memory_mb,
    ),
    Column(
        "Lipschitz\nbound",
        "Largest Lipschitz constant of a residual block; below 1 the inverse exists. ≤ is a "
        "certified bound; ≈ is a product of measured norms that nothing in the library guarantees.",
        _lipschitz,
    ),
)
