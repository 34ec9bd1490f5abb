"""Likelihood over training time: exact test NLL against seconds of training alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from nflows_iresnet import datasets
from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.bench.clock import Clock, Work
from nflows_iresnet.experiments.bench.contestants import CONTESTANTS, Size
from nflows_iresnet.experiments.bench.items import (
    BASELINE,
    OURS,
    Case,
    Cell,
    Entrant,
    Figure,
    Item,
    Settings,
    Target,
)
from nflows_iresnet.experiments.bench.steps import training_step
from nflows_iresnet.experiments.config import describe
from nflows_iresnet.experiments.data import training_batches
from nflows_iresnet.experiments.evaluation import exact_nll
from nflows_iresnet.training import seed_everything

NLL = Figure("nll", "test NLL\nat best", ".3f", baseline=None)
REACH = Figure("reach", "seconds to\nnormflows' best", ".2f")
STEPS = Figure("steps", "steps", ".0f", baseline=None)
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


@dataclass(eq=False)
class Trainee:
    """A model in training.

    Args:
        name: of the contestant.
        model: what is trained.
        step: takes one optimiser step on the next batch.
        seconds: training time so far.
        steps: optimiser steps so far.
        curve: its examinations in order.
        failure: what went wrong, after which it takes no more steps.
    """

    name: str
    model: DensityModel
    step: Work
    seconds: float = 0.0
    steps: int = 0
    curve: list[Point] = field(default_factory=list)
    failure: str | None = None

    def go_on(self, seconds: float, rows: Rows, clock: Clock, *, on_cpu_time: bool) -> None:
        """Train until the training time is used up and add a point to the curve, or fail."""
        if self.failure is None:
            try:
                self.train_until(seconds, clock, on_cpu_time=on_cpu_time)
                self.examine(rows)
            except Exception as error:
                self.failure = describe(error)

    def train_until(self, seconds: float, clock: Clock, *, on_cpu_time: bool) -> None:
        """Take steps until the training time is used up."""
        self.model.train()
        while self.seconds < seconds:
            reading = clock.time(self.step)
            self.seconds += reading.cpu_seconds if on_cpu_time else reading.seconds
            self.steps += 1

    def examine(self, rows: Rows) -> None:
        """Add a point to the curve; its time is not counted."""
        self.model.eval()
        validation, test = (exact_nll(self.model, each) for each in rows)
        self.curve.append(Point(self.seconds, validation, test))

    @property
    def best(self) -> Point:
        """The point of the lowest validation NLL, infinite where none was finite."""
        finite = (point for point in self.curve if math.isfinite(point.validation))
        none = Point(math.inf, math.inf, math.inf)
        return min(finite, key=lambda point: point.validation, default=none)

    def seconds_to(self, validation: float) -> float | None:
        """Return the training time of the first point that validates as well, or None."""
        return next((each.seconds for each in self.curve if each.validation <= validation), None)


def checkpoints(budget: float) -> list[float]:
    """Return the training times at which models are examined, in geometric progression."""
    return [budget * 2 ** (-k / 2) for k in reversed(range(_CHECKPOINTS))]


def _trainee(
    name: str, dataset: datasets.Dataset, size: Size, seed: int, settings: Settings
) -> Trainee:
    seed_everything(seed)
    model = CONTESTANTS[name].build(size)
    assert isinstance(model, DensityModel)
    model.to(settings.device)
    stream = training_batches(dataset, BATCH, seed, settings.device)
    return Trainee(name, model, training_step(model, stream, settings.learning_rate))


def train_side_by_side(case: Case, settings: Settings, clock: Clock) -> tuple[Cell, ...]:
    """Train the contestants in turns, from one checkpoint to the next."""
    seed = int(case.parameters["seed"])
    dataset = datasets.load(case.label.split()[0], seed=seed)
    test = dataset.test[:TEST_ROWS].to(settings.device)
    validation = dataset.validation[:VALIDATION_ROWS].to(settings.device)
    size = Size(dataset.features, HIDDEN[dataset.name], BLOCKS, bare=False, marginal_bins=None)
    trainees = [_trainee(name, dataset, size, seed, settings) for name in (OURS, BASELINE)]
    for seconds in checkpoints(_budget(settings)):
        for trainee in trainees:
            rows = (validation, test)
            trainee.go_on(seconds, rows, clock, on_cpu_time=settings.trusts_cpu_time)
    goal = next(trainee.best.validation for trainee in trainees if trainee.name == BASELINE)
    return tuple(_cell(trainee, goal) for trainee in trainees)


def _budget(settings: Settings) -> float:
    return settings.seconds or (10.0 if settings.quick else 80.0)


def _cell(trainee: Trainee, goal: float) -> Cell:
    reached = trainee.seconds_to(goal)
    figures = {NLL.key: trainee.best.test, STEPS.key: float(trainee.steps)}
    seconds, validation, nll = ([point[axis] for point in trainee.curve] for axis in range(3))
    return Cell(
        trainee.name,
        figures=figures if reached is None else {**figures, REACH.key: reached},
        raw={"seconds": seconds, "validation": validation, "nll": nll},
        note=_note(trainee, reached),
    )


def _note(trainee: Trainee, reached: float | None) -> str | None:
    if trainee.failure is not None:
        return trainee.failure
    if not math.isfinite(trainee.best.validation):
        return "its validation NLL was never finite: lower --learning-rate"
    return "normflows' best not reached" if reached is None else None


def _cases(settings: Settings) -> list[Case]:
    return list(_each_case(settings))


def _each_case(settings: Settings) -> Iterator[Case]:
    for name in HIDDEN:
        for seed in range(settings.seed, settings.seed + (1 if settings.quick else 3)):
            yield Case(f"{name} seed={seed}", {"seed": seed}, _no_entrants)


def _no_entrants(settings: Settings) -> list[Entrant]:
    return []


QUALITY = Item(
    "exact test NLL over training seconds, 6 blocks with ActNorm",
    _cases,
    figures=(NLL, REACH, STEPS),
    targets=(
        Target(
            "time to normflows' likelihood, times less",
            8.0,
            lambda result: result.ratio_of(OURS, REACH),
        ),
    ),
    measure=train_side_by_side,
    is_optional=True,
)
