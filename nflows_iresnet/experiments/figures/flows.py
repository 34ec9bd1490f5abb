"""Flows of `nflows-iresnet compare` in pictures: toy densities side by side, and digits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from nflows_iresnet.experiments import runs
from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.config import IMAGE_DEFAULTS, RunConfig
from nflows_iresnet.experiments.data import Window
from nflows_iresnet.experiments.evaluation import (
    Array,
    EvaluationData,
    exact_log_prob,
    mean_and_error,
)
from nflows_iresnet.experiments.figures import Drawing
from nflows_iresnet.experiments.models import REFERENCE, count_parameters, find_model
from nflows_iresnet.experiments.pictures import (
    CELL,
    DATA,
    INK,
    STYLE,
    as_png,
    draw_density,
    draw_scatter,
    find_brightest,
    show_tiles,
    tile,
)
from nflows_iresnet.experiments.record import DatasetSummary, Result
from nflows_iresnet.experiments.tables import number
from nflows_iresnet.training.processes import seed_everything

if TYPE_CHECKING:
    from nflows_iresnet.experiments.figures.command import Stage
    from nflows_iresnet.experiments.options import FiguresOptions

# --- toy densities --------------------------------------------------------------------------------

TITLES = {
    "residual-flow": "ResidualFlow",
    "i-resnet": "InvertibleResNet",
    "glow": "Glow",
    "realnvp": "RealNVP",
}
TOYS = ("checkerboard", "8-gaussians", "two-spirals")


class Densities:
    """The data, the truth, and the densities of the flows."""

    def __init__(self, options: FiguresOptions) -> None:
        self.config = RunConfig(
            datasets=TOYS[: 1 if options.quick else None],
            models=tuple(TITLES),
            steps=options.steps or (40 if options.quick else 400),
            seed=options.seed,
            hidden_features=32 if options.quick else 64,
            num_layers=3 if options.quick else 6,
            device=options.device,
            threads=options.threads,
        )
        self.num_models = len(self.config.datasets) * len(self.config.models)

    def draw(self, stage: Stage) -> Drawing:
        """Train every flow on every toy, and draw their densities."""
        prepared = runs.prepare(self.config)
        tasks = {run.task.name: run.task for run in prepared}
        results, arrays = {}, {name: {"data": task.arrays()} for name, task in tasks.items()}
        for run in prepared:
            name, model = run.task.name, run.model
            with stage(f"densities · {name} · {model}"):
                job = runs.Job(run, self.config)
                results[run.key], arrays[name][model], _ = runs.execute(job)
        summaries = {name: task.summarise() for name, task in tasks.items()}
        return Drawing(
            "Toy densities",
            _densities_caption(self.config, list(results.values())),
            as_png(_densities(summaries, results, arrays)),
            {
                "configuration": self.config.as_arguments(),
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


def _densities_caption(config: RunConfig, results: list[Result]) -> str:
    counts = [result.num_parameters for result in results]
    return (
        f"Each flow is trained for up to {config.steps} steps, as long as its validation improves, "
        f"on the same batches of {config.batch_size} rows, with {min(counts):,} to "
        f"{max(counts):,} parameters. The number under a name is the mean negative log-likelihood "
        "of the test rows in nats, with exact log-determinants: the nearer to that of the true "
        "density the better. All panels of a row share one scale of brightness, up to the highest "
        "true density: what is higher is as bright."
    )


def _densities(
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


# --- digits ---------------------------------------------------------------------------------------

NUM_SAMPLES = 64
NUM_SHOWN = 10
NUM_PAIRS = 6
_NOISE_RANGE = 3.0


@dataclass(frozen=True)
class Pictures:
    """What one trained flow makes of images, all as (N, C, H, W) in pixel values."""

    samples: Array
    shown: Array
    noise: Array
    decoded: Array
    between: Array


class Digits:
    """What a residual flow makes of images."""

    num_models = 1

    def __init__(self, options: FiguresOptions) -> None:
        small = {"num_layers": 1, "num_train": 300, "hidden_features": 16} if options.quick else {}
        self.config = RunConfig(
            datasets=("digits",),
            models=(REFERENCE,),
            steps=options.steps or (40 if options.quick else 600),
            seed=options.seed,
            device=options.device,
            threads=options.threads,
            images=True,
            **IMAGE_DEFAULTS | {"learning_rate": 2e-3, "hidden_features": 32} | small,
        )

    def draw(self, stage: Stage) -> Drawing:
        """Train the flow and draw what it makes of images."""
        config = self.config
        (run,) = runs.prepare(config)
        with stage("digits · residual-flow"):
            seed_everything(config.seed)
            model = find_model(run.model, run.size.models).build(run.size).to(config.device)
            log = runs.train_run(model, runs.Job(run, config))
        model.eval()
        data, summary = run.task.evaluation_data(config), run.task.summarise()
        pictures = look(model, data)
        measured = _measure(model, data, pictures, summary)
        chosen = {"configuration": config.as_arguments(), "steps_taken": log.steps}
        return Drawing(
            "Images of digits",
            _digits_caption(config, measured),
            as_png(_digits(pictures, summary, measured)),
            {**chosen, "parameters": count_parameters(model), **measured},
        )


@torch.no_grad()
def look(model: DensityModel, data: EvaluationData) -> Pictures:
    """Draw samples, take images to the noise and back, and go from one image to another."""
    shown = data.test[:NUM_SHOWN]
    noise = model.encode(shown)
    ends = model.encode(data.test[NUM_SHOWN : NUM_SHOWN + 2 * NUM_PAIRS])
    between = interpolate(ends[:NUM_PAIRS], ends[NUM_PAIRS:], NUM_SHOWN)
    arrays = (
        model.sample(NUM_SAMPLES),
        shown,
        noise.reshape(shown.shape),
        model.decode(noise),
        model.decode(between.flatten(end_dim=1)),
    )
    return Pictures(*(each.cpu().numpy() for each in arrays))


def interpolate(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Return points on the great circles between noises, so that norms stay typical.

    Args:
        first: shape (N, D).
        second: shape (N, D).
        count: points per pair, ends included.

    Returns:
        Shape (N, count, D); cos(t) first + sin(t) second along t in [0, pi / 2].
    """
    angle = torch.linspace(0, torch.pi / 2, count, dtype=first.dtype, device=first.device)[:, None]
    return angle.cos() * first[:, None] + angle.sin() * second[:, None]


def _measure(
    model: DensityModel, data: EvaluationData, pictures: Pictures, summary: DatasetSummary
) -> dict[str, Any]:
    nll, error = mean_and_error(-exact_log_prob(model, data.test))
    changed = np.floor(pictures.decoded) != np.floor(pictures.shown)
    return {
        "bits_per_dim": summary.bits_per_dim(nll),
        "bits_per_dim_se": None if error is None else error / (summary.features * math.log(2)),
        "test_images": len(data.test),
        "largest_error": float(np.abs(pictures.decoded - pictures.shown).max()),
        "pixels_changed": int(changed.sum()),
        "pixels": int(changed.size),
    }


def _digits_caption(config: RunConfig, measured: dict[str, Any]) -> str:
    bits = number(measured["bits_per_dim"], error=measured["bits_per_dim_se"])
    return (
        f"ImageResidualFlow after up to {config.steps} steps on 8 by 8 digits: {bits} bits per "
        f"dimension, exact, on {measured['test_images']} test images. Interpolations follow great "
        "circles in the noise between two test images, the first and the last of each row. "
        "Reconstructions are the inverse of the noise in the "
        f"middle: the largest error of a pixel is {measured['largest_error']:.1e} of one grey "
        f"level, and {measured['pixels_changed']} of {measured['pixels']} pixels change."
    )


def _digits(pictures: Pictures, summary: DatasetSummary, measured: dict[str, Any]) -> Figure:
    """Draw samples and interpolations above, images, noise and reconstructions below."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 6.4), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(2.1, 1), width_ratios=(1, 1.45))
        samples, between = (figure.add_subplot(grid[0, column]) for column in range(2))
        below = figure.add_subplot(grid[1, :])
        show_tiles(samples, tile(np.floor(pictures.samples), 8), summary)
        samples.set_title(f"samples, {measured['bits_per_dim']:.2f} bits/dim", color=INK)
        show_tiles(between, tile(np.floor(pictures.between), NUM_SHOWN), summary)
        between.set_title("from one test image to another, through the noise", color=INK)
        show_tiles(below, tile(_rows(pictures, summary), NUM_SHOWN), summary)
        below.set_title(
            "test images, their noise, and what the inverse makes of it "
            f"(largest error {measured['largest_error']:.0e} grey levels)",
            color=INK,
        )
        return figure


def _rows(pictures: Pictures, summary: DatasetSummary) -> Array:
    """Stack images, noise in grey from -3 to 3, and reconstructions."""
    levels = summary.levels or 256
    grey = (pictures.noise / _NOISE_RANGE + 1) / 2 * (levels - 1)
    return np.concatenate([np.floor(pictures.shown), grey, np.floor(pictures.decoded)])
