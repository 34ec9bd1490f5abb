"""What a comparison does with data: rows of a table, or images, with fresh noise in each batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

from nflows_iresnet import datasets
from nflows_iresnet.datasets import Dataset, ImageDataset
from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.config import RunConfig
from nflows_iresnet.experiments.evaluation import (
    GAP_CHUNK,
    NUM_SHOWN_IMAGES,
    NUM_VALIDATION_ROWS,
    Array,
    EvaluationData,
    estimated_log_prob,
    exact_nll,
    mean_and_error,
)
from nflows_iresnet.experiments.models import Architecture, ImageArchitecture
from nflows_iresnet.experiments.record import DatasetSummary
from nflows_iresnet.training.processes import seeded
from nflows_iresnet.training.rows import Batches, spaced
from nflows_iresnet.transforms import dequantize

Loaded = TypeVar("Loaded")
NUM_PICTURE_ROWS = 4_000
NUM_START_ROWS = 5_000
NUM_WINDOW_ROWS = 100_000
RESOLUTION = 128
_JACOBIAN_ELEMENTS = 2**28
_VALIDATION_CHUNK = 128
_TEST_NOISE = 20_000
_VALIDATION_NOISE = 10_000
_START_NOISE = 30_000
"""Seeds of the noise in evaluations: the same for every run, so that numbers can be compared."""


@dataclass(frozen=True)
class Window:
    """The square that every picture of a plane data set shows: its centre and half its side."""

    x: float
    y: float
    half: float

    @classmethod
    def around(cls, rows: Tensor) -> Window:
        """Return the square around rows (N, 2), with a margin of 10%.

        Those of heavy tails are left out: it ends where a normal distribution would at 3.6
        deviations from its mean, if the middle 90% were as wide.
        """
        middle = spaced(rows, NUM_WINDOW_ROWS).quantile(torch.tensor([0.05, 0.95]).to(rows), dim=0)
        width = middle[1] - middle[0]
        reach = torch.where(width > 0, 0.6 * width, math.inf)
        low = rows.amin(dim=0).maximum(middle[0] - reach)
        high = rows.amax(dim=0).minimum(middle[1] + reach)
        centre = ((low + high) / 2).tolist()
        return cls(centre[0], centre[1], 0.55 * float((high - low).max()))

    @classmethod
    def from_array(cls, values: Array) -> Window:
        """Rebuild a window from `as_array`."""
        return cls(*map(float, values))

    def as_array(self) -> Array:
        """Return the three numbers."""
        return np.array(astuple(self))

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top."""
        x, y, half = self.x, self.y, self.half
        return x - half, x + half, y - half, y + half

    def contains(self, rows: Array) -> Array:
        """Return which rows (N, 2) it shows, (N,)."""
        inside: Array = (np.abs(rows - [self.x, self.y]) <= self.half).all(axis=1)
        return inside

    def grid(self, resolution: int = RESOLUTION) -> Tensor:
        """Return the centres of the pixels, (resolution^2, 2), row by row from the bottom."""
        steps = (torch.arange(resolution) + 0.5) * (2 * self.half / resolution) - self.half
        ys, xs = torch.meshgrid(self.y + steps, self.x + steps, indexing="ij")
        return torch.stack([xs.flatten(), ys.flatten()], dim=1)


class _Task:
    """What tasks of rows and of images have in common: data with three splits."""

    data: Dataset | ImageDataset

    @property
    def name(self) -> str:
        """Name of the data set, unique within a run."""
        return self.data.name

    def _size(self, config: RunConfig) -> dict[str, int]:
        return {
            "features": self.data.features,
            "hidden_features": config.hidden_features,
            "num_layers": config.num_layers,
            "num_blocks_per_layer": config.num_blocks_per_layer,
        }

    def _summary(self, **more: Any) -> DatasetSummary:
        data = self.data
        return DatasetSummary(
            name=data.name,
            source=data.source,
            features=data.features,
            num_train=len(data.train),
            num_validation=len(data.validation),
            num_test=len(data.test),
            levels=data.levels,
            **more,
        )


@dataclass(frozen=True)
class RowTask(_Task):
    """Rows of a table, or of a toy density, that models are trained and evaluated on."""

    data: Dataset

    @classmethod
    def load(cls, name: str, config: RunConfig) -> RowTask:
        """Load a data set by name or path."""
        data = _loaded(lambda: datasets.load(name, data_dir=config.data_dir, seed=config.seed))
        if data.features < 2:
            raise ValueError(f"dataset {name!r} has one column: coupling models need at least two")
        return cls(data)

    def reference(self, config: RunConfig) -> Architecture:
        """Return the size of the residual flow that sets the number of parameters."""
        return Architecture(**self._size(config))

    def summarise(self) -> DatasetSummary:
        """Describe the data for the record."""
        true = self._true_log_prob()
        optimum, error = (None, None) if true is None else mean_and_error(-true)
        return self._summary(
            optimum=optimum,
            optimum_se=error,
            log_scale=self.data.log_scale,
            notes=self.data.notes,
            checksum=self.checksum,
        )

    @property
    def checksum(self) -> str | None:
        """What tells the rows from others; samples of toy densities follow from their seed."""
        return self.data.checksum

    def _true_log_prob(self) -> Tensor | None:
        density = self.data.density
        return None if density is None else density.log_prob(self.data.test)

    def arrays(self) -> dict[str, Array]:
        """Return what pictures need: training rows, units, and the true density in the plane."""
        data = self.data
        arrays = {
            "train": data.train[:NUM_PICTURE_ROWS].numpy(),
            "location": data.location.numpy(),
            "scale": data.scale.numpy(),
        }
        if data.features == 2:
            window = Window.around(data.train)
            arrays["window"] = window.as_array()
            if data.density is not None:
                arrays["grid_log_prob"] = data.density.log_prob(window.grid()).numpy()
        return arrays

    def batches(self, config: RunConfig, seed: int) -> Batches:
        """Return the training batches, the same for every model."""
        return training_batches(self.data, config.batch_size, seed, config.device)

    def start_rows(self, config: RunConfig) -> Tensor:
        """Return the training rows from which a model may start."""
        return spaced(self.data.train, NUM_START_ROWS).to(config.device)

    def validate(self, model: DensityModel, config: RunConfig) -> float:
        """Return the exact NLL of a thousand validation rows in nats.

        They are evenly spaced, as some tables have theirs in the order of measurement.
        """
        rows = spaced(self.data.validation, NUM_VALIDATION_ROWS)
        return exact_nll(model, rows.to(config.device))

    def evaluation_data(self, config: RunConfig) -> EvaluationData:
        """Return the test rows, one batch, and the true density."""
        device, data, true = config.device, self.data, self._true_log_prob()
        return EvaluationData(
            test=data.test.to(device),
            batch=next(self.batches(config, config.seed)),
            true_log_prob=None if true is None else true.to(device),
            grid=Window.around(data.train).grid().to(device) if data.features == 2 else None,
        )


@dataclass(frozen=True)
class ImageTask(_Task):
    """Images that models are trained and evaluated on, the latter with fixed noise."""

    data: ImageDataset

    @classmethod
    def load(cls, name: str, config: RunConfig) -> ImageTask:
        """Load a set of images by name."""
        where: dict[str, Any] = {"data_dir": config.data_dir, "seed": config.seed}
        return cls(_loaded(lambda: datasets.load_images(name, **where, num_train=config.num_train)))

    def reference(self, config: RunConfig) -> ImageArchitecture:
        """Return the size of the residual flow that sets the number of parameters."""
        return ImageArchitecture(
            **self._size(config),
            shape=self.data.shape,
            levels=self.data.levels,
            num_scales=config.num_scales,
            half_precision=config.amp,
            alpha=config.alpha,
            marginal_bins=config.marginal_bins,
            num_terms=config.num_terms,
        )

    def summarise(self) -> DatasetSummary:
        """Describe the images for the record."""
        return self._summary(
            optimum=None,
            optimum_se=None,
            log_scale=-self.data.features * math.log(self.data.levels),
            notes=(f"{self.data.split}.",),
            shape=self.data.shape,
        )

    @property
    def checksum(self) -> None:
        """Nothing beside the hashes in the source."""
        return

    def arrays(self) -> dict[str, Array]:
        """Return the first training images, for pictures."""
        return {"train": self.data.train[: NUM_SHOWN_IMAGES**2].numpy()}

    def batches(self, config: RunConfig, seed: int) -> Batches:
        """Return the training batches, the same for every model, with fresh noise in each."""
        images = self.data.train.to(config.device)
        add_noise = lambda rows, generator: dequantize(rows, generator=generator)  # noqa: E731
        return Batches(images, config.batch_size, seed, add_noise)

    def start_rows(self, config: RunConfig) -> Tensor:
        """Return the training images from which a model may start, with fixed noise."""
        return _with_noise(self.data.train[:NUM_START_ROWS], _START_NOISE).to(config.device)

    def validate(self, model: DensityModel, config: RunConfig) -> float:
        """Estimate the NLL of the first validation images in nats, without moving a generator."""
        images = self.data.validation[:NUM_VALIDATION_ROWS]
        rows = _with_noise(images, _VALIDATION_NOISE).to(config.device)
        with seeded(_VALIDATION_NOISE, rows.device):
            return -float(estimated_log_prob(model, rows, _VALIDATION_CHUNK).double().mean())

    def evaluation_data(self, config: RunConfig) -> EvaluationData:
        """Return the dequantised test images and one batch."""
        first, *more = (
            _with_noise(self.data.test, _TEST_NOISE + draw).to(config.device)
            for draw in range(config.dequantisations)
        )
        return EvaluationData(
            test=first,
            batch=next(self.batches(config, config.seed)),
            more_draws=tuple(more),
            max_exact_rows=config.exact_images or self._affordable(),
        )

    def _affordable(self) -> int:
        """Return how many images can have a full Jacobian: 256, or 28 in 3072 dimensions."""
        return max(GAP_CHUNK, min(256, _JACOBIAN_ELEMENTS // self.data.features**2))


Task = RowTask | ImageTask


def training_batches(
    data: Dataset, batch_size: int, seed: int, device: str | torch.device = "cpu"
) -> Batches:
    """Return batches of the training rows; quantised rows get fresh noise in each."""
    train, levels = data.train.to(device), data.levels
    if levels is None:
        return Batches(train, batch_size, seed)
    location, scale = data.location.to(device), data.scale.to(device)
    rows = ((train * scale + location) * levels).floor()

    def with_noise(batch: Tensor, generator: Generator) -> Tensor:
        noise = torch.rand(batch.shape, generator=generator, device=batch.device).to(batch)
        return (((batch + noise) / levels - location) / scale).to(train.dtype)

    return Batches(rows, batch_size, seed, with_noise)


def _loaded(load: Callable[[], Loaded]) -> Loaded:
    """Load data; a library that is missing is the user's to install."""
    try:
        return load()
    except ImportError as error:
        raise ValueError(str(error)) from error


def _with_noise(images: Tensor, seed: int) -> Tensor:
    return dequantize(images, generator=Generator().manual_seed(seed))
