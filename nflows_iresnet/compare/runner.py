"""Prepare a comparison completely, then train and evaluate one model after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from nflows_iresnet import datasets
from nflows_iresnet.compare.adapters import DensityModel
from nflows_iresnet.compare.config import RunConfig, slug
from nflows_iresnet.compare.evaluation import (
    NUM_VALIDATION_ROWS,
    Array,
    Evaluation,
    Exam,
    describe,
    evaluate,
    exact_nll,
    mean_and_error,
)
from nflows_iresnet.compare.frame import Frame
from nflows_iresnet.compare.models import (
    Architecture,
    count_parameters,
    find_model,
    match_parameters,
)
from nflows_iresnet.compare.results import DatasetSummary, Result
from nflows_iresnet.compare.training import (
    Seconds,
    Steps,
    TrainingLog,
    TrainingPlan,
    batches,
    seed_everything,
    train,
)
from nflows_iresnet.datasets import Dataset

NUM_PICTURE_ROWS = 4_000
OnStep = Callable[[float, float], None]


@dataclass(frozen=True)
class Run:
    """One model to be trained once on one data set."""

    data: Dataset
    model: str
    size: Architecture
    repeat: int

    @property
    def key(self) -> tuple[str, str, int]:
        """Data set, model and repeat."""
        return self.data.name, self.model, self.repeat


def prepare(config: RunConfig) -> list[Run]:
    """Load every data set and size every model, so that nothing foreseeable fails later.

    Returns:
        The runs, data set by data set and model by model.

    Raises:
        ValueError: something in the configuration cannot work; the message names it.
    """
    for name in config.models:
        find_model(name)
    loaded = [_load(name, config) for name in config.datasets]
    _check_distinct([data.name for data in loaded])
    return [
        Run(data, model, _size(model, data, config), repeat)
        for data in loaded
        for model in config.models
        for repeat in range(config.repeats)
    ]


def _load(name: str, config: RunConfig) -> Dataset:
    try:
        data = datasets.load(name, data_dir=config.data_dir, seed=config.seed)
    except ImportError as error:
        raise ValueError(str(error)) from error
    if data.train.shape[1] < 2:
        raise ValueError(f"dataset {name!r} has one column: coupling models need at least two")
    return data


def _check_distinct(names: list[str]) -> None:
    slugs = [slug(name) for name in names]
    for name in names:
        if slugs.count(slug(name)) > 1:
            raise ValueError(f"two datasets are named {name!r}: rename one of the files")


def _size(model: str, data: Dataset, config: RunConfig) -> Architecture:
    size = Architecture(
        features=data.train.shape[1],
        hidden_features=config.hidden_features,
        num_layers=config.num_layers,
        num_blocks_per_layer=config.num_blocks_per_layer,
    )
    return match_parameters(model, size)


def summarise_dataset(data: Dataset) -> DatasetSummary:
    """Describe a data set for the record."""
    true_log_prob = _true_log_prob(data)
    optimum, error = (None, None) if true_log_prob is None else mean_and_error(-true_log_prob)
    return DatasetSummary(
        name=data.name,
        source=data.source,
        features=data.train.shape[1],
        num_train=len(data.train),
        num_validation=len(data.validation),
        num_test=len(data.test),
        optimum=optimum,
        optimum_se=error,
        log_scale=data.log_scale,
        levels=data.levels,
        notes=data.notes,
    )


def _true_log_prob(data: Dataset) -> torch.Tensor | None:
    return None if data.density is None else data.density.log_prob(data.test)


def dataset_arrays(data: Dataset) -> dict[str, Array]:
    """Return what pictures and paired comparisons need to know about a data set."""
    arrays = {
        "train": data.train[:NUM_PICTURE_ROWS].numpy(),
        "location": data.location.numpy(),
        "scale": data.scale.numpy(),
    }
    if data.train.shape[1] == 2:
        arrays["frame"] = Frame.around(data.train).as_array()
    if data.train.shape[1] == 2 and data.density is not None:
        arrays["grid_log_prob"] = data.density.log_prob(Frame.around(data.train).grid()).numpy()
    return arrays


def execute(run: Run, config: RunConfig, on_step: OnStep) -> tuple[Result, dict[str, Array]]:
    """Train and evaluate one model; whatever the model does wrong is part of the result."""
    seed = config.seed + run.repeat
    seed_everything(seed)
    model = find_model(run.model).build(run.size).to(config.device)
    try:
        log = _train(model, run, config, on_step)
    except Exception as error:
        return _result(run, seed, model, None, Evaluation(failures=[describe(error)])), {}
    evaluation = evaluate(model, _exam(run, config), seed)
    return _result(run, seed, model, log, evaluation), evaluation.arrays


def _train(model: DensityModel, run: Run, config: RunConfig, on_step: OnStep) -> TrainingLog:
    stream = batches(run.data.train.to(config.device), config.batch_size, config.seed + run.repeat)
    rows = run.data.validation[:NUM_VALIDATION_ROWS].to(config.device)
    return train(model, stream, lambda: exact_nll(model, rows), training_plan(config), on_step)


def training_plan(config: RunConfig) -> TrainingPlan:
    """Return the plan that every model is trained by."""
    if config.budget is not None:
        return TrainingPlan(config.learning_rate, Seconds(config.budget))
    return TrainingPlan(config.learning_rate, Steps(config.steps or 0))


def _exam(run: Run, config: RunConfig) -> Exam:
    device, data = config.device, run.data
    true_log_prob = _true_log_prob(data)
    return Exam(
        test=data.test.to(device),
        batch=data.train[: config.batch_size].to(device),
        true_log_prob=None if true_log_prob is None else true_log_prob.to(device),
        grid=Frame.around(data.train).grid().to(device) if data.train.shape[1] == 2 else None,
    )


def _result(
    run: Run, seed: int, model: DensityModel, log: TrainingLog | None, evaluation: Evaluation
) -> Result:
    return Result(
        dataset=run.data.name,
        model=run.model,
        repeat=run.repeat,
        seed=seed,
        hyperparameters=asdict(run.size),
        num_parameters=count_parameters(model),
        failures=tuple(evaluation.failures),
        training=log,
        metrics=evaluation.metrics,
    )
