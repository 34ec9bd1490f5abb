"""Images in a comparison: dequantised afresh in training, with fixed noise in examinations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nflows_iresnet import datasets
from nflows_iresnet.datasets import ImageDataset
from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.config import RunConfig
from nflows_iresnet.experiments.evaluation import (
    GAP_CHUNK,
    NUM_SHOWN_IMAGES,
    NUM_VALIDATION_ROWS,
    Array,
    Exam,
    estimated_log_prob,
)
from nflows_iresnet.experiments.imagemodels import ImageArchitecture
from nflows_iresnet.experiments.record import DatasetSummary
from nflows_iresnet.experiments.tasks import NUM_START_ROWS, Task
from nflows_iresnet.training import Batches

_JACOBIAN_ELEMENTS = 2**28
_VALIDATION_CHUNK = 128
_TEST_NOISE = 20_000
_VALIDATION_NOISE = 10_000
_START_NOISE = 30_000
"""Seeds of the noise in examinations: the same for every run, so that numbers can be compared."""


@dataclass(frozen=True)
class ImageTask(Task):
    """A set of images.

    Args:
        data: the data set.
    """

    data: ImageDataset

    @classmethod
    def load(cls, name: str, config: RunConfig) -> ImageTask:
        """Load a set of images by name.

        Raises:
            ValueError: it cannot be used; the message names it.
        """
        try:
            data = datasets.load_images(
                name, data_dir=config.data_dir, seed=config.seed, num_train=config.num_train
            )
        except ImportError as error:
            raise ValueError(str(error)) from error
        return cls(data)

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.data.name

    def reference(self, config: RunConfig) -> ImageArchitecture:
        """Return the size of ImageResidualFlow."""
        return ImageArchitecture(
            features=self.data.features,
            hidden_features=config.hidden_features,
            num_layers=config.num_layers,
            num_blocks_per_layer=config.num_blocks_per_layer,
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
        return DatasetSummary(
            name=self.data.name,
            source=self.data.source,
            features=self.data.features,
            num_train=len(self.data.train),
            num_validation=len(self.data.validation),
            num_test=len(self.data.test),
            optimum=None,
            optimum_se=None,
            log_scale=-self.data.features * math.log(self.data.levels),
            levels=self.data.levels,
            notes=(f"{self.data.split}.",),
            shape=self.data.shape,
        )

    def arrays(self) -> dict[str, Array]:
        """Return the first training images."""
        return {"train": self.data.train[: NUM_SHOWN_IMAGES**2].numpy()}

    def stream(self, config: RunConfig, seed: int) -> Batches:
        """Return the training batches, with fresh noise in each."""
        return Batches(self.data.train.to(config.device), config.batch_size, seed, _dequantise)

    def start_rows(self, config: RunConfig) -> Tensor:
        """Return the first training images, with fixed noise."""
        return _with_noise(self.data.train[:NUM_START_ROWS], _START_NOISE).to(config.device)

    def validate(self, model: DensityModel, config: RunConfig) -> float:
        """Return the NLL of the first validation images, by the model's unbiased estimator."""
        images = self.data.validation[:NUM_VALIDATION_ROWS]
        rows = _with_noise(images, _VALIDATION_NOISE).to(config.device)
        devices = [rows.device] if rows.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_VALIDATION_NOISE)
            return -float(estimated_log_prob(model, rows, _VALIDATION_CHUNK).double().mean())

    def exam(self, config: RunConfig) -> Exam:
        """Return the dequantised test images and one batch."""
        first, *more = (
            _with_noise(self.data.test, _TEST_NOISE + draw).to(config.device)
            for draw in range(config.dequantisations)
        )
        return Exam(
            test=first,
            batch=next(self.stream(config, config.seed)),
            true_log_prob=None,
            grid=None,
            more_draws=tuple(more),
            max_exact_rows=config.exact_images or self._affordable(),
        )

    def _affordable(self) -> int:
        """Return how many images can have a full Jacobian: 256, or 28 in 3072 dimensions."""
        return max(GAP_CHUNK, min(256, _JACOBIAN_ELEMENTS // self.data.features**2))


def _dequantise(images: Tensor, generator: Generator) -> Tensor:
    from nflows_iresnet.transforms import dequantize

    return dequantize(images, generator=generator)


def _with_noise(images: Tensor, seed: int) -> Tensor:
    return _dequantise(images, Generator().manual_seed(seed))
