"""What a comparison does with data: rows of a table here, images in `imagetasks`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from nflows_iresnet import datasets
from nflows_iresnet.datasets import Dataset
from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.config import RunConfig
from nflows_iresnet.experiments.evaluation import (
    NUM_VALIDATION_ROWS,
    Array,
    Exam,
    exact_nll,
    mean_and_error,
)
from nflows_iresnet.experiments.frame import Frame
from nflows_iresnet.experiments.models import Architecture
from nflows_iresnet.experiments.record import DatasetSummary
from nflows_iresnet.experiments.stream import training_batches
from nflows_iresnet.training import Batches

NUM_PICTURE_ROWS = 4_000
NUM_START_ROWS = 5_000


class Task(ABC):
    """Data that models are trained and examined on."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the data set, unique within a run."""

    @abstractmethod
    def reference(self, config: RunConfig) -> Architecture:
        """Return the size whose residual flow sets the number of parameters."""

    @abstractmethod
    def summarise(self) -> DatasetSummary:
        """Describe the data for the record."""

    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """Return what pictures and paired comparisons need to know about the data."""

    @abstractmethod
    def stream(self, config: RunConfig, seed: int) -> Batches:
        """Return the training batches; the same for every model."""

    @abstractmethod
    def start_rows(self, config: RunConfig) -> Tensor:
        """Return training rows from which a model may start."""

    @abstractmethod
    def validate(self, model: DensityModel, config: RunConfig) -> float:
        """Return the NLL of the validation rows in nats, without a trace in global generators."""

    @abstractmethod
    def exam(self, config: RunConfig) -> Exam:
        """Return what models are examined on."""


@dataclass(frozen=True)
class RowTask(Task):
    """Rows of a table, or of a toy density.

    Args:
        data: the data set.
    """

    data: Dataset

    @classmethod
    def load(cls, name: str, config: RunConfig) -> RowTask:
        """Load a data set by name or path.

        Raises:
            ValueError: it cannot be used; the message names it.
        """
        if name in datasets.available_images() and name not in datasets.available():
            raise ValueError(f"dataset {name!r} is a set of images: add --images")
        try:
            data = datasets.load(name, data_dir=config.data_dir, seed=config.seed)
        except ImportError as error:
            raise ValueError(str(error)) from error
        if data.features < 2:
            raise ValueError(f"dataset {name!r} has one column: coupling models need at least two")
        return cls(data)

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.data.name

    def reference(self, config: RunConfig) -> Architecture:
        """Return the size of ResidualFlow."""
        return Architecture(
            features=self.data.features,
            hidden_features=config.hidden_features,
            num_layers=config.num_layers,
            num_blocks_per_layer=config.num_blocks_per_layer,
        )

    def summarise(self) -> DatasetSummary:
        """Describe the data for the record."""
        true = self._true_log_prob()
        optimum, error = (None, None) if true is None else mean_and_error(-true)
        return DatasetSummary(
            name=self.data.name,
            source=self.data.source,
            features=self.data.features,
            num_train=len(self.data.train),
            num_validation=len(self.data.validation),
            num_test=len(self.data.test),
            optimum=optimum,
            optimum_se=error,
            log_scale=self.data.log_scale,
            levels=self.data.levels,
            notes=self.data.notes,
        )

    def _true_log_prob(self) -> Tensor | None:
        density = self.data.density
        return None if density is None else density.log_prob(self.data.test)

    def arrays(self) -> dict[str, Array]:
        """Return the first training rows, the units, and the true density in the plane."""
        data = self.data
        arrays = {
            "train": data.train[:NUM_PICTURE_ROWS].numpy(),
            "location": data.location.numpy(),
            "scale": data.scale.numpy(),
        }
        if data.features == 2:
            arrays["frame"] = Frame.around(data.train).as_array()
        if data.features == 2 and data.density is not None:
            grid = Frame.around(data.train).grid()
            arrays["grid_log_prob"] = data.density.log_prob(grid).numpy()
        return arrays

    def stream(self, config: RunConfig, seed: int) -> Batches:
        """Return the training batches; quantised rows get fresh noise in each."""
        return training_batches(self.data, config.batch_size, seed, config.device)

    def start_rows(self, config: RunConfig) -> Tensor:
        """Return the first training rows."""
        return self.data.train[:NUM_START_ROWS].to(config.device)

    def validate(self, model: DensityModel, config: RunConfig) -> float:
        """Return the exact NLL of the first validation rows."""
        return exact_nll(model, self.data.validation[:NUM_VALIDATION_ROWS].to(config.device))

    def exam(self, config: RunConfig) -> Exam:
        """Return the test rows, one batch, and the true density."""
        device, data, true = config.device, self.data, self._true_log_prob()
        plane = data.features == 2
        return Exam(
            test=data.test.to(device),
            batch=next(self.stream(config, config.seed)),
            true_log_prob=None if true is None else true.to(device),
            grid=Frame.around(data.train).grid().to(device) if plane else None,
        )
