"""The columns of the tables."""

from __future__ import annotations

from dataclasses import replace

from nflows_iresnet.experiments.cells import Column, number, power, with_error
from nflows_iresnet.experiments.record import DatasetSummary, Record
from nflows_iresnet.experiments.summary import Row


def columns_for(record: Record, dataset: DatasetSummary) -> list[Column[Row]]:
    """Return the columns that a data set's table needs."""
    if record.is_race:
        return _race_columns(dataset)
    if record.published:
        return _table2_columns(record, dataset)
    repeated = any(result.repeat for result in record.of(dataset.name))
    optimal = dataset.optimum is not None
    left_out = {ABOVE.title: not optimal, REPEATS.title: not repeated}
    columns = [column for column in COLUMNS if not left_out.get(column.title, False)]
    if dataset.shape is not None:
        return _image_columns(dataset, columns)
    return columns if dataset.levels is None else [*columns[:2], _bits(dataset), *columns[2:]]


def _table2_columns(record: Record, dataset: DatasetSummary) -> list[Column[Row]]:
    """Return the columns of a table of generative models: the score, its cost, the published."""
    score = [NLL, ABOVE] if dataset.levels is None else [_bits(dataset)]
    score = [column for column in score if column is not ABOVE or dataset.optimum is not None]
    samples = SAMPLES if dataset.shape is None else IMAGE_SAMPLES
    names = dict.fromkeys(name for row in record.published.values() for name in row)
    published = [_published(record, name) for name in names if dataset.levels is not None]
    agreement = [] if dataset.shape is None else [AGREEMENT]
    return [MODEL, *score, *agreement, PARAMETERS, TRAINING, samples, LIPSCHITZ, *published]


def _race_columns(dataset: DatasetSummary) -> list[Column[Row]]:
    """Return the columns of a race: the score over the seeds, and what it was reached with."""
    bits = [] if dataset.levels is None else [_bits(dataset)]
    return [MODEL, MEAN_NLL, SEEDS, *bits, STEPS, BEST_STEP, STEP, TRAINING, RATE, PARAMETERS]


def _published(record: Record, name: str) -> Column[Row]:
    return Column(
        f"published\n{name}",
        f"Not measured here: bits per dimension on {name} as its authors published it, with large "
        "networks and days of training. † with ZCA, not comparable.",
        lambda row: record.published.get(row.model, {}).get(name, "-"),
    )


def _round_trip(row: Row) -> str:
    largest, median = row.metrics.round_trip_max, row.metrics.round_trip_median
    return "-" if largest is None else f"{power(largest)} ({power(median)})"


def _bits(dataset: DatasetSummary) -> Column[Row]:
    def text(row: Row) -> str:
        value, error = row.metrics.bits_per_dim, row.metrics.bits_per_dim_se
        if value is None or error is None:
            return number(value, ".3f")
        sign = "" if row.metrics.test_nll_exact else "\nestimated"
        return f"{value:.4f} ± {error:.4f}{sign}"

    return Column(
        "bits\nper dim",
        "The test NLL as bits per dimension of the quantised source, lower is better.",
        text,
        lambda row: row.metrics.bits_per_dim,
    )


def _image_columns(dataset: DatasetSummary, columns: list[Column[Row]]) -> list[Column[Row]]:
    """Return the columns for images: bits instead of nats, and the estimator beside the truth."""
    kept = [IMAGE_SAMPLES if column is SAMPLES else column for column in columns]
    return [kept[0], _bits(dataset), *kept[1:-1], AGREEMENT, kept[-1]]


def _gap(row: Row) -> str:
    gap, rows = row.metrics.exact_gap, row.metrics.exact_rows
    return "-" if gap is None else f"{with_error(gap, row.metrics.exact_gap_se)}\nof {rows}"


def _lipschitz(row: Row) -> str:
    if row.metrics.lipschitz is None:
        return "-"
    certified, value = row.metrics.lipschitz_certified, row.metrics.lipschitz
    return f"≤ {value:.3f}" if certified else f"≈ {value:.3f}\nnot guaranteed"


ABOVE = Column[Row](
    "above\noptimum",
    "Nats lost to the true density: mean difference on the same test rows ± its standard error. "
    "Zero is perfect.",
    lambda row: with_error(row.metrics.above_optimum, row.metrics.above_optimum_se),
    lambda row: row.metrics.above_optimum,
)
REPEATS = Column[Row](
    "± over\nrepeats",
    "Standard error of the test NLL over repeats with other seeds, in nats.",
    lambda row: number(row.repeats_se, ".3f"),
)
SAMPLES = Column[Row](
    "sample\n10,000 (s)",
    "Seconds to draw 10,000 samples.",
    lambda row: number(row.metrics.sample_seconds, ".2f"),
    lambda row: row.metrics.sample_seconds,
)
IMAGE_SAMPLES = replace(SAMPLES, title="sample\n256 (s)", help="Seconds to draw 256 samples.")
AGREEMENT = Column[Row](
    "estimate\n- exact",
    "Mean of estimated minus exact log-density in nats, on as many test images as it says, ± its "
    "standard error over the draws of the estimator. Zero within the error, for it is unbiased.",
    _gap,
)
MODEL = Column[Row](
    "model", "Its name; nflows-iresnet compare --list describes it.", lambda row: row.model
)
NLL = Column[Row](
    "test NLL\n(nats)",
    "Mean negative log-likelihood of the test rows, lower is better, ± its standard error over "
    "the rows. The log-determinant is exact for every model, also where training estimates it, "
    "unless it says otherwise.",
    lambda row: with_error(row.metrics.test_nll, row.metrics.test_nll_se),
    lambda row: row.metrics.test_nll,
)
MEAN_NLL = Column[Row](
    "test NLL\n(nats)",
    "Mean negative log-likelihood of the test rows over the seeds, lower is better, ± the standard "
    "error of that mean over the seeds (none for one seed). The log-determinant is exact.",
    lambda row: with_error(row.metrics.test_nll, row.repeats_se),
    lambda row: row.metrics.test_nll,
)
SEEDS = Column[Row]("seeds", "Seeds over which the mean is taken.", lambda row: str(row.repeats))
STEPS = Column[Row](
    "steps",
    "Optimiser steps in the time, mean over the seeds.",
    lambda row: number(row.steps, ".0f"),
)
BEST_STEP = Column[Row](
    "best\nat step",
    "The step whose state validated best, and is what is tested; mean over the seeds.",
    lambda row: number(row.best_step, ".0f"),
)
RATE = Column[Row](
    "learning\nrate",
    "Initial learning rate, chosen on the validation rows where several were tried.",
    lambda row: number(row.learning_rate, "g"),
)
PARAMETERS = Column[Row](
    "para-\nmeters", "Trained parameters.", lambda row: f"{row.num_parameters:,}"
)
TRAINING = Column[Row](
    "training\n(s)",
    "Seconds of training, validation not counted.",
    lambda row: number(row.train_seconds, ".1f"),
    lambda row: row.train_seconds,
)
STEP = Column[Row](
    "ms per\nstep",
    "Median time of a training step in milliseconds: forward, backward and update.",
    lambda row: number(row.ms_per_step, ".1f"),
    lambda row: row.ms_per_step,
)
ROUND_TRIP = Column[Row](
    "round trip\nmax (median)",
    "How far data -> noise -> data misses the test rows, in the units of the data: the largest "
    "coordinate, its maximum and its median over the rows.",
    _round_trip,
    lambda row: row.metrics.round_trip_max,
)
MEMORY = Column[Row](
    "memory\n(MB)",
    "Peak of tensor memory in forward and backward of one batch, in MB.",
    lambda row: number(row.metrics.peak_memory_mb, ".1f"),
    lambda row: row.metrics.peak_memory_mb,
)
LIPSCHITZ = Column[Row](
    "Lipschitz\nbound",
    "Largest Lipschitz constant of a residual block; below 1 the inverse exists. ≤ is a "
    "certified bound; ≈ is a product of measured norms that nothing in the library guarantees.",
    _lipschitz,
)
COLUMNS = (MODEL, NLL, REPEATS, ABOVE, PARAMETERS, STEP, SAMPLES, ROUND_TRIP, MEMORY, LIPSCHITZ)
