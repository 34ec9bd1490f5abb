"""Training that stops by itself: one loop for every flow, and it knows none of them.

    history = fit(flow, train_rows, validation_rows)

`fit` is for users; commands give the same loop, `run`, their batches, checkpoints and validations.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Generator, Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nflows_iresnet.graphs import EagerStep, Loss, negative_log_likelihood
from nflows_iresnet.interruption import Handled
from nflows_iresnet.validation import validated_size

if distributed.is_available():
    import torch.distributed.nn  # after init_process_group it would keep the group's threads alive

STEPS_BETWEEN_LOOKS = 8
"""On a GPU, which is let run ahead: to look at a loss is to wait for it."""
START_ROWS = 5_000
"""Rows that a flow is started from."""
MAX_STEPS = 5_000
CLIP_NORM = 10.0
_EXACT_FEATURES = 64
"""Up to so many dimensions validation takes the exact log-determinant of residual blocks."""
_ROWS_AT_ONCE = 1_024
SECONDS_BETWEEN_CHECKPOINTS = 60.0
_SECONDS_OF_ONE_PRESS = 0.5
_NOT_THE_PLAN = {"clock", "validates_start"}
"""What a training that goes on may have otherwise."""
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


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
        validates_start: whether the state before the first step may be the best, which a flow that
            was trained before needs.
        cooldown: when patience ends, how much longer, as a part of what is done, the training goes
            on from its best state while the learning rate falls to zero; 0 ends it at once.
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
    cooldown: float = 0.0

    def learning_rate_at(self, progress: float) -> float:
        """Return the learning rate, warmed up and annealed by a cosine."""
        return self.learning_rate * self.factor_at(progress)

    def factor_at(self, progress: float) -> float:
        """Return the learning rate as a fraction of the initial one."""
        rising = 1.0 if progress >= self.warmup else max(0.1, progress / self.warmup)
        return rising * _annealed(progress)


def _annealed(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


# --- what happened --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurvePoint:
    """One validation during training.

    Args:
        step: optimiser steps so far.
        seconds: training time so far.
        train: mean training loss since the last point, in nats; NaN before the first step.
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
        stopped: "length" at the end of the schedule, "patience" without a new best for so long (and
            after the cooldown, if there is one), "interrupted" by Ctrl-C.
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


# --- several processes ----------------------------------------------------------------------------

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Processes:
    """The processes of `torch.distributed` that train one flow together.

    Args:
        rank: which of them this is.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def present(cls) -> Processes:
        """Return those that there are.

        Raises:
            ValueError: a launcher has started several, and they do not know of each other.
        """
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        count = os.environ.get("WORLD_SIZE", "1")
        if count.strip() != "1":
            raise ValueError(
                f"this is one of WORLD_SIZE={count} processes, and each would train a flow of its "
                "own: call torch.distributed.init_process_group() first, or unset WORLD_SIZE"
            )
        return cls()

    def of_all(self, values: list[float]) -> list[list[float]]:
        """Return the numbers of every process; each gives as many."""
        if self.count == 1:
            return [values]
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        given = torch.tensor(values, dtype=torch.float64, device=device)
        found = [torch.empty_like(given) for _ in range(self.count)]
        distributed.all_gather(found, given)
        return [each.tolist() for each in found]

    def objects_of_all(self, value: _Result) -> list[_Result]:
        """Return the value of every process."""
        found: list[Any] = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(found, value)
        return found

    def first(self, compute: Callable[[], _Result]) -> _Result:
        """Return what the first process computes; the others fail if it does."""
        if self.count == 1:
            return compute()
        told: list[Any] = [None, None]
        error: Exception | None = None
        if self.rank == 0:
            try:
                told[0] = compute()
            except Exception as raised:
                error, told[1] = raised, f"{type(raised).__name__}: {raised}"
        distributed.broadcast_object_list(told)
        if error is not None:
            raise error
        if told[1] is not None:
            raise RuntimeError(f"the first process failed: {told[1]}")
        result: _Result = told[0]
        return result

    def agree_on_state(self, model: nn.Module, *, of_buffers: bool = False) -> None:
        """Load the state of the first process's model into the others', or that of its buffers."""
        if self.count == 1:
            return
        others = {name for name, _ in model.named_parameters()} if of_buffers else ()
        state = {
            name: value.cpu() if isinstance(value, Tensor) else value
            for name, value in model.state_dict().items()
            if name not in others
        }
        model.load_state_dict(self.first(lambda: state), strict=not of_buffers)


ALONE = Processes()


class _Loss(nn.Module):
    """A loss as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, flow: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.flow, self._loss = flow, loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self._loss(self.flow, *batch)


def _forward(module: nn.Module, *batch: Tensor) -> Tensor:
    loss: Tensor = module(*batch)
    return loss


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
        processes: that share out each batch; its size is then a multiple of their number.
    """

    def __init__(
        self,
        rows: Tensor | tuple[Tensor, ...],
        batch_size: int,
        seed: int,
        prepare: Callable[[Tensor, Generator], Tensor] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._single = isinstance(rows, Tensor)
        self._rows = (rows,) if isinstance(rows, Tensor) else rows
        self._prepare = prepare
        self._count, self._device = self._rows[0].shape[0], self._rows[0].device
        self._size, self._processes = min(batch_size, self._count), processes
        self._size -= self._size % processes.count
        if self._size == 0:
            raise ValueError(
                f"{processes.count} processes cannot share a batch of "
                f"{min(batch_size, self._count)} rows: each needs one"
            )
        self._shuffles = Generator().manual_seed(seed)
        noise = seed + _NOISE_SEED + processes.rank
        self._noise = Generator(self._device).manual_seed(noise)
        self._start_epoch()

    def __next__(self) -> Any:
        """Return the next batch: a tensor for a tensor, a tuple for a tuple."""
        if self._position + self._size > self._count:
            self._start_epoch()
        chosen = self._order[self._position : self._position + self._size]
        self._position += self._size
        chosen = chosen[self._processes.rank :: self._processes.count]
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
        """Go on where batches of the same rows were."""
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

    def restart(self) -> None:
        """Forget all parameters that were taken in."""
        self._averaged.n_averaged.zero_()
        self._count = 0

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
        self._eager = EagerStep(model, optimizer, loss, clip_norm)
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

    def _graphed(self, *batch: Tensor) -> Callable[..., Tensor]:
        from nflows_iresnet.graphs import GraphedStep

        step = self._eager
        options: dict[str, Any] = {"loss": step.loss, "max_grad_norm": step.max_grad_norm}
        if len(batch) > 1:
            options["context"] = batch[1]
        try:
            return GraphedStep(step.flow, step.optimizer, batch[0], **options)
        except (ValueError, RuntimeError) as error:
            first, *_ = str(error).splitlines() or ["no message"]
            self._refused = f"{type(error).__name__}: {first}"
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
    cools_from: float | None = None
    """The part that was done when patience ended and a cooldown began."""

    @property
    def done(self) -> float:
        return self.plan.length.progress(self.begun, self.elapsed)

    @property
    def rate_factor(self) -> float:
        """The learning rate of the next step as a fraction of the initial one."""
        start = self.cools_from
        if start is None:
            return self.plan.factor_at(self.done)
        return self.plan.factor_at(start) * _annealed((self.done - start) / (self._end - start))

    @property
    def _end(self) -> float:
        """The part of the schedule after which the training ends."""
        start = self.cools_from
        return 1.0 if start is None else min(start * (1.0 + self.plan.cooldown), 1.0)

    @property
    def _is_cool(self) -> bool:
        return self.cools_from is not None and self.done >= self._end - 1e-9

    @property
    def due(self) -> bool:
        return self.done >= 1.0 or self._is_cool or self._intervals > self.validated

    @property
    def _intervals(self) -> int:
        """How many intervals are over; 29 % of 100 are 29, not 28.999999999999996."""
        return int(self.done * self.plan.validations + 1e-9)

    @property
    def stopped(self) -> str | None:
        """Why the training is at its end, None if it is not."""
        if self.done >= 1.0:
            return "length"
        is_stale = self.cools_from is None and self._stale >= self.plan.patience
        return "patience" if is_stale or self._is_cool else None

    @property
    def is_to_cool_down(self) -> bool:
        """Whether patience has ended where a cooldown can follow."""
        can_follow = self.plan.cooldown > 0 and self.cools_from is None and self.done > 0
        return can_follow and self.best is not None and self.stopped == "patience"

    @property
    def trained(self) -> list[CurvePoint]:
        """The validations after a step."""
        return [point for point in self.curve if point.step > 0]

    @property
    def _stale(self) -> int:
        values = [each.validation for each in self.trained]
        finite = [value for value in values if math.isfinite(value)]
        return len(values) - 1 - values.index(min(finite)) if finite else len(values)

    def add_steps(self, seconds: float, losses: list[float]) -> None:
        for loss in losses:
            self.seconds.append(seconds / len(losses))
            self.losses.append(loss)
            check_finite(loss, len(self.seconds))
        self.elapsed += seconds

    def add_validation(self, model: nn.Module, value: float) -> None:
        train = sum(self.losses) / len(self.losses) if self.losses else math.nan
        point = CurvePoint(len(self.seconds), self.elapsed, train, value)
        self.curve.append(point)
        self.losses.clear()
        self.validated = self._intervals
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
            "cools_from": self.cools_from,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.elapsed, self.losses = (
            state[name] for name in ("seconds", "elapsed", "losses")
        )
        self.curve = [CurvePoint(**point) for point in state["curve"]]
        self.best = None if state["best"] is None else self.curve[state["best"]]
        self.best_state, self.validated = state["best_state"], state["validated"]
        self.cools_from = state.get("cools_from")
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
        processes: that train the model together, each with batches of its own.

    Raises:
        ValueError: the optimiser needs a closure, or nothing is to be trained.
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
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.stream, self.plan, self.processes = model, stream, plan, processes
        self.optimizer = optimizer or adam(model.parameters(), plan.learning_rate)
        _require_no_closure(self.optimizer)
        if processes.count > 1:
            model, loss = DistributedDataParallel(_Loss(model, loss)), _forward
        self.stepper = Stepper(model, self.optimizer, plan.clip_norm, loss)
        self.progress = _Progress(plan)
        decay = plan.average_decay
        self.average = None if decay is None else WeightAverage(self.model.parameters(), decay)
        self._validate, self._after_step = validate, after_step
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._unseen: list[Tensor] = []
        self._since = 0.0

    def step(self) -> None:
        """Take a step; on a GPU it may still be computed."""
        if not self._unseen:
            self._since = self.plan.clock()
        factor = self.progress.rate_factor
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            set_learning_rate(group, rate * factor)
        batch = next(self.stream)
        with _precision(self.plan):
            loss = self.stepper(*(batch if isinstance(batch, tuple) else (batch,)))
        self._unseen.append(loss)
        if self.processes.count > 1 and self.progress.begun == 0:
            self._require_every_gradient()
        self._after_step()
        if self.average is not None:
            self.average.update()
        self.progress.begun += 1

    @property
    def is_to_be_looked_at(self) -> bool:
        """Whether the host has to know the losses now, or waits for nothing by asking."""
        on_gpu = self._unseen[-1].is_cuda
        return not on_gpu or len(self._unseen) >= STEPS_BETWEEN_LOOKS or self.progress.due

    def look(self, *wishes: bool) -> tuple[float, list[bool]]:
        """Take in the losses of the steps since the last look; return the last, and the wishes.

        Processes agree on them: on the mean of their losses, the time of the first, and whether
        anyone has a wish.
        """
        mine: list[float] = torch.stack(self._unseen).tolist()
        self._unseen.clear()
        seconds, count = self.plan.clock() - self._since, len(wishes)
        found = self.processes.of_all([seconds, *map(float, wishes), *mine])
        _, *columns = zip(*found, strict=True)
        losses = [sum(column) / len(column) for column in columns[count:]]
        self.progress.add_steps(found[0][0], losses)
        return losses[-1], [any(column) for column in columns[:count]]

    def _require_every_gradient(self) -> None:
        names = [
            name
            for name, each in self.model.named_parameters()
            if each.requires_grad and each.grad is None
        ]
        if names:
            raise ValueError(
                f"the loss does not use {', '.join(names)}, whose gradients processes would wait "
                "for: freeze them (requires_grad_(False)) to train over several processes"
            )

    def validate(self) -> None:
        """Validate the average of the weights, in the first process; keep it if it is the best.

        Where patience ends and the plan has a cooldown, that begins.
        """
        with nullcontext() if self.average is None else self.average.applied():
            self.model.train(False)
            self.processes.agree_on_state(self.model, of_buffers=True)
            self.progress.add_validation(self.model, self.processes.first(self._validate))
            self.model.train()
        if self.progress.is_to_cool_down:
            self._cool_down()

    def _cool_down(self) -> None:
        """Go back to the best state, from which the rest of the training anneals the rate."""
        self.progress.cools_from = self.progress.done
        self.model.load_state_dict(self.progress.best_state)
        if self.average is not None:
            self.average.restart()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs."""
        stream: Any = self.stream
        own = {"stream": stream.state_dict(), "random": random_state()}
        first, *others = self.processes.objects_of_all(own)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "progress": self.progress.state_dict(),
            **first,
            "others": others,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved training."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for name in ("model", "optimizer", "progress"):
            getattr(self, name).load_state_dict(state[name])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # a number on the device stays there; each step sets it
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        own, stream = [state, *state.get("others", [])][self.processes.rank], cast(Any, self.stream)
        stream.load_state_dict(own["stream"])
        set_random_state(own["random"])

    def put_back_rates(self) -> None:
        """Give the optimiser the learning rates that it had before the schedule."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            set_learning_rate(group, rate)


def _require_no_closure(optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"{type(optimizer).__name__} needs a closure, with which it evaluates the loss of a "
            "batch several times a step: give an optimiser that takes one gradient a step, such as "
            "torch.optim.Adam"
        )


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
    processes, progress = training.processes, training.progress
    is_alone = processes.count == 1
    training.model.train()
    wish: Interruption = _Never() if interruption is None else interruption
    with wish:
        if training.plan.validates_start and not progress.curve and not progress.begun:
            training.validate()
        while progress.stopped is None:
            training.step()
            if not (training.is_to_be_looked_at or (is_alone and wish.was_pressed)):
                continue
            saves = keeper is not None and processes.rank == 0 and keeper.due
            loss, (is_pressed, saves) = training.look(wish.was_pressed, saves)
            on_step(progress.done, loss)
            if progress.due:
                training.validate()
            is_pressed = is_pressed or (is_alone and wish.was_pressed)
            ends = is_pressed or progress.stopped is not None
            if keeper is not None and (saves or ends):
                _keep(training, keeper)
            if ends:
                break
    return close(training)


def _take_up(training: Training, keeper: Keeper) -> None:
    state = training.processes.first(keeper.load)
    if state is None:
        return
    try:
        training.load_state_dict(state)
    except Exception as error:  # what is missing or misshapen may raise anything
        raise keeper.damaged() from error


def _keep(training: Training, keeper: Keeper) -> None:
    state = training.state_dict()
    training.processes.first(lambda: keeper.save(state))


def close(training: Training) -> History:
    """Restore the best state and say what happened.

    Raises:
        KeyboardInterrupt: it was interrupted before there was one.
        TrainingDivergedError: there is none after a step.
    """
    progress, stepper = training.progress, training.stepper
    training.put_back_rates()
    is_finite = any(math.isfinite(point.validation) for point in progress.trained)
    if progress.stopped is not None and not is_finite:
        raise TrainingDivergedError(f"the validation NLL was never finite; {REMEDY}")
    if progress.best is None or progress.best_state is None:
        raise KeyboardInterrupt
    training.model.load_state_dict(progress.best_state)
    training.model.train(False)
    return History(
        steps=len(progress.seconds),
        seconds=progress.elapsed,
        ms_per_step=1e3 * float(np.median(progress.seconds or [0.0])),
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
    cooldown: float = 0.0,
    initialize: bool = True,
    seed: int | None = 0,
    after_step: Callable[[], None] = lambda: None,
    on_step: Callable[[float, float], None] | None = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> History:
    r"""Train a flow by maximum likelihood until it stops by itself, and leave it in its best state.

    A step minimises the mean of -log p over a batch, clips the gradient and lets the optimiser
    step. The learning rate rises over the first `warmup` of the training from a tenth, and falls by
    a cosine, r (1 + cos(pi t)) / 2, where t is the part of the steps or of the time that is done.
    What is validated and kept is a moving average of the weights: a_t = d a_{t-1} + (1 - d) w_t
    with d = min(`average_decay`, t / (t + 10)). The training ends with the steps or the time, or
    earlier: after `patience` validations without a new best. The best state is restored, which may
    be the one before the first step: a flow that was trained before does not come back worse.

    **Cooldown.** When patience ends the rate has not fallen to its end, and the best state is that
    of a high rate, worse than an annealed one. With a `cooldown` c the training then goes back to
    its best state and goes on from there for a tail: c times as long as it was until then, in steps
    where `max_steps` is the length and in seconds where `max_seconds` is, and never beyond that
    length. In the tail the rate falls by a cosine from what it was when patience ended to zero; the
    optimiser goes on with its moments, the batches with the next one, and the average starts anew.
    Validations come as before, and one at the end of the tail; patience does not count any more. So
    2,500 steps until patience ends and c = 0.2 are 3,000 steps in all. What the tail finds is kept
    if it is better. It is for small data, which a high rate learns by heart before it falls.

    On CUDA a step is one graph where that can be (`graphs.GraphedStep`); `capture_reason` of the
    history says why not.

    **Cost.** Beside the steps: a copy of the weights for the average and one for the best state,
    and the validations, whose time does not count. Up to 64 dimensions they take the exact
    log-determinants of residual blocks, d products for each row and block; beyond that, and for a
    `loss` of your own, they are what the flow says in evaluation mode, with the same random numbers
    each time.

    **Ctrl-C** ends the training after its step, a second one at once, and returns what was reached.
    It is raised if that is nothing: if no validation was finite yet.

    **Checkpoints.** With a `checkpoint`, all that the training needs is written to that file every
    minute, after Ctrl-C and at the end, whole or not at all. The same call on the same rows then
    goes on where it was, bit for bit on a CPU, and returns at once if it was at its end: delete the
    file to train anew. A data loader that draws from torch's generators is run through anew up to
    its place.

    **Several processes**, under `torchrun --nproc-per-node=2 script.py` for example, train one flow
    where the script has called `torch.distributed.init_process_group` before ("gloo" on CPUs,
    "nccl" on GPUs, one for each process, told by `torch.cuda.set_device`). Every process gives the
    same arguments. They start from the first one's flow, share out each batch of `batch_size` rows
    (rounded down to a multiple of their number) and average their gradients (torch's
    DistributedDataParallel): steps are those of one process on the whole batch, if the loss is a
    mean over rows. A data loader is each process's own (`torch.utils.data.DistributedSampler`), and
    its batches count alike. Where a loss is random, as under the roulette, each process draws
    numbers of its own (with `seed=None` those of its global generators), and the average is as
    unbiased. The first process alone validates, writes the checkpoint, tells the time and shows the
    progress; weights, history and the decision to stop are the same in all.

    References:
        Kingma, Ba. Adam: a method for stochastic optimization, 2015.
        Loshchilov, Hutter. SGDR: stochastic gradient descent with warm restarts, 2017.
        Polyak, Juditsky. Acceleration of stochastic approximation by averaging, 1992.

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
        cooldown: how long the training then anneals its rate from the best state, as a part of what
            is done, 0.2 for example; 0 stops at once.
        initialize: whether a flow with parts that start from data (`flow.initialize`), one of which
            has not started, is started from the first 5,000 rows of `train`.
        seed: of all that is random in the training, so that the same call on the same weights gives
            the same result (bit for bit on a CPU); the global generators of torch and numpy are
            left as they were. None draws from them.
        after_step: called after each step, for models that ask for it.
        on_step: called after each step with the fraction done and the loss.
        progress: whether validations are shown on stderr; by default if that is a terminal.
        checkpoint: a file to go on from, if it is there, and to write.

    Returns:
        Steps, seconds, the validations and the best of them, and why it stopped.

    Raises:
        ValueError: an argument is out of range, there are no rows, or some are not finite; the
            checkpoint is damaged, or of another training.
        TrainingDivergedError: a loss, or every validation, was not finite; it names the step.

    Example:
        >>> from nflows_iresnet import ResidualFlow
        >>> rows = torch.randn(600, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
        >>> flow = ResidualFlow(features=2, hidden_features=16, num_layers=2)
        >>> history = fit(flow, rows[:500], rows[500:], max_steps=40, validations=5)
        >>> history.best_step in [point.step for point in history.curve], history.stopped
        (True, 'length')
    """
    _check_positive(
        learning_rate=learning_rate, max_seconds=max_seconds, max_grad_norm=max_grad_norm
    )
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be a part of the training, in [0, 1), got {warmup}")
    if not 0 <= cooldown < math.inf:
        raise ValueError(f"cooldown must be a part of the training, 0 or more, got {cooldown}")
    processes, like = Processes.present(), _largest_parameter(flow)
    given = _Given(train, like, "training", processes)
    with seeded(seed, like.device):
        processes.agree_on_state(flow)
        if initialize and _waits_for_rows(flow):
            flow.initialize(*given.first(START_ROWS))
        plan = TrainingPlan(
            learning_rate,
            _length(max_steps, max_seconds),
            clip_norm=max_grad_norm,
            validations=validated_size("validations", validations),
            patience=validated_size("patience", patience),
            average_decay=average_decay,
            warmup=warmup,
            validates_start=_has_started(flow),
            cooldown=cooldown,
        )
        size = validated_size("batch_size", batch_size)
        validate = validation if callable(validation) else _Validator(validation, like, loss)
        training = Training(
            flow,
            given.stream(size),
            plan,
            lambda: _number(validate(flow)),
            optimizer=optimizer,
            loss=loss or negative_log_likelihood,
            after_step=after_step,
            processes=processes,
        )
        if seed is not None and processes.rank > 0:
            seed_everything(int(torch.randint(2**31, ())) + processes.rank)
        keeper = None
        if checkpoint is not None:
            settings = {"batch_size": size, "seed": seed, "training rows": given.described()}
            keeper = _Checkpoint.of(training, Path(checkpoint), settings)
        shown = processes.rank == 0 and (sys.stderr.isatty() if progress is None else progress)
        display = _Display(training.progress, on_step, shown=shown)
        try:
            return run(training, display, keeper, _CtrlC())
        except KeyboardInterrupt:
            return close(training)


class _CtrlC(Handled):
    """Ctrl-C is noted, and raised the second time.

    Launchers pass on to their processes what the terminal has told those already.
    """

    _first = math.inf

    @property
    def was_pressed(self) -> bool:
        return self._first < math.inf

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._first > _SECONDS_OF_ONE_PRESS:
            raise KeyboardInterrupt
        self._first = min(self._first, now)


class _Checkpoint:
    """The file of a training of `fit`: written whole or not at all, read without running code.

    Raises:
        ValueError: there can be no such file.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"checkpoint {str(path)!r} must be a file in a folder that exists")
        self._path, self._settings, self._last = path, settings, time.monotonic()

    @classmethod
    def of(cls, training: Training, path: Path, settings: dict[str, Any]) -> _Checkpoint:
        """Return the one of a training, which is what its arguments and its flow say."""
        plan, optimizer = training.plan, training.optimizer
        shapes = [(name, list(each.shape)) for name, each in training.model.named_parameters()]
        about = {
            **{name: vars(plan)[name] for name in sorted(vars(plan).keys() - _NOT_THE_PLAN)},
            **settings,
            "optimizer": type(optimizer).__name__,
            "flow": f"{type(training.model).__name__} {zlib.crc32(repr(shapes).encode()):08x}",
            "processes": training.processes.count,
        }
        return cls(path, {name: repr(value) for name, value in about.items()})

    @property
    def due(self) -> bool:
        return time.monotonic() - self._last >= SECONDS_BETWEEN_CHECKPOINTS

    def save(self, state: dict[str, Any]) -> None:
        part = self._path.with_name(f".{self._path.name}.part")
        try:
            with part.open("wb") as file:
                torch.save({"settings": self._settings, "state": state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self._path)
        finally:
            part.unlink(missing_ok=True)
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        if not self._path.exists():
            return None
        try:
            with zipfile.ZipFile(self._path) as archive:  # torch.load does not look at its sums
                if archive.testzip() is not None:
                    raise self.damaged()
            found = torch.load(self._path, map_location="cpu", weights_only=True)
            settings, state = dict(found["settings"]), dict(found["state"])
        except Exception as error:  # a damaged file may raise anything
            raise self.damaged() from error
        for name, value in self._settings.items():
            if settings.get(name) != value:
                raise ValueError(
                    f"checkpoint {str(self._path)!r} is of another training, whose {name} was "
                    f"{settings.get(name)} and not {value}: delete it, or give another path"
                )
        return state

    def damaged(self) -> ValueError:
        return ValueError(
            f"checkpoint {str(self._path)!r} is damaged, or no checkpoint of fit: delete it, or "
            "give another path"
        )


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


def _has_started(flow: Any) -> bool:
    """Whether no part of a flow waits for its first rows."""
    states = [getattr(module, "initialized", None) for module in flow.modules()]
    return all(bool(state) for state in states if isinstance(state, Tensor))


def _waits_for_rows(flow: Any) -> bool:
    return hasattr(flow, "initialize") and not _has_started(flow)


@dataclass(frozen=True)
class _Given:
    """Rows as users give them: tensors, or a data loader."""

    rows: Any
    like: Tensor
    what: str
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        if not self._is_loader:
            self._check(self._tensors())
            self._check_processes()
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

    def _check_processes(self) -> None:
        counts = [int(count) for (count,) in self.processes.of_all([self._tensors()[0].shape[0]])]
        if len(set(counts)) > 1:
            raise ValueError(
                f"processes have {', '.join(map(str, counts))} {self.what} rows: give all rows to "
                "each, which then takes its share, or a data loader of its own rows"
            )

    def described(self) -> str:
        """Return what tells these rows from others."""
        if self._is_loader:
            return type(self.rows).__name__
        sums = [zlib.crc32(_bytes(each)) for each in self._tensors()]
        shapes = [tuple(each.shape) for each in self._tensors()]
        return f"{shapes} with sums {' '.join(f'{each:08x}' for each in sums)}"

    def stream(self, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
        """Return batches for ever."""
        if self._is_loader:
            return _Cycle(self)
        seed = self.processes.first(lambda: int(torch.randint(2**31, ())))
        return Batches(self._tensors(), batch_size, seed, processes=self.processes)

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Return all rows once."""
        if not self._is_loader:
            chunks = [each.split(_ROWS_AT_ONCE) for each in self._tensors()]
            yield from zip(*chunks, strict=True)
            return
        for batch in self.rows:
            yield tuple(map(self._moved, batch if isinstance(batch, Sequence) else (batch,)))

    def first(self, count: int) -> tuple[Tensor, ...]:
        """Return the first rows, of which each process has its share."""
        rank, sharers = self.processes.rank, self.processes.count
        if not self._is_loader and self._tensors()[0].shape[0] >= sharers:
            return tuple(each[:count][rank::sharers] for each in self._tensors())
        count = -(-count // sharers)
        parts: list[tuple[Tensor, ...]] = []
        for batch in self.batches():
            parts.append(batch)
            if sum(part[0].shape[0] for part in parts) >= count:
                break
        if not parts:
            raise ValueError(f"the {self.what} loader has no batch")
        return tuple(torch.cat(each)[:count] for each in zip(*parts, strict=True))


class _Cycle(Iterator[tuple[Tensor, ...]]):
    """A data loader again and again."""

    def __init__(self, given: _Given) -> None:
        self._given, self._epoch, self._position = given, -1, 0
        self._batches: Iterator[tuple[Tensor, ...]] = iter(())

    def __next__(self) -> tuple[Tensor, ...]:
        batch = next(self._batches, None)
        if batch is None:
            self._start_epoch(self._epoch + 1)
            batch = next(self._batches, None)
        if batch is None:
            ran_out = _if_it_ran_out(self._given.rows)
            raise ValueError(f"the {self._given.what} loader has no batch{ran_out}")
        self._position += 1
        return batch

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        sampler: Any = getattr(self._given.rows, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        self._before, generator = random_state(), self._generator
        self._before_own = None if generator is None else generator.get_state()
        self._batches = self._given.batches()

    @property
    def _generator(self) -> Generator | None:
        found = getattr(self._given.rows, "generator", None)
        return found if isinstance(found, Generator) else None

    def state_dict(self) -> dict[str, Any]:
        """Return the position, from which `load_state_dict` goes on."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "before": self._before,
            "before_own": self._before_own,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Run through the epoch as far as it had come; the random state is then another."""
        set_random_state(state["before"])
        if self._generator is not None:
            self._generator.set_state(state["before_own"])
        self._start_epoch(state["epoch"])
        for _ in range(state["position"]):
            next(self)


def _bytes(values: Tensor) -> Any:
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


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
