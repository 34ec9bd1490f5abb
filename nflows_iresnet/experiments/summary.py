"""From results to the rows that the terminal and the report both show."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch

from nflows_iresnet.experiments.cells import with_error
from nflows_iresnet.experiments.evaluation import Array, Metrics, mean_and_error
from nflows_iresnet.experiments.record import DatasetSummary, Folder, Record, Result


@dataclass(frozen=True)
class Row:
    """One model on one data set: the median over repeats, for likelihoods the mean.

    Args:
        model: its name.
        num_parameters: trained parameters.
        ms_per_step: median time of a training step, milliseconds.
        train_seconds: median time of a training, validation not counted.
        repeats: how many repeats count.
        repeats_se: standard error of the test NLL over repeats, None for one repeat.
        failures: what went wrong in any repeat.
        metrics: the measurements.
        steps: mean number of steps.
        best_step: mean of the steps whose states were kept.
        learning_rate: with which it was trained.
    """

    model: str
    num_parameters: int
    ms_per_step: float | None
    train_seconds: float | None
    repeats: int
    repeats_se: float | None
    failures: tuple[str, ...]
    metrics: Metrics
    steps: float | None = None
    best_step: float | None = None
    learning_rate: float | None = None


def rows_of(record: Record, dataset: str) -> list[Row]:
    """Return one row per model, the best test NLL first and failures last."""
    results = record.of(dataset)
    models = dict.fromkeys(result.model for result in results)
    rows = [_row([result for result in results if result.model == model]) for model in models]
    return sorted(rows, key=lambda row: _or_infinity(row.metrics.test_nll))


def _row(results: list[Result]) -> Row:
    nlls = [r.metrics.test_nll for r in results if r.metrics.test_nll is not None]
    logs = [result.training for result in results if result.training is not None]
    return Row(
        model=results[0].model,
        num_parameters=results[0].num_parameters,
        ms_per_step=statistics.median(log.ms_per_step for log in logs) if logs else None,
        train_seconds=statistics.median(log.seconds for log in logs) if logs else None,
        repeats=len(nlls),
        repeats_se=mean_and_error(torch.tensor(nlls))[1] if nlls else None,
        failures=tuple(dict.fromkeys(text for r in results for text in r.failures)),
        metrics=_combine([r.metrics for r in results]),
        steps=statistics.fmean(log.steps for log in logs) if logs else None,
        best_step=statistics.fmean(log.best_step for log in logs) if logs else None,
        learning_rate=results[0].learning_rate,
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


def caption(dataset: DatasetSummary) -> str:
    """Describe a data set in one line."""
    text = (
        f"{dataset.num_train} training, {dataset.num_validation} validation and "
        f"{dataset.num_test} test rows of {dataset.features} dimensions"
    )
    if dataset.shape is not None:
        return f"{text}: images of {'x'.join(map(str, dataset.shape))}, {dataset.levels} levels"
    if dataset.optimum is not None:
        text += f"; the true density scores {with_error(dataset.optimum, dataset.optimum_se)} nats"
    if dataset.log_scale:
        text += f"; standardised: add {dataset.log_scale:.3f} nats for the units of the source"
    return text


def early_stops(record: Record, dataset: str) -> list[str]:
    """Say of each training that stopped before the end of its schedule where it was best."""
    return [
        f"{_named(each)} stopped early, at step {each.training.steps}: its best validation was at "
        f"step {each.training.best_step}"
        for each in record.of(dataset)
        if each.training is not None and each.training.stopped == "patience"
    ]


def _named(result: Result) -> str:
    return f"{result.model}, repeat {result.repeat + 1}," if result.repeat else result.model


def captures(record: Record, dataset: str) -> list[str]:
    """Say of each model whose steps ran one by one on a GPU why they were not one graph."""
    logs = {each.model: each.training for each in record.of(dataset) if each.training is not None}
    return [
        f"{model}: its training step was not captured as one CUDA graph: {log.capture_reason}"
        for model, log in logs.items()
        if log.capture_reason is not None
    ]


def verdict(record: Record, folder: Folder, dataset: str) -> str:
    """Say in one line which model has the best test NLL, and whether the lead is significant.

    The error of the lead is that over the rows, and, with repeats, that over the seeds of both.
    """
    rows = [row for row in rows_of(record, dataset) if row.metrics.test_nll is not None]
    if not rows:
        return "No model finished."
    if len(rows) == 1:
        return f"Only {rows[0].model} finished."
    first, second = rows[:2]
    better, worse = (_mean_log_prob(record, folder, dataset, row.model) for row in (first, second))
    if better is None or worse is None:
        return f"{first.model} is best; by how much, its arrays would say, and they are gone."
    lead, over_rows = mean_and_error(torch.from_numpy(better - worse))
    error = math.hypot(over_rows or 0.0, first.repeats_se or 0.0, second.repeats_se or 0.0)
    gap = f"by {with_error(lead, error)} nats on the same test rows"
    if lead < 2 * error:
        return f"{first.model} and {second.model} are level: they differ {gap}."
    return f"{first.model} is best: ahead of {second.model} {gap}."


def _mean_log_prob(record: Record, folder: Folder, dataset: str, model: str) -> Array | None:
    """Return the log-density of each test row, (N,); None if its files are gone."""
    keys = [result.key for result in record.of(dataset) if result.model == model]
    arrays = [folder.load_arrays(key) for key in keys]
    found = [array["test_log_prob"] for array in arrays if "test_log_prob" in array]
    if not found:
        return None
    total: Array = sum(found[1:], start=found[0].astype("float64"))
    return total / len(found)


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value
