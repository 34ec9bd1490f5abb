"""Training that stops by itself: one loop for every flow, and it knows none of them.

    history = fit(flow, train_rows, validation_rows)

`fit` is for users; commands give the same loop, `run`, their batches, checkpoints and exams.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.parameter import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nflows_iresnet.graphs import Loss, negative_log_likelihood
from nflows_iresnet.validation import validated_size

STEPS_BETWEEN_LOOKS = 8
"""On a GPU, which is let run ahead: to look at a loss is to wait for it."""
START_ROWS = 5_000
"""Rows that a flow is started from."""
MAX_STEPS = 5_000
CLIP_NORM = 10.0
_EXACT_FEATURES = 64
"""Up to so many dimensions validation takes the exact log-determinant of residual blocks."""
_ROWS_AT_ONCE = 1_024
_VALIDATION_SEED = 10_000
_NOISE_SEED = 2**32
REMEDY = (
    "lower the learning rate (learning_rate, --learning-rate), or look for outliers in the data"
)

Batch = Tensor | tuple[Tensor, ...]
"""Rows (B, *), or rows and their context (B, C)."""
Rows = Tensor | tuple[Tensor, ...] | Iterable[Batch | list[Tensor]]


class TrainingDivergedError(ArithmeticError):
    """The loss is no longer a finite number."""


def check_finite(loss: float, step: int) -> None:
    """Check the loss of a step.

    Raises:
        TrainingDivergedError: it is not finite.
    """
    if not math.isfinite(loss):
        raise TrainingDivergedError(f"the training loss was {loss} at step {step}; {REMEDY}")


def seed_everything(seed: int) -> None:
    """Seed torch, and numpy's global generator, from which normflows draws its truncation."""
    torch.manual_seed(seed)
    np.random.seed(seed)


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the global generators for a block, and leave them as they were; None does nothing."""
    if seed is None:
        yield
        return
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_everything(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


def random_state() -> dict[str, Any]:
    """Return the state of every global generator that models draw from."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    keys = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {**numpy, "state": {**numpy["state"], "key": keys}},
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on with the random numbers of `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    numpy = state["numpy"]
    keys = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": keys}})


# --- how long and how -----------------------------------------------------------------------------


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

    def learning_rate_at(self, progress: float) -> float:
        """Return the learning rate, warmed up and annealed by a cosine."""
        return self.learning_rate * self.factor_at(progress)

    def factor_at(self, progress: float) -> float:
        """Return the learning rate as a fraction of the initial one."""
        rising = 1.0 if progress >= self.warmup else max(0.1, progress / self.warmup)
        return 0.5 * rising * (1.0 + math.cos(math.pi * progress))


# --- what happened --------------------------------------------------------------------------------


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
        return json.dumps(_plain(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> History:
        """Rebuild a history from `to_json`."""
        values: dict[str, Any] = json.loads(text)
        points: Any = (
            {name: math.nan if value is None else value for name, value in point.items()}
            for point in values["curve"]
        )
        return cls(**{**values, "curve": tuple(CurvePoint(**point) for point in points)})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- batches --------------------------------------------------------------------------------------


class Batches(Iterator[Any]):
    """Batches for ever, one seeded shuffle per epoch; a remainder of rows is left out.

    Everything random comes from two generators of its own, so equal seeds yield equal batches
    whatever a model draws in between. Noise is drawn where the rows are: on a GPU it is other
    noise, and no batch waits for the device.

    Args:
        rows: (N, *), or a tuple of such tensors, whose rows belong together.
        batch_size: rows per batch; N if there are fewer rows.
        seed: equal seeds yield equal batches in equal order.
        prepare: turns rows and a generator into a batch, to add noise for example.
    """

    def __init__(
        self,
        rows: Tensor | tuple[Tensor, ...],
        batch_size: int,
        seed: int,
        prepare: Callable[[Tensor, Generator], Tensor] | None = None,
    ) -> None:
        self._single = isinstance(rows, Tensor)
        self._rows = (rows,) if isinstance(rows, Tensor) else rows
        self._prepare = prepare
        self._count, self._device = self._rows[0].shape[0], self._rows[0].device
        self._size = min(batch_size, self._count)
        self._shuffles = Generator().manual_seed(seed)
        self._noise = Generator(self._device).manual_seed(seed + _NOISE_SEED)
        self._start_epoch()

    def __next__(self) -> Any:
        """Return the next batch: a tensor for a tensor, a tuple for a tuple."""
        if self._position + self._size > self._count:
            self._start_epoch()
        chosen = self._order[self._position : self._position + self._size]
        self._position += self._size
        batch, *rest = (each[chosen] for each in self._rows)
        batch = batch if self._prepare is None else self._prepare(batch, self._noise)
        return batch if self._single else (batch, *rest)

    def _start_epoch(self) -> None:
        self._before_shuffle = self._shuffles.get_state()
        order = torch.randperm(self._count, generator=self._shuffles)
        self._order = order.to(self._device)
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position, from which `load_state_dict` goes on."""
        return {
            "shuffle": self._before_shuffle,
            "position": self._position,
            "noise": self._noise.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stream over the same rows was."""
        self._shuffles.set_state(state["shuffle"])
        self._start_epoch()
        self._position = state["position"]
        self._noise.set_state(state["noise"])


# --- one step -------------------------------------------------------------------------------------


class WeightAverage:
    r"""a_t = d_t a_{t-1} + (1 - d_t) w_t with d_t = min(decay, t / (t + 10)), a_0 = w_0.

    The decay grows from zero, so that the random start is soon forgotten. `AveragedModel` keeps the
    parameters alone: buffers, certificates and whatever else a model holds stay its own, and are
    right because the averages are put into the model itself while they are needed.

    References:
        Polyak, Juditsky. Acceleration of stochastic approximation by averaging, 1992.

    Args:
        parameters: what is averaged.
        decay: the final d, in [0, 1).
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self._trained = nn.ParameterList(parameters)
        self._averaged = AveragedModel(self._trained, multi_avg_fn=get_ema_multi_avg_fn(0.0))
        self._decay, self._count = decay, 0

    def update(self) -> None:
        """Take in the present parameters."""
        decay = min(self._decay, self._count / (self._count + 10))
        self._averaged.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self._averaged.update_parameters(self._trained)
        self._count += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model for the duration of a block."""
        trained = [parameter.detach().clone() for parameter in self._trained]
        self._put(self._averaged.module.parameters())
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self._trained, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs."""
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved average."""
        self._averaged.load_state_dict(state)
        self._count = int(self._averaged.n_averaged)


def adam(parameters: Iterable[Parameter], learning_rate: float) -> torch.optim.Adam:
    """Return Adam; on a GPU one that a graph can hold, with the learning rate in a tensor."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("nothing is to be trained: no parameter requires a gradient")
    device = trained[0].device
    if device.type != "cuda":
        return torch.optim.Adam(trained, lr=learning_rate)
    rate = torch.tensor(learning_rate, device=device)
    return torch.optim.Adam(trained, lr=rate, capturable=True, foreach=True)


def set_learning_rate(group: dict[str, Any], learning_rate: float) -> None:
    """Set the learning rate of a group; a tensor keeps its place, which a graph reads."""
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
        clip_norm: largest norm of the gradient, None for no clipping.
        loss: of (model, *batch), a scalar.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
        loss: Loss = negative_log_likelihood,
    ) -> None:
        self._model, self._optimizer, self._clip_norm = model, optimizer, clip_norm
        self._loss = loss
        self._step: Callable[..., Tensor] = self._eager
        self._steps = 0
        self._refused: str | None = None

    def __call__(self, *batch: Tensor) -> Tensor:
        """Take a step and return its loss, which the device may still be computing."""
        self._steps += 1
        if batch[0].is_cuda and self._steps == 2:
            self._step = self._graphed(*batch)
        return self._step(*batch).detach().clone()

    @property
    def is_captured(self) -> bool:
        """Whether a step is one graph."""
        return bool(getattr(self._step, "is_captured", False))

    @property
    def capture_reason(self) -> str | None:
        """Why it is not, None where it is, and on a CPU."""
        reason: str | None = getattr(self._step, "reason", self._refused)
        return None if self.is_captured else reason

    def _eager(self, *batch: Tensor) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self._model, *batch)
        loss.backward()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        self._optimizer.step()
        return loss

    def _graphed(self, *batch: Tensor) -> Callable[..., Tensor]:
        from nflows_iresnet.graphs import GraphedStep

        context = {"context": batch[1]} if len(batch) > 1 else {}
        options: dict[str, Any] = {"loss": self._loss, "max_grad_norm": self._clip_norm, **context}
        try:
            step: Callable[..., Tensor] = GraphedStep(
                self._model, self._optimizer, batch[0], **options
            )
        except (ValueError, RuntimeError) as error:
            first, *_ = str(error).splitlines() or ["no message"]
            self._refused = f"{type(error).__name__}: {first}"
            return self._eager
        return step


# --- the loop -------------------------------------------------------------------------------------


class Keeper(Protocol):
    """Keeps the last checkpoint of a training."""

    @property
    def due(self) -> bool:
        """Whether it is time for another one."""

    def save(self, state: dict[str, Any], /) -> None:
        """Replace the checkpoint."""

    def load(self) -> dict[str, Any] | None:
        """Return the checkpoint, None if there is none."""

    def damaged(self) -> Exception:
        """Return the error that says that the checkpoint is damaged."""


class Interruption(AbstractContextManager[object], Protocol):
    """Says whether somebody wants the training to stop at the end of its step."""

    @property
    def was_pressed(self) -> bool:
        """Whether it is to stop."""


class _Never:
    """Nobody wants it to stop."""

    was_pressed = False

    def __enter__(self) -> _Never:
        return self

    def __exit__(self, *_: object) -> None:
        return None


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
    def stopped(self) -> str | None:
        """Why the training is at its end, None if it is not."""
        if self.done >= 1.0:
            return "length"
        return "patience" if self._stale >= self.plan.patience else None

    @property
    def _stale(self) -> int:
        return 0 if self.best is None else len(self.curve) - 1 - self.curve.index(self.best)

    def add_steps(self, seconds: float, losses: list[float]) -> None:
        for loss in losses:
            self.seconds.append(seconds / len(losses))
            self.losses.append(loss)
            check_finite(loss, len(self.seconds))
        self.elapsed += seconds

    def add_validation(self, model: nn.Module, value: float) -> None:
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


class Training:
    """A training under way: everything that a checkpoint holds.

    Args:
        model: trained in place.
        stream: batches for ever, each a tensor or a tuple; with `state_dict` if there are
            checkpoints.
        plan: how to train.
        validate: returns the NLL of the validation rows in nats; it must leave the global
            generators as they were.
        optimizer: of the model's parameters; Adam by default.
        loss: of (model, *batch), a scalar; by default the mean negative log-likelihood.
        after_step: called after each step of the optimiser.
    """

    def __init__(
        self,
        model: Any,
        stream: Iterator[Any],
        plan: TrainingPlan,
        validate: Callable[[], float],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        loss: Loss = negative_log_likelihood,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.stream, self.plan = model, stream, plan
        self.optimizer = optimizer or adam(model.parameters(), plan.learning_rate)
        self.progress = _Progress(plan)
        decay = plan.average_decay
        self.average = None if decay is None else WeightAverage(model.parameters(), decay)
        self.stepper = Stepper(model, self.optimizer, plan.clip_norm, loss)
        self._validate, self._after_step = validate, after_step
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._unseen: list[Tensor] = []
        self._since = 0.0

    def step(self) -> None:
        """Take a step; on a GPU it may still be computed."""
        if not self._unseen:
            self._since = self.plan.clock()
        factor = self.plan.factor_at(self.progress.done)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            set_learning_rate(group, rate * factor)
        batch = next(self.stream)
        with _precision(self.plan):
            loss = self.stepper(*(batch if isinstance(batch, tuple) else (batch,)))
        self._unseen.append(loss)
        self._after_step()
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
        self.progress.add_steps(self.plan.clock() - self._since, losses)
        return losses[-1]

    def validate(self) -> None:
        """Validate the average of the weights, and keep it if it is the best."""
        with nullcontext() if self.average is None else self.average.applied():
            self.model.train(False)
            self.progress.add_validation(self.model, self._validate())
            self.model.train()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs."""
        stream: Any = self.stream
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "stream": stream.state_dict(),
            "progress": self.progress.state_dict(),
            "random": random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved training."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for name in ("model", "optimizer", "stream", "progress"):
            getattr(self, name).load_state_dict(state[name])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # a number on the device stays there; each step sets it
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        set_random_state(state["random"])


def run(
    training: Training,
    on_step: Callable[[float, float], None] = lambda done, loss: None,
    keeper: Keeper | None = None,
    interruption: Interruption | None = None,
) -> History:
    """Train to the end and restore the best state.

    Args:
        training: what is trained, and how.
        on_step: called after each step with the fraction done and the loss in nats.
        keeper: keeps checkpoints, and holds the one to go on from, if there is one: the training
            then goes on exactly as if it had not been interrupted (bit for bit on a CPU).
        interruption: says at the end of each step whether to stop, after a checkpoint.

    Returns:
        The history; after an interruption that raises nothing, what was reached.

    Raises:
        TrainingDivergedError: a loss, or every validation, was not finite.
    """
    if keeper is not None:
        _take_up(training, keeper)
    training.model.train()
    wish: Interruption = _Never() if interruption is None else interruption
    with wish:
        while training.progress.stopped is None:
            training.step()
            if not (training.is_to_be_looked_at or wish.was_pressed):
                continue
            loss = training.look()
            on_step(training.progress.done, loss)
            if training.progress.due:
                training.validate()
            ends = wish.was_pressed or training.progress.stopped is not None
            if keeper is not None and (keeper.due or ends):
                keeper.save(training.state_dict())
            if ends:
                break
    return close(training)


def _take_up(training: Training, keeper: Keeper) -> None:
    state = keeper.load()
    if state is None:
        return
    try:
        training.load_state_dict(state)
    except Exception as error:  # what is missing or misshapen may raise anything
        raise keeper.damaged() from error


def close(training: Training) -> History:
    """Restore the best state and say what happened.

    Raises:
        TrainingDivergedError: there is none.
    """
    progress, stepper = training.progress, training.stepper
    if progress.best is None or progress.best_state is None:
        raise TrainingDivergedError(f"the validation NLL was never finite; {REMEDY}")
    training.model.load_state_dict(progress.best_state)
    training.model.train(False)
    return History(
        steps=len(progress.seconds),
        seconds=progress.elapsed,
        ms_per_step=1e3 * float(np.median(progress.seconds)),
        best_step=progress.best.step,
        best_validation=progress.best.validation,
        curve=tuple(progress.curve),
        is_captured=stepper.is_captured,
        capture_reason=stepper.capture_reason,
        stopped=progress.stopped or "interrupted",
    )


def _precision(plan: TrainingPlan) -> AbstractContextManager[object]:
    if not plan.tf32:
        return nullcontext()
    from nflows_iresnet.precision import allow_tf32_in_training

    return allow_tf32_in_training()


# --- for users ------------------------------------------------------------------------------------


def fit(
    flow: Any,
    train: Rows,
    validation: Rows | Callable[[Any], float],
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    learning_rate: float = 3e-3,
    batch_size: int = 256,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    max_grad_norm: float | None = CLIP_NORM,
    warmup: float = 0.02,
    average_decay: float | None = 0.999,
    validations: int = 50,
    patience: int = 10,
    initialize: bool = True,
    seed: int | None = 0,
    after_step: Callable[[], None] = lambda: None,
    on_step: Callable[[float, float], None] | None = None,
    progress: bool | None = None,
) -> History:
    r"""Train a flow by maximum likelihood until it stops by itself, and leave it in its best state.

    A step minimises the mean of -log p over a batch, clips the gradient and lets the optimiser
    step. The learning rate rises over the first `warmup` of the training from a tenth, and falls by
    a cosine, r (1 + cos(pi t)) / 2, where t is the part of the steps or of the time that is done.
    What is validated and kept is a moving average of the weights: a_t = d a_{t-1} + (1 - d) w_t
    with d = min(`average_decay`, t / (t + 10)). The training ends with the steps or the time, or
    earlier: after `patience` validations without a new best. The best state is restored.

    On CUDA a step is one graph where that can be (`graphs.GraphedStep`); `capture_reason` of the
    history says why not.

    **Cost.** Beside the steps: a copy of the weights for the average and one for the best state,
    and the validations, whose time does not count. Up to 64 dimensions they take the exact
    log-determinants of residual blocks, d products for each row and block; beyond that, and for a
    `loss` of your own, they are what the flow says in evaluation mode, with the same random numbers
    each time.

    **Ctrl-C** ends the training and returns what was reached; before the first validation there is
    nothing to return, and it is raised.

    Args:
        flow: any flow of nflows or of this library, or any module with `log_prob(rows)` or
            `log_prob(rows, context)` in nats; with a `loss`, any module. Trained in place.
        train: rows (N, *), or rows and their context ((N, *), (N, C)), shuffled afresh in each
            epoch; or a data loader of such batches, which is run through again and again. They are
            moved to the device of the flow, and numbers that are not whole to its precision.
        validation: the same, never trained on; or a callable of the flow that returns the number
            to be minimised.
        loss: callable of (flow, rows) or (flow, rows, context) that returns a scalar to be
            minimised: `lambda flow, rows: flow.forward_kld(rows)` for a flow of normflows.
        optimizer: of the flow's parameters; its own learning rates are then what the schedule
            scales. By default Adam (capturable on CUDA) with `learning_rate`.
        learning_rate: the largest one.
        batch_size: rows of a step, where `train` is no data loader.
        max_steps: length of the schedule in steps; 5,000 unless there is `max_seconds`.
        max_seconds: its length in seconds of training.
        max_grad_norm: what the norm of the gradient is clipped to; None leaves it as it is.
        warmup: part of the training in which the learning rate rises.
        average_decay: in [0, 1); None validates and keeps the weights themselves.
        validations: how often the flow is validated, at equal intervals of the schedule.
        patience: validations without a new best after which training stops.
        initialize: whether a flow with parts that start from data (`flow.initialize`), one of which
            has not started, is started from the first 5,000 rows of `train`.
        seed: of all that is random in the training, so that the same call on the same weights gives
            the same result (bit for bit on a CPU); the global generators of torch and numpy are
            left as they were. None draws from them.
        after_step: called after each step, for models that ask for it.
        on_step: called after each step with the fraction done and the loss.
        progress: whether validations are shown on stderr; by default if that is a terminal.

    Returns:
        The history: steps, seconds, the validations and the best of them, and why it stopped.

    Raises:
        ValueError: an argument is out of range, there are no rows, or some are not finite.
        TrainingDivergedError: a loss, or every validation, was not finite; it names the step.

    References:
        Kingma, Ba. Adam: a method for stochastic optimization, 2015.
        Loshchilov, Hutter. SGDR: stochastic gradient descent with warm restarts, 2017.
        Polyak, Juditsky. Acceleration of stochastic approximation by averaging, 1992.

    Example:
        >>> from nflows_iresnet import ResidualFlow
        >>> rows = torch.randn(600, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
        >>> flow = ResidualFlow(features=2, hidden_features=16, num_layers=2)
        >>> history = fit(flow, rows[:500], rows[500:], max_steps=40, validations=5)
        >>> history.best_step in [point.step for point in history.curve], history.stopped
        (True, 'length')
    """
    _check_positive(
        learning_rate=learning_rate,
        max_seconds=max_seconds,
        max_grad_norm=max_grad_norm,
        patience=patience,
        validations=validations,
    )
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be a part of the training, in [0, 1), got {warmup}")
    plan = TrainingPlan(
        learning_rate,
        _length(max_steps, max_seconds),
        clip_norm=max_grad_norm,
        validations=validations,
        patience=patience,
        average_decay=average_decay,
        warmup=warmup,
    )
    like = _largest_parameter(flow)
    given = _Given(train, like, "training")
    with seeded(seed, like.device):
        if initialize and _waits_for_rows(flow):
            flow.initialize(*given.first(START_ROWS))
        validate = validation if callable(validation) else _Validator(validation, like, loss)
        training = Training(
            flow,
            given.stream(validated_size("batch_size", batch_size)),
            plan,
            lambda: _number(validate(flow)),
            optimizer=optimizer,
            loss=loss or negative_log_likelihood,
            after_step=after_step,
        )
        shown = sys.stderr.isatty() if progress is None else progress
        return _until_interrupted(training, _Display(training.progress, on_step, shown=shown))


def _until_interrupted(training: Training, on_step: Callable[[float, float], None]) -> History:
    try:
        return run(training, on_step)
    except KeyboardInterrupt:
        if training.progress.best is None:
            raise
        return replace(close(training), stopped="interrupted")


def _length(max_steps: int | None, max_seconds: float | None) -> Length:
    lengths: list[Length] = [] if max_seconds is None else [Seconds(max_seconds)]
    if max_steps is not None or not lengths:
        given = MAX_STEPS if max_steps is None else max_steps
        lengths.append(Steps(validated_size("max_steps", given)))
    return FirstOf(tuple(lengths))


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value}")


def _largest_parameter(flow: Any) -> Tensor:
    """Return what tells the precision of a flow: one small number in it may have another."""
    trained = [each for each in flow.parameters() if each.requires_grad]
    if not trained:
        raise ValueError("nothing is to be trained: no parameter requires a gradient")
    return max(trained, key=Tensor.numel)


def _number(value: Any) -> float:
    """Return what a validation returned, a number or a tensor of one."""
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"validation must return one number, to be minimised, got {given}"
        ) from None


def _waits_for_rows(flow: Any) -> bool:
    """Whether a flow can be started from rows, and a part of it has not been yet."""
    states = [getattr(module, "initialized", None) for module in flow.modules()]
    flags = [state for state in states if isinstance(state, Tensor)]
    return hasattr(flow, "initialize") and not all(bool(flag) for flag in flags)


@dataclass(frozen=True)
class _Given:
    """Rows as users give them: tensors, or a data loader."""

    rows: Any
    like: Tensor
    what: str

    def __post_init__(self) -> None:
        if not self._is_loader:
            self._check(self._tensors())
        elif not isinstance(self.rows, Iterable):
            raise ValueError(
                f"the {self.what} rows must be a tensor, a tuple of rows and context, or a data "
                f"loader, got {type(self.rows).__name__}"
            )

    @property
    def _is_loader(self) -> bool:
        return not isinstance(self.rows, Tensor | tuple)

    def _tensors(self) -> tuple[Tensor, ...]:
        given = self.rows if isinstance(self.rows, tuple) else (self.rows,)
        return tuple(self._moved(each) for each in given if each is not None)

    def _moved(self, values: Any) -> Tensor:
        if not isinstance(values, Tensor):
            raise ValueError(
                f"the {self.what} rows must be tensors, got {type(values).__name__}: convert by "
                "torch.as_tensor"
            )
        dtype = self.like.dtype if values.is_floating_point() else values.dtype
        return values.to(self.like.device, dtype)

    def _check(self, tensors: tuple[Tensor, ...]) -> None:
        if not tensors or tensors[0].dim() == 0 or tensors[0].shape[0] == 0:
            raise ValueError(f"there are no {self.what} rows")
        for each in tensors:
            if each.dim() == 0 or each.shape[0] != tensors[0].shape[0]:
                raise ValueError(
                    f"there must be one context for each of the {tensors[0].shape[0]} "
                    f"{self.what} rows, got shape {tuple(each.shape)}"
                )
            bad = _rows_not_finite(each)
            if bad.numel():
                raise ValueError(
                    f"{bad.numel()} of {each.shape[0]} {self.what} rows are not finite, first row "
                    f"{int(bad[0])}: drop or impute them"
                )

    def stream(self, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
        """Return batches for ever."""
        if self._is_loader:
            return self._cycled()
        seed = int(torch.randint(2**31, ()))
        return Batches(self._tensors(), batch_size, seed)

    def _cycled(self) -> Iterator[tuple[Tensor, ...]]:
        while True:
            count = 0
            for batch in self.batches():
                count += 1
                yield batch
            if not count:
                raise ValueError(f"the {self.what} loader has no batch{_if_it_ran_out(self.rows)}")

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Return all rows once."""
        if not self._is_loader:
            chunks = [each.split(_ROWS_AT_ONCE) for each in self._tensors()]
            yield from zip(*chunks, strict=True)
            return
        for batch in self.rows:
            yield tuple(map(self._moved, batch if isinstance(batch, Sequence) else (batch,)))

    def first(self, count: int) -> tuple[Tensor, ...]:
        """Return the first rows."""
        parts: list[tuple[Tensor, ...]] = []
        for batch in self.batches():
            parts.append(batch)
            if sum(part[0].shape[0] for part in parts) >= count:
                break
        if not parts:
            raise ValueError(f"the {self.what} loader has no batch")
        return tuple(torch.cat(each)[:count] for each in zip(*parts, strict=True))


def _if_it_ran_out(rows: object) -> str:
    if not isinstance(rows, Iterator):
        return ""
    return (
        f": a {type(rows).__name__} runs out after one pass; give a data loader, or a list of "
        "the batches"
    )


def _rows_not_finite(values: Tensor) -> Tensor:
    """Return the indices of rows that hold NaN or infinity, of values (N, *) or (N,)."""
    return (~values.isfinite())[:, None].flatten(start_dim=1).any(dim=1).nonzero().flatten()


class _Validator:
    """The mean loss of all validation rows, with the same random numbers each time."""

    def __init__(self, rows: Rows, like: Tensor, loss: Loss | None) -> None:
        if isinstance(rows, Iterator):
            raise ValueError(f"validation has no rows the second time{_if_it_ran_out(rows)}")
        self._given = _Given(rows, like, "validation")
        self._loss, self._device = loss, like.device

    @torch.no_grad()
    def __call__(self, flow: Any) -> float:
        total, count = 0.0, 0
        with seeded(_VALIDATION_SEED, self._device):
            for batch in self._given.batches():
                rows, value = batch[0].shape[0], self._value(flow, batch)
                if not math.isfinite(value):
                    self._blame_rows(batch, count)
                total, count = total + rows * value, count + rows
        if not count:
            raise ValueError("the validation loader has no batch")
        return total / count

    def _blame_rows(self, batch: tuple[Tensor, ...], seen: int) -> None:
        """Raise if a batch, `seen` rows after the first, is what is not finite."""
        for each in batch:
            bad = _rows_not_finite(each)
            if bad.numel():
                raise ValueError(
                    f"{bad.numel()} of {each.shape[0]} validation rows of a batch are not finite, "
                    f"first row {seen + int(bad[0])}: drop or impute them"
                )

    def _value(self, flow: Any, batch: tuple[Tensor, ...]) -> float:
        if self._loss is not None:
            return float(self._loss(flow, *batch))
        exact = batch[0].shape[1:].numel() <= _EXACT_FEATURES
        with _exactly(flow) if exact else nullcontext():
            return -float(flow.log_prob(*batch).double().mean())


def _exactly(flow: nn.Module) -> AbstractContextManager[object]:
    from nflows_iresnet import logdet, transforms

    if not any(isinstance(each, transforms.ResidualTransform) for each in flow.modules()):
        return nullcontext()
    return transforms.using(flow, estimator=logdet.Exact())


class _Display:
    """Shows validations in one line on stderr, and passes the steps on."""

    def __init__(
        self,
        progress: _Progress,
        on_step: Callable[[float, float], None] | None,
        *,
        shown: bool,
    ) -> None:
        self._progress, self._on_step, self._shown = progress, on_step, shown

    def __call__(self, done: float, loss: float) -> None:
        if self._on_step is not None:
            self._on_step(done, loss)
        best = self._progress.best
        if self._shown and best is not None and self._progress.due:
            print(
                f"\r{done:4.0%}  step {self._progress.begun}  loss {loss:.3f}  best validation "
                f"{best.validation:.3f} at step {best.step} ",
                end="\n" if done >= 1 else "",
                file=sys.stderr,
                flush=True,
            )
