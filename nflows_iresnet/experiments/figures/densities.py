"""Toy densities, side by side: the data, the truth, and the flows of `nflows-iresnet compare`."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from nflows_iresnet.experiments import runs
from nflows_iresnet.experiments.config import RunConfig
from nflows_iresnet.experiments.data import Window
from nflows_iresnet.experiments.evaluation import Array
from nflows_iresnet.experiments.figures import Drawing, Settings, Stage
from nflows_iresnet.experiments.pictures import (
    CELL,
    DATA,
    INK,
    STYLE,
    as_png,
    draw_density,
    draw_scatter,
    find_brightest,
)
from nflows_iresnet.experiments.record import DatasetSummary, Result

TITLES = {
    "residual-flow": "ResidualFlow",
    "i-resnet": "InvertibleResNet",
    "glow": "Glow",
    "realnvp": "RealNVP",
}
TOYS = ("checkerboard", "8-gaussians", "two-spirals")


def to_config(settings: Settings) -> RunConfig:
    """Return the configuration of the comparison."""
    return RunConfig(
        datasets=TOYS[: 1 if settings.quick else None],
        models=tuple(TITLES),
        steps=settings.steps_or(400, 40),
        seed=settings.seed,
        hidden_features=32 if settings.quick else 64,
        num_layers=3 if settings.quick else 6,
        device=settings.device,
        threads=settings.threads,
    )


def count_models(settings: Settings) -> int:
    """Return how many flows are trained."""
    config = to_config(settings)
    return len(config.datasets) * len(config.models)


def draw(settings: Settings, stage: Stage) -> Drawing:
    """Train every flow on every toy, and draw their densities."""
    config = to_config(settings)
    prepared = runs.prepare(config)
    tasks = {run.task.name: run.task for run in prepared}
    results, arrays = {}, {name: {"data": task.arrays()} for name, task in tasks.items()}
    for run in prepared:
        with stage(f"densities · {run.task.name} · {run.model}"):
            results[run.key], arrays[run.task.name][run.model], _ = runs.execute(
                runs.Job(run, config)
            )
    summaries = {name: task.summarise() for name, task in tasks.items()}
    return Drawing(
        "Toy densities",
        _caption(config, list(results.values())),
        as_png(_figure(summaries, results, arrays)),
        {
            "configuration": config.as_arguments(),
            "optima": {name: summary.optimum for name, summary in summaries.items()},
            "results": [_numbers(result) for result in results.values()],
        },
    )


def _numbers(result: Result) -> dict[str, Any]:
    return {
        "dataset": result.dataset,
        "model": result.model,
        "parameters": result.num_parameters,
        "test_nll": result.metrics.test_nll,
        "test_nll_se": result.metrics.test_nll_se,
        "failures": list(result.failures),
    }


def _caption(config: RunConfig, results: list[Result]) -> str:
    counts = [result.num_parameters for result in results]
    return (
        f"Each flow is trained for {config.steps} steps on the same batches of "
        f"{config.batch_size} rows, with {min(counts):,} to {max(counts):,} parameters. The "
        "number under a name is the mean negative log-likelihood of the test rows in nats, with "
        "exact log-determinants: the nearer to that of the true density the better. All panels of "
        "a row share one scale of brightness."
    )


def _figure(
    summaries: dict[str, DatasetSummary],
    results: dict[tuple[str, str, int], Result],
    arrays: dict[str, dict[str, dict[str, Array]]],
) -> Figure:
    with mpl.rc_context(STYLE):
        columns = len(TITLES) + 2
        size = (CELL * columns, (CELL + 0.3) * len(summaries) + 0.25)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(summaries), columns, squeeze=False)
        for row, (name, summary) in zip(grid, summaries.items(), strict=True):
            data = arrays[name]["data"]
            window = Window.from_array(data["window"])
            brightest = find_brightest([data])
            draw_scatter(row[0], window, data["train"], DATA)
            row[0].set_title(f"{name}\ndata", color=INK)
            draw_density(row[1], window, data, brightest)
            row[1].set_title(f"true density\n{_nats(summary.optimum)}", color=INK)
            for axes, (model, title) in zip(row[2:], TITLES.items(), strict=True):
                draw_density(axes, window, arrays[name][model], brightest)
                nll = results[name, model, 0].metrics.test_nll
                axes.set_title(f"{title}\n{_nats(nll)}", color=INK)
        return figure


def _nats(value: float | None) -> str:
    return "failed" if value is None else f"{value:.3f} nats"
