"""Prepare a comparison completely, then train and evaluate one model after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from nflows_iresnet.experiments import saved
from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.checkpoints import CheckpointError, Keeper
from nflows_iresnet.experiments.config import RunConfig, describe, slug
from nflows_iresnet.experiments.evaluation import Array, Evaluation, Metrics, evaluate
from nflows_iresnet.experiments.files import WriteError
from nflows_iresnet.experiments.imagemodels import IMAGE_MODELS
from nflows_iresnet.experiments.imagetasks import ImageTask
from nflows_iresnet.experiments.models import (
    MODELS,
    Architecture,
    count_parameters,
    find_model,
    match_parameters,
)
from nflows_iresnet.experiments.record import DatasetSummary, Record, Result, Trial
from nflows_iresnet.experiments.tasks import RowTask, Task
from nflows_iresnet.experiments.training import train
from nflows_iresnet.training import (
    History,
    Interruption,
    Seconds,
    Steps,
    TrainingPlan,
    seed_everything,
)

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


@dataclass(frozen=True)
class Job:
    """A run to be done at a learning rate, or that rate to be tried for the run.

    Args:
        run: the model, on its data, with its seed.
        learning_rate: of the training.
        is_trial: whether it is trained and validated only.
        is_tuned: whether the rate is one of several, whose trainings are kept apart.
    """

    run: Run
    learning_rate: float
    is_trial: bool = False
    is_tuned: bool = False

    @property
    def key(self) -> tuple[str | int, ...]:
        """What the checkpoint is named for: a rate that was chosen goes on from its trial."""
        rate = (f"{self.learning_rate:g}",) if self.is_tuned and self.run.repeat == 0 else ()
        return *self.run.key, *rate

    @property
    def label(self) -> str:
        """Name it for people."""
        dataset, model, repeat = self.run.key
        parts = [dataset, model, f"repeat {repeat + 1}" if repeat else ""]
        parts.append(f"learning rate {self.learning_rate:g}" if self.is_trial else "")
        return " · ".join(filter(None, parts))


def to_do(runs: Sequence[Run], config: RunConfig, record: Record) -> list[Job]:
    """Return the jobs that can be done now, in the order of the runs.

    Where there are learning rates to choose from, a model's runs wait for the trials of all.
    """
    finished = {result.key for result in record.results}
    tried = {(trial.dataset, trial.model, trial.learning_rate) for trial in record.trials}
    jobs: list[Job] = []
    for run in runs:
        if run.key in finished:
            continue
        missing = [rate for rate in config.rates if (*run.key[:2], rate) not in tried]
        if not config.is_tuned:
            jobs.append(Job(run, config.rates[0]))
        elif not missing:
            best = record.trials_of(*run.key[:2])[0]
            jobs.append(Job(run, best.learning_rate, is_tuned=True))
        elif run.repeat == 0:
            jobs += [Job(run, rate, is_trial=True, is_tuned=True) for rate in missing]
    return jobs


def every_job(runs: Sequence[Run], config: RunConfig) -> list[Job]:
    """Return every job that there can be."""
    if not config.is_tuned:
        return [Job(run, config.rates[0]) for run in runs]
    trials = [
        Job(run, rate, is_trial=True, is_tuned=True)
        for run in runs
        if run.repeat == 0
        for rate in config.rates
    ]
    return trials + [Job(run, config.rates[0], is_tuned=True) for run in runs if run.repeat]


def prepare(config: RunConfig) -> list[Run]:
    """Load every data set and size every model, so that nothing foreseeable fails later.

    Returns:
        The runs, data set by data set and model by model.

    Raises:
        ValueError: something in the configuration cannot work; the message names it.
    """
    for name in config.models:
        find_model(name, IMAGE_MODELS if config.images else MODELS)
    tasks = [load_task(name, config) for name in config.datasets]
    _check_distinct([task.name for task in tasks])
    return [
        Run(task, model, _size(model, task.reference(config)), repeat)
        for task in tasks
        for model in config.models
        for repeat in range(config.repeats)
    ]


def load_task(name: str, config: RunConfig) -> Task:
    """Load a data set by name or path.

    Raises:
        ValueError: it cannot be used; the message names it.
    """
    load: Callable[[str, RunConfig], Task] = ImageTask.load if config.images else RowTask.load
    return load(name, config)


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
    run: Run,
    config: RunConfig,
    on_step: OnStep,
    keeper: Keeper | None = None,
    learning_rate: float | None = None,
    interruption: Interruption | None = None,
) -> tuple[Result, dict[str, Array]]:
    """Train and evaluate one model; whatever the model does wrong is part of the result."""
    seed, rate = config.seed + run.repeat, learning_rate or config.rates[0]
    seed_everything(seed)
    model = None
    try:
        model = build(run, config)
        log = train_run(model, run, config, on_step, keeper, rate, interruption)
    except (CheckpointError, WriteError):
        raise
    except Exception as error:
        failed = Evaluation(failures=[describe(error)])
        return _result(run, seed, rate, model, None, failed), {}
    weights = np.frombuffer(saved.pack(model, run.model, run.size), dtype=np.uint8)
    evaluation = evaluate(model, run.task.exam(config), seed)
    evaluation.arrays["weights"] = weights
    evaluation.metrics = _with_bits(evaluation.metrics, run.task.summarise())
    return _result(run, seed, rate, model, log, evaluation), evaluation.arrays


def try_rate(
    job: Job,
    config: RunConfig,
    on_step: OnStep,
    keeper: Keeper | None = None,
    interruption: Interruption | None = None,
) -> Trial:
    """Train one model at a learning rate and validate it; the test rows are not looked at."""
    run, rate = job.run, job.learning_rate
    trial = Trial(*run.key[:2], rate)
    seed_everything(config.seed + run.repeat)
    try:
        model = build(run, config)
        log = train_run(model, run, config, on_step, keeper, rate, interruption)
    except (CheckpointError, WriteError):
        raise
    except Exception as error:
        return replace(trial, failure=describe(error))
    return replace(trial, validation=log.best_validation, steps=log.steps, seconds=log.seconds)


def build(run: Run, config: RunConfig) -> DensityModel:
    """Build the model of a run, and start it from training rows."""
    model = find_model(run.model, run.size.models).build(run.size).to(config.device)
    model.initialize(run.task.start_rows(config))
    return model


def train_run(
    model: DensityModel,
    run: Run,
    config: RunConfig,
    on_step: OnStep,
    keeper: Keeper | None = None,
    learning_rate: float | None = None,
    interruption: Interruption | None = None,
) -> History:
    """Train a model that was built for a run; it is left in its best state."""
    stream = run.task.stream(config, config.seed + run.repeat)
    plan = training_plan(config, learning_rate)

    def validate() -> float:
        return run.task.validate(model, config)

    return train(model, stream, validate, plan, on_step, keeper, interruption)


AVERAGE_DECAY = 0.999
WARMUP = 0.02


def training_plan(config: RunConfig, learning_rate: float | None = None) -> TrainingPlan:
    """Return the plan that every model is trained by."""
    races_on_cpu = config.race is not None and config.device == "cpu"
    seconds = config.budget if config.race is None else config.race
    return TrainingPlan(
        learning_rate or config.rates[0],
        Steps(config.steps or 0) if seconds is None else Seconds(seconds),
        patience=config.patience,
        average_decay=AVERAGE_DECAY,
        warmup=WARMUP,
        tf32=config.training_precision == "tf32",
        clock=time.process_time if races_on_cpu else time.perf_counter,
    )


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
    learning_rate: float,
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
        learning_rate=learning_rate,
    )
