"""Prepare a comparison completely, then train and evaluate one model after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from nflows_iresnet.compare.adapters import DensityModel
from nflows_iresnet.compare.checkpoints import CheckpointError, Keeper
from nflows_iresnet.compare.config import RunConfig, describe, slug
from nflows_iresnet.compare.evaluation import Array, Evaluation, Metrics, evaluate
from nflows_iresnet.compare.files import WriteError
from nflows_iresnet.compare.imagemodels import IMAGE_MODELS
from nflows_iresnet.compare.imagetasks import ImageTask
from nflows_iresnet.compare.models import (
    MODELS,
    Architecture,
    count_parameters,
    find_model,
    match_parameters,
)
from nflows_iresnet.compare.results import DatasetSummary, Result
from nflows_iresnet.compare.tasks import RowTask, Task
from nflows_iresnet.compare.training import train
from nflows_iresnet.training import History, Seconds, Steps, TrainingPlan, seed_everything

OnStep = Callable[[float, float], None]


@dataclass(frozen=True)
class Run:
    """One model to be trained once on one data set."""

    task: Task
    model: str
    size: Architecture
    repeat: int

    @property
    def key(self) -> tuple[str, str, int]:
        """Data set, model and repeat."""
        return self.task.name, self.model, self.repeat


def prepare(config: RunConfig) -> list[Run]:
    """Load every data set and size every model, so that nothing foreseeable fails later.

    Returns:
        The runs, data set by data set and model by model.

    Raises:
        ValueError: something in the configuration cannot work; the message names it.
    """
    for name in config.models:
        find_model(name, IMAGE_MODELS if config.images else MODELS)
    load: Callable[[str, RunConfig], Task] = ImageTask.load if config.images else RowTask.load
    tasks = [load(name, config) for name in config.datasets]
    _check_distinct([task.name for task in tasks])
    return [
        Run(task, model, _size(model, task.reference(config)), repeat)
        for task in tasks
        for model in config.models
        for repeat in range(config.repeats)
    ]


def _size(model: str, reference: Architecture) -> Architecture:
    try:
        return match_parameters(model, reference)
    except ImportError:
        return reference  # the row of the table says what is not installed


def _check_distinct(names: list[str]) -> None:
    slugs = [slug(name) for name in names]
    for name in names:
        if slugs.count(slug(name)) > 1:
            raise ValueError(f"two datasets are named {name!r}: rename one of the files")


def execute(
    run: Run, config: RunConfig, on_step: OnStep, keeper: Keeper | None = None
) -> tuple[Result, dict[str, Array]]:
    """Train and evaluate one model; whatever the model does wrong is part of the result."""
    seed = config.seed + run.repeat
    seed_everything(seed)
    model = None
    try:
        model = find_model(run.model, run.size.models).build(run.size).to(config.device)
        model.initialize(run.task.start_rows(config))
        log = train_run(model, run, config, on_step, keeper)
    except (CheckpointError, WriteError):
        raise
    except Exception as error:
        return _result(run, seed, model, None, Evaluation(failures=[describe(error)])), {}
    evaluation = evaluate(model, run.task.exam(config), seed)
    evaluation.metrics = _with_bits(evaluation.metrics, run.task.summarise())
    return _result(run, seed, model, log, evaluation), evaluation.arrays


def train_run(
    model: DensityModel,
    run: Run,
    config: RunConfig,
    on_step: OnStep,
    keeper: Keeper | None = None,
) -> History:
    """Train a model that was built for a run; it is left in its best state."""
    stream = run.task.stream(config, config.seed + run.repeat)
    plan = replace(
        training_plan(config), average_decay=run.task.average_decay, warmup=run.task.warmup
    )
    return train(model, stream, lambda: run.task.validate(model, config), plan, on_step, keeper)


def training_plan(config: RunConfig) -> TrainingPlan:
    """Return the plan that every model is trained by."""
    length = Steps(config.steps or 0) if config.budget is None else Seconds(config.budget)
    return TrainingPlan(config.learning_rate, length, tf32=config.training_precision == "tf32")


def _with_bits(metrics: Metrics, data: DatasetSummary) -> Metrics:
    """Add bits per dimension of quantised data, where the units of the model are others."""
    nll, error = metrics.test_nll, metrics.test_nll_se
    if nll is None or metrics.bits_per_dim is not None or data.levels is None:
        return metrics
    bits_se = None if error is None else error / (data.features * math.log(2))
    return replace(metrics, bits_per_dim=data.bits_per_dim(nll), bits_per_dim_se=bits_se)


def _result(
    run: Run,
    seed: int,
    model: DensityModel | None,
    log: History | None,
    evaluation: Evaluation,
) -> Result:
    return Result(
        dataset=run.task.name,
        model=run.model,
        repeat=run.repeat,
        seed=seed,
        hyperparameters=asdict(run.size),
        num_parameters=0 if model is None else count_parameters(model),
        failures=tuple(evaluation.failures),
        training=log,
        metrics=evaluation.metrics,
        model_class=None if model is None else model.flow_class,
    )
