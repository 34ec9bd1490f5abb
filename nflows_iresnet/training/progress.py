"""How long a training lasts and how fast it learns, how far it has come, and what happened."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import nn

CLIP_NORM = 10.0
REMEDY = (
    "lower the learning rate (learning_rate, --learning-rate), or look for outliers in the data"
)


class TrainingDivergedError(ArithmeticError):
    """The loss is no longer a finite number."""


def check_finite(loss: float, step: int) -> None:
    """Check the loss of a step.

    Raises:
        TrainingDivergedError: it is not finite.
    """
    if not math.isfinite(loss):
        raise TrainingDivergedError(f"the training loss was {loss} at step {step}; {REMEDY}")


class Length(Protocol):
    """How long a training lasts."""

    def progress(self, steps: int, seconds: float) -> float:
        """Return the fraction of the training that is done, 1 at the end."""


@dataclass(frozen=True)
class Steps:
    """Train for a number of optimiser steps."""

    count: int

    def progress(self, steps: int, seconds: float) -> float:
        """Return the fraction of the training that is done, 1 at the end."""
        return steps / self.count


@dataclass(frozen=True)
class Seconds:
    """Train for a time in seconds, validation not counted."""

    budget: float

    def progress(self, steps: int, seconds: float) -> float:
        """Return the fraction of the training that is done, 1 at the end."""
        return min(seconds / self.budget, 1.0)


@dataclass(frozen=True)
class FirstOf:
    """Train until the first of several ends."""

    lengths: tuple[Length, ...]

    def progress(self, steps: int, seconds: float) -> float:
        """Return the fraction of the training that is done, 1 at the end."""
        return max(length.progress(steps, seconds) for length in self.lengths)


@dataclass(frozen=True)
class TrainingPlan:
    """How every model is trained: cosine schedule, gradient clipping, early stopping.

    Args:
        learning_rate: initial learning rate, annealed to zero.
        length: how long to train.
        clip_norm: largest norm of the gradient, None for no clipping.
        validations: how often the validation set is evaluated, at equal intervals.
        patience: validations without a new best after which training stops.
        average_decay: decay of the moving average of the weights that is validated and kept, None
            to validate and keep the weights themselves.
        warmup: part of the training in which the learning rate rises from a tenth.
        tf32: whether steps, but no validation, may use TensorFloat-32 on a GPU.
        clock: what tells the seconds of training: `time.perf_counter`, or `time.process_time` for
            those of the CPU, which other processes do not lengthen.
        validates_start: whether the state before the first step may be the best, which a flow that
            was trained before needs.
        captures: whether a step may become one graph on a GPU.
    """

    learning_rate: float
    length: Length
    clip_norm: float | None = CLIP_NORM
    validations: int = 20
    patience: int = 8
    average_decay: float | None = None
    warmup: float = 0.0
    tf32: bool = False
    clock: Callable[[], float] = time.perf_counter
    validates_start: bool = False
    captures: bool = True

    def factor_at(self, progress: float) -> float:
        """Return the part of the learning rate that is used, by warm-up and a cosine."""
        rising = 1.0 if progress >= self.warmup else max(0.1, progress / self.warmup)
        return 0.5 * rising * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class CurvePoint:
    """One validation during training.

    Args:
        step: optimiser steps so far.
        seconds: training time so far.
        train: mean training loss since the last point, in nats; NaN before the first step.
        validation: NLL of the validation rows, in nats. Of `fit`: exact up to 64 features and
            without a loss of one's own, else that of the flow with the same random numbers each
            time. Of the commands: exact but for images under an estimator.
    """

    step: int
    seconds: float
    train: float
    validation: float


@dataclass(frozen=True)
class History:
    """What happened during training; `to_json` and `from_json` keep it.

    Args:
        steps: optimiser steps taken.
        seconds: their time, validation not counted.
        ms_per_step: median time of a step, in milliseconds.
        best_step: the step whose state was restored.
        best_validation: NLL of the validation rows there, in nats.
        curve: the validations, in order.
        is_captured: whether a step was one CUDA graph.
        capture_reason: why it was not, None where it was, and on a CPU.
        stopped: "length" at the end of the schedule, "patience" without a new best for so long,
            "interrupted" by Ctrl-C.
    """

    steps: int
    seconds: float
    ms_per_step: float
    best_step: int
    best_validation: float
    curve: tuple[CurvePoint, ...]
    is_captured: bool = False
    capture_reason: str | None = None
    stopped: str = "length"

    def to_json(self) -> str:
        """Return the history as JSON; a number that is not finite becomes null."""
        return json.dumps(finite(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> History:
        """Rebuild a history from `to_json`."""
        values: dict[str, Any] = json.loads(text)
        points: Any = (
            {name: math.nan if value is None else value for name, value in point.items()}
            for point in values["curve"]
        )
        return cls(**{**values, "curve": tuple(CurvePoint(**point) for point in points)})


def finite(value: Any) -> Any:
    """Return plain data with null for every number that is not finite."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_KEPT = ("seconds", "elapsed", "losses", "best_state")


@dataclass
class Progress:
    """The running state of one training."""

    plan: TrainingPlan
    begun: int = 0
    seconds: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    best_state: dict[str, Any] | None = None

    @property
    def done(self) -> float:
        """The part of the schedule that is done."""
        return self.plan.length.progress(self.begun, self.elapsed)

    @property
    def due(self) -> bool:
        """Whether it is time for a validation."""
        last = self.curve[-1] if self.curve else None
        before = 0.0 if last is None else self.plan.length.progress(last.step, last.seconds)
        return self.done >= 1.0 or self._interval(self.done) > self._interval(before)

    def _interval(self, done: float) -> int:
        """Return how many intervals are over; 29 % of 100 are 29, not 28.999999999999996."""
        return int(done * self.plan.validations + 1e-9)

    @property
    def stopped(self) -> str | None:
        """Why the training is at its end, None if it is not."""
        if self.done >= 1.0:
            return "length"
        return "patience" if self._stale >= self.plan.patience else None

    @property
    def trained(self) -> list[CurvePoint]:
        """The validations after a step."""
        return [point for point in self.curve if point.step > 0]

    @property
    def _stale(self) -> int:
        """How many validations after a step there are since the best of them."""
        points = self.trained
        best = _best_of(points)
        return len(points) if best is None else len(points) - 1 - points.index(best)

    @property
    def best(self) -> CurvePoint | None:
        """The first of the lowest validations, None where none was finite."""
        return _best_of(self.curve)

    def add_steps(self, seconds: float, losses: list[float]) -> None:
        """Take in the losses of steps, and the time of all of them."""
        for loss in losses:
            self.seconds.append(seconds / len(losses))
            self.losses.append(loss)
            check_finite(loss, len(self.seconds))
        self.elapsed += seconds

    def add_validation(self, model: nn.Module, value: float) -> None:
        """Take in a validation, and the state of the model if it is the best."""
        train = sum(self.losses) / len(self.losses) if self.losses else math.nan
        point = CurvePoint(len(self.seconds), self.elapsed, train, value)
        self.curve.append(point)
        self.losses.clear()
        if self.best is point:
            self.best_state = copy.deepcopy(model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs."""
        curve = [asdict(point) for point in self.curve]
        return {"curve": curve, **{name: getattr(self, name) for name in _KEPT}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        for name in _KEPT:
            setattr(self, name, state[name])
        self.curve = [CurvePoint(**point) for point in state["curve"]]
        self.begun = len(self.seconds)


def _best_of(points: Iterable[CurvePoint]) -> CurvePoint | None:
    finite = (point for point in points if math.isfinite(point.validation))
    return min(finite, key=lambda point: point.validation, default=None)
