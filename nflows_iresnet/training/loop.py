"""The loop: steps of the optimiser, the average of the weights, validations, checkpoints."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import partial
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nflows_iresnet import precision
from nflows_iresnet.graphs import EagerStep, GraphedStep, Loss, negative_log_likelihood, trainable
from nflows_iresnet.precision import at_least_single
from nflows_iresnet.training.checkpoints import Keeper
from nflows_iresnet.training.processes import ALONE, Processes, random_state, set_random_state
from nflows_iresnet.training.progress import (
    REMEDY,
    History,
    Progress,
    TrainingDivergedError,
    TrainingPlan,
)
from nflows_iresnet.transforms.initialization import evaluating

_OF_NOW = {"lr", "initial_lr", "fused", "foreach", "capturable"}
"""Of the groups of an optimiser: what no checkpoint decides."""
STEPS_BETWEEN_LOOKS = 8
"""On a GPU, which is let run ahead: to look at a loss is to wait for it."""


class WeightAverage(AveragedModel):
    r"""a_t = d_t a_{t-1} + (1 - d_t) w_t with d_t = min(decay, t / (t + 10)), a_0 = w_0.

    The decay grows from zero, so that the random start is soon forgotten. Parameters alone are
    averaged: buffers, certificates and whatever else a model holds stay its own, and are right
    because the averages are put into the model itself while they are needed. Averages of half
    precision are kept in float32, where a thousandth of a weight is not lost.

    References:
        Polyak, Juditsky. Acceleration of stochastic approximation by averaging, 1992.

    Args:
        parameters: what is averaged.
        decay: the final d, in [0, 1).
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        trained = nn.ParameterList(parameters)
        super().__init__(trained, multi_avg_fn=get_ema_multi_avg_fn(0.0))
        for average in self.module.parameters():
            average.data = at_least_single(average.data)
        self._decay, self._trained = decay, [trained]  # in a list: no part of the state

    def update(self) -> None:
        """Take in the present parameters.

        Not by `update_parameters`, which copies its count to the device, and waits for it.
        """
        count = int(self.n_averaged)
        decay = min(self._decay, count / (count + 10))
        averages: list[Tensor] = []
        trained: list[Tensor] = []
        for average, parameter in zip(self.module.parameters(), self._trained[0], strict=True):
            if parameter.is_floating_point() or parameter.is_complex():
                averages.append(average)
                is_alike = parameter.dtype == average.dtype
                trained.append(parameter if is_alike else parameter.detach().to(average.dtype))
            else:
                average.data.copy_(parameter.data)
        get_ema_multi_avg_fn(decay)(averages, trained, self.n_averaged)
        self.n_averaged += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model for the duration of a block."""
        trained = [parameter.detach().clone() for parameter in self._trained[0]]
        self._put(self.module.parameters())
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self._trained[0], values, strict=True):
            parameter.copy_(value)


def adam(parameters: Iterable[Parameter], learning_rate: float) -> torch.optim.Adam:
    """Return Adam: on a CPU one operation, on a GPU one that a graph can hold."""
    trained = trainable(parameters)
    device = trained[0].device
    if device.type != "cuda":
        is_fused = all(map(_can_be_fused, trained))
        return torch.optim.Adam(trained, lr=learning_rate, fused=is_fused or None)
    rate = torch.tensor(learning_rate, device=device)
    return torch.optim.Adam(trained, lr=rate, capturable=True, foreach=True)


def _can_be_fused(parameter: Parameter) -> bool:
    """Whether one operation of a CPU may step all parameters: it ignores their strides.

    It also rounds half precision otherwise. A gradient has the strides of its parameter, unless a
    hook puts another in its place.
    """
    is_plain = parameter.device.type == "cpu" and parameter.is_contiguous()
    has_hooks = bool(getattr(parameter, "_post_accumulate_grad_hooks", None))
    return is_plain and not has_hooks and parameter.dtype in (torch.float32, torch.float64)


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
        captures: whether it may be one graph.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
        loss: Loss = negative_log_likelihood,
        captures: bool = True,
    ) -> None:
        self._captures = captures
        self._eager = EagerStep(model, optimizer, loss, clip_norm)
        self._step: Callable[..., Tensor] = self._eager
        self._steps = 0
        self._refused: str | None = None

    def __call__(self, *batch: Tensor) -> Tensor:
        """Take a step and return its loss, which the device may still be computing."""
        self._steps += 1
        if self._captures and batch[0].is_cuda and self._steps == 2:
            self._step = self._graphed(*batch)
        return self._step(*batch).detach().clone()  # a compiled loss may be overwritten

    @property
    def has_begun(self) -> bool:
        """Whether it has taken a step."""
        return self._steps > 0

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
        step = self._eager
        options: dict[str, Any] = {"loss": step.loss, "max_grad_norm": step.max_grad_norm}
        if len(batch) > 2:
            self._refused = f"batches have {len(batch)} tensors, and a graph rows and their context"
            return step
        if len(batch) > 1:
            options["context"] = batch[1]
        try:
            return GraphedStep(step.flow, step.optimizer, batch[0], **options)
        except (ValueError, RuntimeError) as error:
            first, *_ = str(error).splitlines() or ["no message"]
            self._refused = f"{type(error).__name__}: {first}"
            return step


class Interruption(AbstractContextManager[object], Protocol):
    """Says whether somebody wants the training to stop at the end of its step."""

    @property
    def was_pressed(self) -> bool:
        """Whether it is to stop."""


class _Never(nullcontext[None]):
    """Nobody wants it to stop."""

    was_pressed = False


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
        ValueError: the optimiser needs a closure, or is another model's; nothing is to be trained.
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
        self.device = max(trainable(model.parameters()), key=Tensor.numel).device
        self.optimizer = optimizer or adam(model.parameters(), plan.learning_rate)
        _require_no_closure(self.optimizer)
        _warn_of_a_scheduler(self.optimizer)
        _require_own(self.optimizer, model)
        if processes.count > 1:
            model, loss = DistributedDataParallel(_Loss(model, loss)), nn.Module.__call__
        self.stepper = Stepper(model, self.optimizer, plan.clip_norm, loss, plan.captures)
        self.progress = Progress(plan)
        decay = plan.average_decay
        self.average = None if decay is None else WeightAverage(self.model.parameters(), decay)
        self._validate, self._after_step = validate, after_step
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._unseen: list[Tensor] = []
        self._capture_before: tuple[bool, str | None] = (False, None)
        self._since = 0.0

    def step(self) -> None:
        """Take a step; on a GPU it may still be computed."""
        if not self._unseen:
            self._since = self.plan.clock()
        self.scale_rates(self.plan.factor_at(self.progress.done))
        batch = next(self.stream)
        with precision.allow_tf32_in_training() if self.plan.tf32 else nullcontext():
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
        seconds = self.plan.clock() - self._since
        every = self.processes.numbers_of_all([seconds, *map(float, wishes), *mine])
        (seconds, *_), *each_of_all = zip(*every, strict=True)
        losses = [sum(each) / len(each) for each in each_of_all[len(wishes) :]]
        self.progress.add_steps(seconds, losses)
        return losses[-1], [any(each) for each in each_of_all[: len(wishes)]]

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
        """Validate the average of the weights, in the first process; keep it if it is the best."""
        averaged = nullcontext() if self.average is None else self.average.applied()
        with averaged, evaluating(self.model):
            self.processes.agree_on_state(self.model, of_buffers=True)
            self.progress.add_validation(self.model, self.processes.first(self._validate))

    @property
    def capture(self) -> tuple[bool, str | None]:
        """Whether steps are one CUDA graph, and why not; as a checkpoint says before a step."""
        if not self.stepper.has_begun:
            return self._capture_before
        return self.stepper.is_captured, self.stepper.capture_reason

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs."""
        stream: Any = self.stream
        own = {"stream": stream.state_dict(), "random": random_state(self.device)}
        first, *others = self.processes.of_all(own)
        return {
            **self.trained_state(),
            "average": None if self.average is None else self.average.state_dict(),
            "progress": self.progress.state_dict(),
            "capture": self.capture,
            **first,
            "others": others,
        }

    def trained_state(self) -> dict[str, Any]:
        """Return the part of the state that is users': that of the model and its optimiser."""
        return {
            "model": self.model.state_dict(),
            "optimizer": _plain(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved training."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for name in ("model", "progress"):
            getattr(self, name).load_state_dict(state[name])
        self.optimizer.load_state_dict(_with_options_of(self.optimizer, state["optimizer"]))
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # a number on the device stays there; each step sets it
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._capture_before = tuple(state.get("capture", (False, None)))
        own, stream = [state, *state.get("others", [])][self.processes.rank], cast(Any, self.stream)
        stream.load_state_dict(own["stream"])
        set_random_state(own["random"], self.device)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Give the learning rates back at the end, and the best state after divergence."""
        try:
            yield
        except TrainingDivergedError:
            if self.progress.best_state is not None:
                self.model.load_state_dict(self.progress.best_state)
            self.model.train(False)
            raise
        finally:
            self.scale_rates(1.0)

    def scale_rates(self, factor: float) -> None:
        """Give the optimiser a part of the learning rates that it had before the schedule."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            set_learning_rate(group, rate * factor)


def _with_options_of(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state that is computed as now: how it can be depends on the parameters."""
    pairs = zip(optimizer.param_groups, saved["param_groups"], strict=True)
    groups = [{**then, **{name: own[name] for name in _OF_NOW & own.keys()}} for own, then in pairs]
    return {**saved, "param_groups": groups}


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the options of its groups, but for learning rates and how a step is computed."""
    return [
        {name: _plain(group[name]) for name in sorted(group.keys() - _OF_NOW - {"params"})}
        for group in optimizer.param_groups
    ]


def _plain(value: Any) -> Any:
    """Return an option without the numbers of numpy, which would need code to be read."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _warn_of_a_scheduler(optimizer: torch.optim.Optimizer) -> None:
    """Warn where a scheduler of torch has, or had, the learning rates of an optimiser."""
    if any("initial_lr" in group for group in optimizer.param_groups):
        warnings.warn(
            f"{type(optimizer).__name__} has, or had, a scheduler of its learning rate: the "
            "schedule of this training overrides it, and starts from the rates of now",
            stacklevel=4,
        )


def _require_no_closure(optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"{type(optimizer).__name__} needs a closure, with which it evaluates the loss of a "
            "batch several times a step: give an optimiser that takes one gradient a step, such as "
            "torch.optim.Adam"
        )


def _require_own(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    own = {id(each) for each in model.parameters()}
    is_own = [id(each) in own for group in optimizer.param_groups for each in group["params"]]
    kinds = type(optimizer).__name__, type(model).__name__
    if not any(is_own):
        raise ValueError(
            f"{kinds[0]} has none of the parameters of this {kinds[1]}, which it would never "
            "train: make it of flow.parameters()"
        )
    if not all(is_own):
        raise ValueError(
            f"{kinds[0]} has {len(is_own) - sum(is_own)} parameters that are not of this "
            f"{kinds[1]}, whose average, best state and checkpoint would lack them: train one "
            "module that holds both, with a loss that uses them"
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
        on_step: called with the fraction done and the loss in nats: after each step, on a GPU after
            those that ran without a look at their losses.
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
    _let_train(training.model)
    wish = interruption or _Never()
    with wish, training.under_way():
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
                state = training.state_dict()
                processes.first(partial(keeper.save, state))
            if ends:
                break
    return close(training)


_IN_EVALUATION: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
"""Of models that were trained, the parts that stayed in evaluation mode meanwhile."""


def _let_train(model: nn.Module) -> None:
    """Put a model into training mode, but for parts that are to stay in evaluation mode.

    They are those that are in it while the whole is not; of a model that an earlier training left
    in evaluation mode, those that were.
    """
    if model.training:
        kept = {part for part in model.modules() if not part.training}
    else:
        kept = {part for part in _IN_EVALUATION.get(model, ()) if not part.training}
        model.train()
        for part in kept:
            part.training = False
    _IN_EVALUATION[model] = WeakSet(kept)


def _take_up(training: Training, keeper: Keeper) -> None:
    """Go on from a checkpoint, or make sure that there can be one."""
    state = training.processes.first(keeper.load)
    if state is None:
        training.processes.first(lambda: keeper.require_plain(training.trained_state()))
        return
    before = deepcopy(training.model.state_dict())
    try:
        training.load_state_dict(state)
    except Exception as error:  # what is missing or misshapen may raise anything
        with suppress(Exception):
            training.model.load_state_dict(before)
        raise keeper.refused_by(error) from error


def close(training: Training) -> History:
    """Restore the best state and say what happened.

    Raises:
        KeyboardInterrupt: it was interrupted before there was one.
        TrainingDivergedError: there is none after a step.
    """
    progress = training.progress
    training.model.train(False)
    is_finite = any(math.isfinite(point.validation) for point in progress.trained)
    if progress.stopped is not None and not is_finite:
        raise TrainingDivergedError(f"the validation NLL was never finite; {REMEDY}")
    if progress.best is None or progress.best_state is None:
        raise KeyboardInterrupt
    training.model.load_state_dict(progress.best_state)
    is_captured, capture_reason = training.capture
    return History(
        steps=len(progress.seconds),
        seconds=progress.elapsed,
        ms_per_step=1e3 * float(np.median(progress.seconds or [0.0])),
        best_step=progress.best.step,
        best_validation=progress.best.validation,
        curve=tuple(progress.curve),
        is_captured=is_captured,
        capture_reason=capture_reason,
        stopped=progress.stopped or "interrupted",
    )


class _Loss(nn.Module):
    """A loss as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, flow: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.flow, self._loss = flow, loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self._loss(self.flow, *batch)
