"""The training loop: one for every model, and it knows none of them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from nflows_iresnet.compare.averaging import WeightAverage
from nflows_iresnet.compare.checkpoints import Keeper, random_state, set_random_state
from nflows_iresnet.compare.config import describe
from nflows_iresnet.compare.divergence import REMEDY, TrainingDivergedError, check_finite
from nflows_iresnet.compare.interruption import Postponed
from nflows_iresnet.compare.plan import TrainingPlan
from nflows_iresnet.compare.stream import Batches

STEPS_BETWEEN_LOOKS = 8
"""On a GPU, which is let run ahead: to look at a loss is to wait for it."""


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
        is_captured: whether a step was one CUDA graph.
        capture_reason: why it was not, None where it was, and on a CPU.
    """

    steps: int
    seconds: float
    ms_per_step: float
    best_step: int
    best_validation: float
    curve: tuple[CurvePoint, ...]
    is_captured: bool = False
    capture_reason: str | None = None


def seed_everything(seed: int) -> None:
    """Seed torch, and numpy's global generator, from which normflows draws its truncation."""
    torch.manual_seed(seed)
    np.random.seed(seed)


@dataclass
class _Progress:
    """The running state of one training."""

    plan: TrainingPlan
    begun: int = 0
    seconds: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    best_state: dict[str, Any] | None = None
    best: CurvePoint | None = None
    validated: int = 0

    @property
    def done(self) -> float:
        return self.plan.length.progress(self.begun, self.elapsed)

    @property
    def due(self) -> bool:
        return self.done >= 1.0 or int(self.done * self.plan.validations) > self.validated

    @property
    def finished(self) -> bool:
        return self.done >= 1.0 or self._stale >= self.plan.patience

    @property
    def _stale(self) -> int:
        return 0 if self.best is None else len(self.curve) - 1 - self.curve.index(self.best)

    def add_steps(self, seconds: float, losses: list[float]) -> None:
        for loss in losses:
            self.seconds.append(seconds / len(losses))
            self.losses.append(loss)
            check_finite(loss, len(self.seconds))
        self.elapsed += seconds

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
        self.begun = len(self.seconds)


class _Training:
    """A training under way: everything that a checkpoint holds."""

    def __init__(self, model: Trainable, stream: Batches, plan: TrainingPlan) -> None:
        self.model, self.stream, self.plan = model, stream, plan
        self.optimizer = adam(model.parameters(), plan.learning_rate)
        self.progress = _Progress(plan)
        self.average = (
            None
            if plan.average_decay is None
            else WeightAverage(model.parameters(), plan.average_decay)
        )
        self.stepper = Stepper(model, self.optimizer, plan.clip_norm)
        self._unseen: list[Tensor] = []
        self._since = 0.0

    def step(self) -> None:
        if not self._unseen:
            self._since = time.perf_counter()
        set_learning_rate(self.optimizer, self.plan.learning_rate_at(self.progress.done))
        with _precision(self.plan):
            self._unseen.append(self.stepper(next(self.stream)))
        self.model.after_step()
        if self.average is not None:
            self.average.update()
        self.progress.begun += 1

    @property
    def is_to_be_looked_at(self) -> bool:
        """Whether the host has to know the losses now, or waits for nothing by asking."""
        on_gpu = self._unseen[-1].is_cuda
        return not on_gpu or len(self._unseen) >= STEPS_BETWEEN_LOOKS or self.progress.due

    def look(self) -> float:
        """Take in the losses of the steps since the last look, and return the last."""
        losses: list[float] = torch.stack(self._unseen).tolist()
        self._unseen.clear()
        self.progress.add_steps(time.perf_counter() - self._since, losses)
        return losses[-1]

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
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for name in ("model", "optimizer", "stream", "progress"):
            getattr(self, name).load_state_dict(state[name])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # a number on the device stays there; each step sets it
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
            training.step()
            if not (training.is_to_be_looked_at or interruption.was_pressed):
                continue
            loss = training.look()
            on_step(training.progress.done, loss)
            if training.progress.due:
                training.validate(validate)
            ends = interruption.was_pressed or training.progress.finished
            if keeper is not None and (keeper.due or ends):
                keeper.save(training.state_dict())
            if ends:
                break
    return _close(model, training.progress, training.stepper)


def _take_up(training: _Training, keeper: Keeper) -> None:
    state = keeper.load()
    if state is None:
        return
    try:
        training.load_state_dict(state)
    except Exception as error:  # what is missing or misshapen may raise anything
        raise keeper.damaged() from error


def adam(parameters: Iterable[Parameter], learning_rate: float) -> torch.optim.Adam:
    """Return Adam; on a GPU one that a graph can hold, with the learning rate in a tensor."""
    trained = list(parameters)
    device = trained[0].device
    if device.type != "cuda":
        return torch.optim.Adam(trained, lr=learning_rate)
    rate = torch.tensor(learning_rate, device=device)
    return torch.optim.Adam(trained, lr=rate, capturable=True, foreach=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate; a tensor keeps its place, which a graph reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


class Stepper:
    """Optimiser steps of one model: on a GPU from the second on one graph, where that can be.

    The first step shows ActNorm its first batch and fills the state of the optimiser, neither of
    which a graph can hold.

    Args:
        model: in training mode.
        optimizer: of its parameters.
        clip_norm: largest norm of the gradient.
    """

    def __init__(
        self, model: Trainable, optimizer: torch.optim.Optimizer, clip_norm: float
    ) -> None:
        self._model, self._optimizer, self._clip_norm = model, optimizer, clip_norm
        self._step: Callable[[Tensor], Tensor] = self._eager
        self._steps = 0
        self._refused: str | None = None

    def __call__(self, batch: Tensor) -> Tensor:
        """Take a step and return its loss, which the device may still be computing."""
        self._steps += 1
        if batch.is_cuda and self._steps == 2:
            self._step = self._graphed(batch)
        return self._step(batch).detach().clone()

    @property
    def is_captured(self) -> bool:
        """Whether a step is one graph."""
        return bool(getattr(self._step, "is_captured", False))

    @property
    def capture_reason(self) -> str | None:
        """Why it is not, None where it is, and on a CPU."""
        reason: str | None = getattr(self._step, "reason", self._refused)
        return None if self.is_captured else reason

    def _eager(self, batch: Tensor) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss = _loss(self._model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        self._optimizer.step()
        return loss

    def _graphed(self, batch: Tensor) -> Callable[[Tensor], Tensor]:
        from nflows_iresnet.graphs import GraphedStep

        model: Any = self._model
        try:
            step: Callable[[Tensor], Tensor] = GraphedStep(
                model, self._optimizer, batch, loss=_loss, max_grad_norm=self._clip_norm
            )
        except (ValueError, RuntimeError) as error:
            self._refused = describe(error)
            return self._eager
        return step


def _loss(model: Trainable, batch: Tensor) -> Tensor:
    return -model.log_prob(batch).mean()


def _precision(plan: TrainingPlan) -> AbstractContextManager[object]:
    if not plan.tf32:
        return nullcontext()
    from nflows_iresnet.precision import allow_tf32_in_training

    return allow_tf32_in_training()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _close(model: Trainable, progress: _Progress, stepper: Stepper) -> TrainingLog:
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
        is_captured=stepper.is_captured,
        capture_reason=stepper.capture_reason,
    )
