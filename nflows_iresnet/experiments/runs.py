"""A run is a function of its settings that returns its record: prepare all, then do each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

from nflows_iresnet import datasets
from nflows_iresnet.experiments import saved
from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.config import RunConfig, absolute, describe, in_any_folder, slug
from nflows_iresnet.experiments.data import ImageTask, RowTask, Task
from nflows_iresnet.experiments.evaluation import Array, Evaluation, Metrics, evaluate
from nflows_iresnet.experiments.models import (
    IMAGE_MODELS,
    MODELS,
    Architecture,
    count_parameters,
    find_model,
    match_parameters,
)
from nflows_iresnet.experiments.parallel import NOBODY, Watch
from nflows_iresnet.experiments.record import DatasetSummary, Record, Result, Trial
from nflows_iresnet.files import WriteError
from nflows_iresnet.training import History
from nflows_iresnet.training.checkpoints import CheckpointError
from nflows_iresnet.training.loop import Training
from nflows_iresnet.training.processes import seed_everything
from nflows_iresnet.training.progress import Seconds, Steps, TrainingPlan

AVERAGE_DECAY = 0.999
WARMUP = 0.02

Outcome = tuple[Result | Trial, dict[str, Array], bytes | None]
"""What a job found, its arrays, and the weights that it trained, if there are any."""


# --- what there is to do --------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One model to be trained once on one data set.

    Args:
        source: the name or path that the data are loaded by.
        checksum: what they are to have, where they are loaded again.
    """

    task: Task
    model: str
    size: Architecture
    repeat: int
    source: str = ""
    checksum: str | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """Data set, model and repeat."""
        return self.task.name, self.model, self.repeat


@dataclass(frozen=True)
class Job:
    """A run to be done at a learning rate, or that rate to be tried for the run.

    Args:
        run: the model, on its data, with its seed.
        config: every choice.
        learning_rate: of the training, None for the first of the configuration.
        is_trial: whether it is trained and validated only.
    """

    run: Run
    config: RunConfig
    learning_rate: float | None = None
    is_trial: bool = False

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or self.config.rates[0]

    @property
    def seed(self) -> int:
        """Reproduces the weights, the batches and the samples."""
        return self.config.seed + self.run.repeat

    @property
    def key(self) -> tuple[str | int, ...]:
        """What the checkpoint is named for: a rate that was chosen goes on from its trial."""
        is_tried = self.config.is_tuned and self.run.repeat == 0
        return (*self.run.key, repr(self.rate)) if is_tried else self.run.key

    @property
    def label(self) -> str:
        """Name it for people."""
        dataset, model, repeat = self.run.key
        parts = [dataset, model, f"repeat {repeat}" if repeat else ""]
        parts.append(f"learning rate {self.rate:g}" if self.is_trial else "")
        return " · ".join(filter(None, parts))

    def do(self, watch: Watch = NOBODY) -> Outcome:
        """Do it."""
        return (try_rate(self, watch), {}, None) if self.is_trial else execute(self, watch)

    def without_data(self) -> Job:
        """Return what another process is sent, which may run in another folder."""
        source, checksum = self.run.source, self.run.task.checksum
        if source not in _known(self.config):
            source = absolute(source)
        run = replace(self.run, task=cast(Task, None), source=source, checksum=checksum)
        return replace(self, run=run, config=in_any_folder(self.config))

    def with_data(self) -> Job:
        """Load the data of a job that was sent.

        Raises:
            ValueError: they cannot be loaded, or are other rows than where the command began.
        """
        task = _load_once(self.run.source, self.config)
        if task.checksum != self.run.checksum:
            _load_once.cache_clear()  # a worker may have served an earlier command
            task = _load_once(self.run.source, self.config)
        if task.checksum != self.run.checksum:
            raise ValueError(
                f"{task.data.source} has other rows than where the command began (sum "
                f"{task.checksum}, {self.run.checksum} there): give every place the same file, and "
                "leave it as it is meanwhile"
            )
        return replace(self, run=replace(self.run, task=task))


def every_job(runs: Sequence[Run], config: RunConfig) -> list[Job]:
    """Return every job that runs may need, as far as checkpoints are concerned."""
    return [
        Job(run, config, rate)
        for run in runs
        for rate in (config.rates if run.repeat == 0 else config.rates[:1])
    ]


def trials_to_do(runs: Sequence[Run], config: RunConfig, record: Record) -> list[Job]:
    """Return the learning rates that are still to be tried, before any of the runs is done."""
    tried = {(each.dataset, each.model, each.learning_rate) for each in record.trials}
    return [
        Job(run, config, rate, is_trial=True)
        for run in pending(runs, record)
        for rate in config.rates
        if config.is_tuned and run.repeat == 0 and (*run.key[:2], rate) not in tried
    ]


def runs_to_do(runs: Sequence[Run], config: RunConfig, record: Record) -> list[Job]:
    """Return the runs without a result, each at the learning rate that validated best."""

    def rate(run: Run) -> float:
        if config.is_tuned:
            return record.trials_of(*run.key[:2])[0].learning_rate
        return config.rates[0]

    return [Job(run, config, rate(run)) for run in pending(runs, record)]


def pending(runs: Sequence[Run], record: Record) -> list[Run]:
    """Return the runs without a result."""
    finished = {result.key for result in record.results}
    return [run for run in runs if run.key not in finished]


def prepare(config: RunConfig) -> list[Run]:
    """Load every data set and size every model, so that nothing foreseeable fails later.

    Returns:
        The runs, data set by data set, and all models with one seed before any with the next: a
        machine that slows down meanwhile slows all of them.

    Raises:
        ValueError: something in the configuration cannot work; the message names it.
    """
    for name in config.models:
        find_model(name, IMAGE_MODELS if config.images else MODELS)
    mistakes_first = sorted(config.datasets, key=partial(_is_there, config))
    found = {name: load_task(name, config) for name in mistakes_first}
    tasks = {name: found[name] for name in config.datasets}
    _check_distinct([task.name for task in tasks.values()])
    sizes = {
        (source, model): _size(model, task.reference(config))
        for source, task in tasks.items()
        for model in config.models
    }
    return [
        Run(task, model, sizes[source, model], repeat, source)
        for source, task in tasks.items()
        for repeat in range(config.repeats)
        for model in config.models
    ]


def load_task(name: str, config: RunConfig) -> Task:
    """Load a data set by name or path.

    Raises:
        ValueError: it cannot be used; the message names it.
    """
    load: Callable[[str, RunConfig], Task] = ImageTask.load if config.images else RowTask.load
    return load(name, config)


_load_once = lru_cache(maxsize=8)(load_task)


def _is_there(config: RunConfig, name: str) -> bool:
    return name in _known(config) or Path(name).expanduser().exists()


def _known(config: RunConfig) -> Collection[str]:
    return datasets.available_images() if config.images else datasets.available()


def _size(model: str, reference: Architecture) -> Architecture:
    try:
        return match_parameters(model, reference)
    except ImportError:
        return reference  # the row of the table says what is not installed
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise ValueError(
            f"model {model!r} cannot be built ({describe(error)}): give fewer --hidden-features "
            f"(now {reference.hidden_features}) or --num-layers (now {reference.num_layers})"
        ) from error


def _check_distinct(names: list[str]) -> None:
    slugs = [slug(name) for name in names]
    for name in names:
        if slugs.count(slug(name)) > 1:
            raise ValueError(f"two datasets are named {name!r}: rename one of the files")


# --- to do it -------------------------------------------------------------------------------------


def execute(job: Job, watch: Watch = NOBODY) -> tuple[Result, dict[str, Array], bytes | None]:
    """Train and evaluate one model; whatever the model does wrong is part of the result.

    Returns:
        The result, arrays for pictures and comparisons, and the weights, None if there are none.
    """
    model, log, failure = _build_and_train(job, watch)
    run, config = job.run, job.config
    evaluation = Evaluation(failures=[] if failure is None else [failure])
    weights = None
    if model is not None and log is not None:
        weights = saved.pack(model, run.model, run.size)
        evaluation = evaluate(model, run.task.evaluation_data(config), job.seed)
    result = Result(
        dataset=run.task.name,
        model=run.model,
        repeat=run.repeat,
        seed=job.seed,
        hyperparameters=asdict(run.size),
        num_parameters=0 if model is None else count_parameters(model),
        failures=tuple(evaluation.failures),
        training=log,
        metrics=_with_bits(evaluation.metrics, run.task.summarise()),
        model_class=None if model is None else model.flow_class,
        learning_rate=job.rate,
    )
    return result, evaluation.arrays, weights


def try_rate(job: Job, watch: Watch = NOBODY) -> Trial:
    """Train one model at a learning rate and validate it; the test rows are not looked at."""
    _, log, failure = _build_and_train(job, watch)
    trial = Trial(*job.run.key[:2], job.rate, failure=failure)
    if log is None:
        return trial
    return replace(trial, validation=log.best_validation, steps=log.steps, seconds=log.seconds)


def _build_and_train(
    job: Job, watch: Watch
) -> tuple[DensityModel | None, History | None, str | None]:
    """Return the model and its history as far as there are any, and what went wrong, if it did."""
    seed_everything(job.seed)
    model = None
    try:
        model = build(job.run, job.config)
        log = train_run(model, job, watch)
    except (CheckpointError, WriteError):
        raise
    except Exception as error:
        return model, None, describe(error)
    return model, log, None


def build(run: Run, config: RunConfig) -> DensityModel:
    """Build the model of a run, and start it from training rows."""
    model = find_model(run.model, run.size.models).build(run.size).to(config.device)
    model.initialize(run.task.start_rows(config))
    return model


def train_run(model: DensityModel, job: Job, watch: Watch = NOBODY) -> History:
    """Train a model that was built for a run; it is left in its best state."""
    task, config = job.run.task, job.config

    def validate() -> float:
        """Validate the average of the weights with what the library computes of them."""
        before = [each.clone() for each in model.buffers()]
        model.after_step()
        value = task.validate(model, config)
        for buffer, kept in zip(model.buffers(), before, strict=True):
            buffer.copy_(kept)
        return value

    training = Training(
        model,
        task.batches(config, job.seed),
        training_plan(config, job.rate),
        validate,
        after_step=model.after_step,
    )
    log = watch.train(training)
    model.after_step()
    return log


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
