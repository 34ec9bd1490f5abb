"""Images: samples, interpolations through the noise, and reconstructions of one residual flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from nflows_iresnet.experiments import runs
from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.config import IMAGE_DEFAULTS, RunConfig
from nflows_iresnet.experiments.evaluation import Array, EvaluationData, estimated_log_prob
from nflows_iresnet.experiments.figures import Drawing, Settings, Stage
from nflows_iresnet.experiments.models import REFERENCE, count_parameters, find_model
from nflows_iresnet.experiments.pictures import INK, STYLE, as_png, show_tiles, tile
from nflows_iresnet.experiments.record import DatasetSummary
from nflows_iresnet.training import seed_everything

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


def to_config(settings: Settings) -> RunConfig:
    """Return the configuration of the training."""
    size = {"num_layers": 1, "num_train": 300} if settings.quick else {}
    return RunConfig(
        datasets=("digits",),
        models=(REFERENCE,),
        steps=settings.steps_or(600, 40),
        seed=settings.seed,
        device=settings.device,
        threads=settings.threads,
        images=True,
        **{
            **IMAGE_DEFAULTS,
            "learning_rate": 2e-3,
            "hidden_features": 16 if settings.quick else 32,
            **size,
        },
    )


def count_models(settings: Settings) -> int:
    """Return how many flows are trained."""
    return 1


def draw(settings: Settings, stage: Stage) -> Drawing:
    """Train the flow and draw what it makes of images."""
    config = to_config(settings)
    (run,) = runs.prepare(config)
    with stage("digits · residual-flow"):
        seed_everything(settings.seed)
        model = find_model(run.model, run.size.models).build(run.size).to(settings.device)
        log = runs.train_run(model, runs.Job(run, config))
    model.eval()
    data, summary = run.task.evaluation_data(config), run.task.summarise()
    pictures = look(model, data)
    measured = _measure(model, data, pictures, summary)
    chosen = {"configuration": config.as_arguments(), "steps_taken": log.steps}
    return Drawing(
        "Images of digits",
        _caption(config, measured),
        as_png(_figure(pictures, summary, measured)),
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
    nll = -float(estimated_log_prob(model, data.test).double().mean())
    changed = np.floor(pictures.decoded) != np.floor(pictures.shown)
    return {
        "bits_per_dim": summary.bits_per_dim(nll),
        "test_images": len(data.test),
        "largest_error": float(np.abs(pictures.decoded - pictures.shown).max()),
        "pixels_changed": int(changed.sum()),
        "pixels": int(changed.size),
    }


def _caption(config: RunConfig, measured: dict[str, Any]) -> str:
    return (
        f"ImageResidualFlow after {config.steps} steps on 8 by 8 digits: "
        f"{measured['bits_per_dim']:.2f} bits per dimension on {measured['test_images']} test "
        "images. Interpolations follow great circles in the noise between two test images, the "
        "first and the last of each row. Reconstructions are the inverse of the noise in the "
        f"middle: the largest error of a pixel is {measured['largest_error']:.1e} of one grey "
        f"level, and {measured['pixels_changed']} of {measured['pixels']} pixels change."
    )


def _figure(pictures: Pictures, summary: DatasetSummary, measured: dict[str, Any]) -> Figure:
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
