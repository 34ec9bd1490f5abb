"""The training loop: one for every model, and it knows none of them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from nflows_iresnet.compare.averaging import WeightAverage
from nflows_iresnet.compare.checkpoints import Keeper, random_state, set_random_state
from nflows_iresnet.compare.divergence import REMEDY, TrainingDivergedError, check_finite
from nflows_iresnet.compare.interruption import Postponed
from nflows_iresnet.compare.plan import TrainingPlan
from nflows_iresnet.compare.stream import Batches


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


@dataclass(frozen=True)
class CurvePoint:
    """One validation during training.

    Args:
        step: optimiser steps so far.
        seconds: training time so far.
        train: mean training loss since the last point, in nats.
        validation: NLL of the validation rows, in nats; exact but for images under an estimator.
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
        best_validation: NLL of the validation rows there, in nats.
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

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": list(self.seconds),
            "elapsed": self.elapsed,
            "losses": list(self.losses),
            "curve": [asdict(point) for point in self.curve],
            "best": None if self.best is None else self.curve.index(self.best),
            "best_state": self.best_state,
            "validated": self.validated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.elapsed, self.losses = (
            state[name] for name in ("seconds", "elapsed", "losses")
        )
        self.curve = [CurvePoint(**point) for point in state["curve"]]
        self.best = None if state["best"] is None else self.curve[state["best"]]
        self.best_state, self.validated = state["best_state"], state["validated"]


class _Training:
    """A training under way: everything that a checkpoint holds."""

    def __init__(self, model: Trainable, stream: Batches, plan: TrainingPlan) -> None:
        self.model, self.stream, self.plan = model, stream, plan
        self.optimizer = torch.optim.Adam(model.parameters(), lr=plan.learning_rate)
        self.progress = _Progress(plan)
        self.average = (
            None
            if plan.average_decay is None
            else WeightAverage(model.parameters(), plan.average_decay)
        )

    def step(self) -> float:
        _set_learning_rate(self.optimizer, self.plan.learning_rate_at(self.progress.done))
        batch = next(self.stream)
        seconds, loss = _timed_step(self.model, self.optimizer, batch, self.plan.clip_norm)
        if self.average is not None:
            self.average.update()
        self.progress.add_step(seconds, loss)
        check_finite(loss, len(self.progress.seconds))
        return loss

    def validate(self, validate: Callable[[], float]) -> None:
        with nullcontext() if self.average is None else self.average.applied():
            self.model.train(False)
            self.progress.add_validation(self.model, validate())
            self.model.train()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "stream": self.stream.state_dict(),
            "progress": self.progress.state_dict(),
            "random": random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "optimizer", "stream", "progress"):
            getattr(self, name).load_state_dict(state[name])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        set_random_state(state["random"])


def train(
    model: Trainable,
    stream: Batches,
    validate: Callable[[], float],
    plan: TrainingPlan,
    on_step: Callable[[float, float], None] = lambda done, loss: None,
    keeper: Keeper | None = None,
) -> TrainingLog:
    """Maximise the log-density of a stream of batches and restore the best state.

    Args:
        model: the model; trained in place.
        stream: batches (B, *), for ever.
        validate: returns the NLL of the validation rows in nats; it must leave the global
            generators as they were.
        plan: how to train.
        on_step: called after each step with the fraction done and the loss in nats.
        keeper: keeps checkpoints, and holds the one to go on from, if there is one: the training
            then goes on exactly as if it had not been interrupted (bit for bit on a CPU).

    Returns:
        The log of the training.

    Raises:
        TrainingDivergedError: a loss, or every validation, was not finite.
        CheckpointError: the checkpoint is damaged or of another run.
        WriteError: a checkpoint cannot be written.
        KeyboardInterrupt: Ctrl-C was pressed; with a keeper, there is a checkpoint of the step that
            was under way.
    """
    training = _Training(model, stream, plan)
    if keeper is not None:
        _take_up(training, keeper)
    model.train()
    interruption = Postponed()
    with nullcontext() if keeper is None else interruption:
        while not training.progress.finished:
            loss = training.step()
            on_step(training.progress.done, loss)
            if training.progress.due:
                training.validate(validate)
            ends = interruption.was_pressed or training.progress.finished
            if keeper is not None and (keeper.due or ends):
                keeper.save(training.state_dict())
            if ends:
                break
    return _close(model, training.progress)


def _take_up(training: _Training, keeper: Keeper) -> None:
    state = keeper.load()
    if state is None:
        return
    try:
        training.load_state_dict(state)
    except Exception as error:  # what is missing or misshapen may raise anything
        raise keeper.damaged() from error


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


def _close(model: Trainable, progress: _Progress) -> TrainingLog:
    if progress.best is None or progress.best_state is None:
        raise TrainingDivergedError(f"the validation NLL was never finite; {REMEDY}")
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
