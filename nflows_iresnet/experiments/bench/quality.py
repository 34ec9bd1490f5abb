"""Likelihood over training time: exact test NLL against seconds of training alone."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from torch import Tensor

from nflows_iresnet import datasets
from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.bench.items import BASELINE, NLL, OURS, REACH, STEP_MODELS, STEPS
from nflows_iresnet.experiments.bench.measure import Case, Measurement, Settings
from nflows_iresnet.experiments.bench.models import ConstantRate, Size
from nflows_iresnet.experiments.config import describe
from nflows_iresnet.experiments.data import training_batches
from nflows_iresnet.experiments.evaluation import exact_nll
from nflows_iresnet.training import Training, TrainingPlan, seed_everything

Rows = tuple[Tensor, Tensor]
"""Validation rows, which choose, and test rows, which are reported."""
HIDDEN = {"checkerboard": 64, "two-spirals": 64, "digits": 128}
BLOCKS = 6
BATCH = 256
TEST_ROWS = 2000
VALIDATION_ROWS = 1000
_CHECKPOINTS = 17
"""Checkpoints at the budget times 2^(-k/2): the first after a 256th of it."""


class Point(NamedTuple):
    """An examination: training time in seconds, exact NLL of the validation and test rows."""

    seconds: float
    validation: float
    test: float


@dataclass
class Curve:
    """The examinations of a model in order, and what went wrong, after which there are no more."""

    points: list[Point] = field(default_factory=list)
    failure: str | None = None

    @property
    def best(self) -> Point:
        """The point of the lowest validation NLL, infinite where none was finite."""
        finite = (point for point in self.points if math.isfinite(point.validation))
        none = Point(math.inf, math.inf, math.inf)
        return min(finite, key=lambda point: point.validation, default=none)

    def seconds_to(self, validation: float) -> float | None:
        """Return the training time of the first point that validates as well, or None."""
        return next((each.seconds for each in self.points if each.validation <= validation), None)

    def go_on(self, training: Training, seconds: float, rows: Rows) -> None:
        """Train until so much time is used up in all and add a point, or the failure."""
        if self.failure is None:
            try:
                _train_until(training, seconds)
                self.points.append(_examine(training, rows))
            except Exception as error:
                self.failure = describe(error)


def _train_until(training: Training, seconds: float) -> None:
    training.model.train()
    while training.progress.elapsed < seconds:
        training.step()
        if training.is_to_be_looked_at:
            training.look()


def _examine(training: Training, rows: Rows) -> Point:
    training.model.eval()
    validation, test = (exact_nll(training.model, each) for each in rows)
    return Point(training.progress.elapsed, validation, test)


def _training(
    name: str, dataset: datasets.Dataset, size: Size, seed: int, settings: Settings
) -> Training:
    seed_everything(seed)
    model = STEP_MODELS[name].build(size)
    assert isinstance(model, DensityModel)
    model.to(settings.device)
    clock = time.process_time if settings.trusts_cpu_time else time.perf_counter
    plan = TrainingPlan(settings.learning_rate, ConstantRate(), clip_norm=None, clock=clock)
    batches = training_batches(dataset, BATCH, seed, settings.device)
    return Training(model, batches, plan, lambda: math.nan, after_step=model.after_step)


def checkpoints(budget: float) -> list[float]:
    """Return the training times at which models are examined, in geometric progression."""
    return [budget * 2 ** (-k / 2) for k in reversed(range(_CHECKPOINTS))]


def train_side_by_side(name: str, seed: int, settings: Settings) -> tuple[Measurement, ...]:
    """Train the models in turns, from one checkpoint to the next."""
    dataset = datasets.load(name, seed=seed)
    test = dataset.test[:TEST_ROWS].to(settings.device)
    validation = dataset.validation[:VALIDATION_ROWS].to(settings.device)
    size = Size(dataset.features, HIDDEN[name], BLOCKS, bare=False, has_start=True)
    trainings = {each: _training(each, dataset, size, seed, settings) for each in (OURS, BASELINE)}
    curves = {each: Curve() for each in trainings}
    for seconds in checkpoints(settings.seconds or (10.0 if settings.quick else 80.0)):
        for each, curve in curves.items():
            curve.go_on(trainings[each], seconds, (validation, test))
    goal = curves[BASELINE].best.validation
    return tuple(
        _measurement(each, curve, trainings[each].progress.begun, goal)
        for each, curve in curves.items()
    )


def _measurement(name: str, curve: Curve, steps: int, goal: float) -> Measurement:
    reached = curve.seconds_to(goal)
    numbers = {NLL.key: curve.best.test, STEPS.key: float(steps)}
    seconds, validation, nll = ([point[axis] for point in curve.points] for axis in range(3))
    return Measurement(
        name,
        numbers=numbers if reached is None else {**numbers, REACH.key: reached},
        raw={"seconds": seconds, "validation": validation, "nll": nll},
        note=_note(curve, reached),
    )


def _note(curve: Curve, reached: float | None) -> str | None:
    if curve.failure is not None:
        return curve.failure
    if not math.isfinite(curve.best.validation):
        return "its validation NLL was never finite: lower --learning-rate"
    return "normflows' best not reached" if reached is None else None


def cases(settings: Settings) -> list[Case]:
    """Return a case for each data set and seed."""
    seeds = range(settings.seed, settings.seed + (1 if settings.quick else 3))
    return [
        Case(f"{name} seed={seed}", {"seed": seed}, partial(train_side_by_side, name, seed))
        for name in HIDDEN
        for seed in seeds
    ]
