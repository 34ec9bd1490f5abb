"""The training loop: one for every model, and it knows none of them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import Parameter


class Trainable(Protocol):
    """What the loop asks of a model."""

    def log_prob(self, inputs: Tensor, /) -> Tensor:
        """Log-density in nats, (B, d) -> (B,), whose mean is maximised."""

    def parameters(self) -> Iterator[Parameter]:
        """Everything the optimiser trains."""

    def train(self, mode: bool = True) -> object:
        """Switch between training and evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that has to be restored."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Restore it."""

    def after_step(self) -> None:
        """Run after each optimiser step."""


class TrainingDivergedError(ArithmeticError):
    """The loss is no longer a finite number."""


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
class TrainingPlan:
    """How every model is trained: Adam, cosine schedule, gradient clipping, early stopping.

    Args:
        learning_rate: initial learning rate, annealed to zero.
        length: how long to train.
        clip_norm: largest norm of the gradient.
        validations: how often the validation set is evaluated, at equal intervals.
        patience: validations without a new best after which training stops.
    """

    learning_rate: float
    length: Steps | Seconds
    clip_norm: float = 10.0
    validations: int = 20
    patience: int = 8

    def learning_rate_at(self, progress: float) -> float:
        """Return the cosine-annealed learning rate."""
        return 0.5 * self.learning_rate * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class CurvePoint:
    """One validation during training.

    Args:
        step: optimiser steps so far.
        seconds: training time so far.
        train: mean training loss since the last point, in nats.
        validation: exact NLL of the validation rows, in nats.
    """

    step: int
    seconds: float
    train: float
    validation: float


@dataclass(frozen=True)
class TrainingLog:
    """What happened during training.

    Args:
        steps: optimiser steps taken.
        seconds: their time, validation not counted.
        ms_per_step: median time of a step, in milliseconds.
        best_step: the step whose state was restored.
        best_validation: exact NLL of the validation rows there, in nats.
        curve: the validations, in order.
    """

    steps: int
    seconds: float
    ms_per_step: float
    best_step: int
    best_validation: float
    curve: tuple[CurvePoint, ...]


def seed_everything(seed: int) -> None:
    """Seed torch, and numpy's global generator, from which normflows draws its truncation."""
    torch.manual_seed(seed)
    np.random.seed(seed)


def batches(rows: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches for ever, one seeded shuffle per epoch; a remainder of rows is left out.

    Args:
        rows: (N, d).
        batch_size: rows per batch; N if there are fewer rows.
        seed: equal seeds yield equal batches in equal order.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(rows))
    while True:
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]


@dataclass
class _Progress:
    """The running state of one training."""

    plan: TrainingPlan
    seconds: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    best_state: dict[str, Any] | None = None
    best: CurvePoint | None = None
    validated: int = 0

    @property
    def done(self) -> float:
        return self.plan.length.progress(len(self.seconds), self.elapsed)

    @property
    def due(self) -> bool:
        return self.done >= 1.0 or int(self.done * self.plan.validations) > self.validated

    @property
    def finished(self) -> bool:
        return self.done >= 1.0 or self._stale >= self.plan.patience

    @property
    def _stale(self) -> int:
        return 0 if self.best is None else len(self.curve) - 1 - self.curve.index(self.best)

    def add_step(self, seconds: float, loss: float) -> None:
        self.seconds.append(seconds)
        self.elapsed += seconds
        self.losses.append(loss)

    def add_validation(self, model: Trainable, value: float) -> None:
        train = sum(self.losses) / len(self.losses)
        point = CurvePoint(len(self.seconds), self.elapsed, train, value)
        self.curve.append(point)
        self.losses.clear()
        self.validated = int(self.done * self.plan.validations)
        if math.isfinite(value) and (self.best is None or value < self.best.validation):
            self.best, self.best_state = point, copy.deepcopy(model.state_dict())


def train(
    model: Trainable,
    stream: Iterator[Tensor],
    validate: Callable[[], float],
    plan: TrainingPlan,
    on_step: Callable[[float, float], None] = lambda done, loss: None,
) -> TrainingLog:
    """Maximise the log-density of a stream of batches and restore the best state.

    Args:
        model: the model; trained in place.
        stream: batches (B, d), for ever.
        validate: returns the NLL of the validation rows in nats.
        plan: how to train.
        on_step: called after each step with the fraction done and the loss in nats.

    Returns:
        The log of the training.

    Raises:
        TrainingDivergedError: a loss, or every validation, was not finite.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.learning_rate)
    progress = _Progress(plan)
    model.train()
    while not progress.finished:
        _set_learning_rate(optimizer, plan.learning_rate_at(progress.done))
        seconds, loss = _timed_step(model, optimizer, next(stream), plan.clip_norm)
        progress.add_step(seconds, loss)
        _check_finite(loss, len(progress.seconds))
        on_step(progress.done, loss)
        if progress.due:
            progress.add_validation(model, _validation(model, validate))
    return _close(model, progress)


def _set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _timed_step(
    model: Trainable, optimizer: torch.optim.Optimizer, batch: Tensor, clip_norm: float
) -> tuple[float, float]:
    started = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    loss = -model.log_prob(batch).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    model.after_step()
    value = loss.item()
    synchronize(batch.device)
    return time.perf_counter() - started, value


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingDivergedError(f"the training loss was {loss} at step {step}")


def _validation(model: Trainable, validate: Callable[[], float]) -> float:
    model.train(False)
    value = validate()
    model.train()
    return value


def _close(model: Trainable, progress: _Progress) -> TrainingLog:
    if progress.best is None or progress.best_state is None:
        raise TrainingDivergedError("the validation NLL was never finite")
    model.load_state_dict(progress.best_state)
    model.train(False)
    return TrainingLog(
        steps=len(progress.seconds),
        seconds=progress.elapsed,
        ms_per_step=1e3 * float(np.median(progress.seconds)),
        best_step=progress.best.step,
        best_validation=progress.best.validation,
        curve=tuple(progress.curve),
    )
