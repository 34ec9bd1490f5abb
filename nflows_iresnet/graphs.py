"""A training step as one CUDA graph: launched at once, instead of a thousand kernels one by one.

    >>> step = GraphedStep(flow, optimizer, batch, max_grad_norm=10.0)  # doctest: +SKIP
    >>> losses = [step(batch) for batch in batches]  # doctest: +SKIP

A step is captured once it is known not to wait for the device, and trusted once a replay agreed
with an eager step. What speaks to CUDA is one class, `_CudaRecorder`; all else runs on a CPU, too.
"""

from __future__ import annotations

import random
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nflows_iresnet import precision
from nflows_iresnet.linearization import held_by_graphs
from nflows_iresnet.logdet import TermPlan
from nflows_iresnet.transforms import ResidualTransform

Loss = Callable[..., Tensor]
Body = Callable[[], None]


class NotCapturedWarning(UserWarning):
    """A step that was to be replayed from a CUDA graph runs eagerly."""


def negative_log_likelihood(flow: Any, batch: Tensor, context: Tensor | None = None) -> Tensor:
    """Return the mean of -log p(batch), shape ()."""
    log_prob: Tensor = flow.log_prob(batch) if context is None else flow.log_prob(batch, context)
    return -log_prob.mean()


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return those parameters that are trained.

    Raises:
        ValueError: there are none.
    """
    trained = [each for each in parameters if each.requires_grad]
    if not trained:
        raise ValueError("nothing is to be trained: no parameter requires a gradient")
    return trained


class GraphedStep:
    """One step of training: as one CUDA graph where that is possible, as it is elsewhere.

    A step sets the gradients to zero, computes the loss and its gradients, clips them, and lets the
    optimiser step. On a GPU nearly all of its time goes to launching kernels one by one; as one
    graph six vector blocks took 4.5 to 8.3 times less on an H200, an image flow 1.4 times less.

    **The constructor trains nothing.** It runs a few steps on the batch it is given and undoes them
    in place: weights, buffers, the optimiser's state and the random generators are as before. Only
    layers that start from their first batch (`ActNorm`, whitening) have started, from this one. A
    replay has to give the loss and the gradients of an eager step with the same weights and random
    numbers. The first step of a fresh optimiser is eager, because it makes its state there.

    **The roulette** (`logdet.RussianRoulette`) stays unbiased: numbers of terms are drawn before
    each step, with one random number for all blocks (`logdet.TermPlan`). There is one graph for
    each of a few lengths, captured when a length is drawn for the second time.

    **What may change between steps.** The learning rate, by a scheduler of torch or by
    `group["lr"] = 1e-4`: in the graph it is a tensor. Weights, and the optimiser's state, by
    `load_state_dict`, or by averages that are copied in. Schedulers and averages stay outside.
    Where parameters are replaced, moved, frozen or added, the step is captured anew. Whatever else
    the loss reads is as it was when captured, unless it is a tensor that is changed in place.

    **What runs eagerly**, with a `reason`, and one `NotCapturedWarning` on CUDA: batches of another
    shape or dtype; another mode (`train`, autocast), estimator, solver (`transforms.using`) or
    hyperparameter (`OneCycleLR` needs `cycle_momentum=False`) than was captured; a step that waits
    for the device, copies from the host, as nflows' `LULinear` does, or draws random numbers there;
    `recompute=True`; `DistributedDataParallel`; several devices.

    **Mixed precision**: autocast to bfloat16 works, around the calls or inside the loss;
    `torch.amp.GradScaler` decides on the host, and does not. **Accumulated gradients**: let the
    loss take the batch in parts; a step drops the gradients that there are.

    Args:
        flow: the model, on its device, in training mode.
        optimizer: of its parameters; on CUDA built with `capturable=True`, or `torch.optim.SGD`,
            which is then switched to its fused kernels.
        batch: a first batch, shape (B, *), as those to come.
        loss: callable of (flow, batch), or (flow, batch, context) where there is a context, that
            returns a scalar; by default the mean negative log-likelihood.
        max_grad_norm: what the norm of the gradients of the optimiser's parameters is clipped to,
            unless None.
        context: a first context, shape (B, C), for steps that take one.

    Raises:
        ValueError: if `max_grad_norm` is not positive, nothing is to be trained, or the loss is no
            scalar; on CUDA also if the optimiser cannot be captured.

    Example:
        >>> from nflows_iresnet import ResidualFlow
        >>> flow, batch = ResidualFlow(2, 16, num_layers=2), torch.randn(32, 2)
        >>> step = GraphedStep(flow, torch.optim.Adam(flow.parameters()), batch)
        >>> loss = step(batch)
        >>> step.is_captured, step.reason
        (False, 'the model is on cpu, and only CUDA has graphs')
    """

    reason: str | None = None
    """Why the latest step ran eagerly; None while steps are replayed."""

    def __init__(
        self,
        flow: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: Tensor,
        *,
        loss: Loss | None = None,
        max_grad_norm: float | None = None,
        context: Tensor | None = None,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm must be positive, or None for no clipping, got {max_grad_norm}"
            )
        self._step = EagerStep(
            flow, optimizer, loss or negative_log_likelihood, max_grad_norm, keeps_gradients=True
        )
        self._device = self._step.parameters()[0].device
        self._said: set[str] = set()
        self._captured: _CapturedStep | None = None
        self._capture(self._arguments(batch, context))

    @property
    def is_captured(self) -> bool:
        """Whether there is a graph that steps are replayed from."""
        return self._captured is not None

    def __call__(self, batch: Tensor, context: Tensor | None = None) -> Tensor:
        """Do one step and return its loss, shape (), without waiting for it.

        Args:
            batch: shape (B, *); from another device it is copied, which waits.
            context: shape (B, C), or None.
        """
        arguments = self._arguments(batch, context)
        captured = self._captured
        if captured is None:
            return self._step(*arguments)
        obstacle = captured.obstacle(arguments)
        self.reason = None if obstacle is None else obstacle.text
        if obstacle is not None:
            self._say(obstacle, stacklevel=3)
            return self._step(*arguments)
        if not captured.is_in_place():
            self._capture(arguments)
            return self(batch, context)
        try:
            return captured(arguments)
        except _CaptureError as error:
            self._give_up(error)
            return captured.eagerly(arguments)

    def _arguments(self, batch: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        given = (batch,) if context is None else (batch, context)
        return tuple(each.to(self._device) for each in given)

    def _capture(self, arguments: tuple[Tensor, ...]) -> None:
        self._captured = self.reason = None
        recorder = _recorder_for(self._device)  # with a pool of its own: the last one is released
        if recorder is None:
            self.reason = f"the model is on {self._device}, and only CUDA has graphs"
            return
        _require_capturable(self._step.optimizer)
        try:
            self._captured = _CapturedStep(self._step, arguments, recorder)
        except _CaptureError as error:
            self._give_up(error)

    def _give_up(self, error: _CaptureError) -> None:
        self._captured, self.reason = None, str(error)
        self._say(_Obstacle("capture", str(error)), stacklevel=5)

    def _say(self, obstacle: _Obstacle, stacklevel: int) -> None:
        if obstacle.kind not in self._said:
            self._said.add(obstacle.kind)
            message = f"the training step runs eagerly: {obstacle.text}"
            warnings.warn(message, NotCapturedWarning, stacklevel=stacklevel)


@dataclass(frozen=True)
class EagerStep:
    """What a step does, whoever runs it.

    Args:
        flow: the model.
        optimizer: of its parameters, perhaps of others, too.
        loss: callable of (flow, *batch) that returns a scalar.
        max_grad_norm: what the norm of the gradients that it steps by is clipped to, unless None.
        keeps_gradients: whether gradients stay where they are, as a graph needs them; dropped ones
            let the optimiser leave alone what a loss does not use.
    """

    flow: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    max_grad_norm: float | None
    keeps_gradients: bool = False

    def __call__(self, *batch: Tensor) -> Tensor:
        """Do a step and return its loss, shape ()."""
        trained = self.parameters()
        self._forget_gradients()
        with _without_autocast_cache(trained[0].device):
            loss = self.loss(self.flow, *batch)
            if not isinstance(loss, Tensor):
                raise ValueError(
                    f"the loss must be a tensor with a gradient, got a {type(loss).__name__}: "
                    "leave out float() and item()"
                )
            if loss.dim() > 0:
                raise ValueError(
                    f"the loss must be a scalar, got shape {tuple(loss.shape)}; take its mean()"
                )
            loss.backward()
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self._stepped(), self.max_grad_norm)
            self.optimizer.step()
        return loss.detach()

    def _forget_gradients(self) -> None:
        kept = []
        for parameter in self._every_parameter():
            if not (self.keeps_gradients and parameter.requires_grad):
                parameter.grad = None  # the optimiser would go on with it
            elif parameter.grad is not None:
                kept.append(parameter.grad)
        if kept:
            torch._foreach_zero_(kept)

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return trainable(self._every_parameter())

    def _stepped(self) -> list[nn.Parameter]:
        """Return what the optimiser changes."""
        return [each for group in self.optimizer.param_groups for each in group["params"]]

    def _every_parameter(self) -> list[nn.Parameter]:
        """Return the model's parameters and the optimiser's, each once."""
        every = [*self.flow.parameters(), *self._stepped()]
        return list({id(each): each for each in every}.values())

    def tensors(self) -> list[Tensor]:
        """Return everything that a step may change: weights, buffers, the optimiser's state."""
        every: list[Tensor] = [*self._every_parameter(), *self.flow.buffers()]
        for state in self.optimizer.state.values():
            every += [each for each in state.values() if isinstance(each, Tensor)]
        return list({id(each): each for each in every}.values())


def _without_autocast_cache(device: torch.device) -> AbstractContextManager[object]:
    """Return the present autocast without its cache: what a graph reads must be made in it."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    dtype = torch.get_autocast_dtype(device.type)
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


class _Obstacle(NamedTuple):
    """Why a step cannot be replayed: its kind, which is said once, and the words."""

    kind: str
    text: str


class _CaptureError(Exception):
    """A step cannot be captured; the message is a reason."""


class _Recorder(Protocol):
    """How a device records a step, and replays it."""

    generator: torch.Generator
    """From which the device draws in a step."""

    def run(self, body: Body) -> None:
        """Run a step eagerly, where it will be captured."""

    def refusing_to_wait(self) -> AbstractContextManager[None]:
        """Return a context in which waiting for the device raises an error."""

    def capture(self, body: Body) -> Body:
        """Record a step without running it, and return what replays it."""


class _CudaRecorder:
    """Records on a stream of its own, into one pool of memory: graphs never run side by side."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.generator: torch.Generator = torch.cuda.default_generators[index]
        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, body: Body) -> None:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            body()
        here.wait_stream(self._stream)

    @contextmanager
    def refusing_to_wait(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(self, body: Body) -> Body:
        graph, spare = torch.cuda.CUDAGraph(), self.generator.clone_state()
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        here = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(here), recording:
                body()
        except BaseException:
            _FAILED.append(graph)
            self._recover(spare)
            raise
        return graph.replay

    def _recover(self, spare: torch.Generator) -> None:
        """Replace a state of the generator that a failed capture has left in capture."""
        try:
            torch.rand((), device=self._device)
        except RuntimeError:
            self.generator.graphsafe_set_state(spare)


_FAILED: list[torch.cuda.CUDAGraph] = []
"""The allocator may still refer to a graph whose capture failed, so that it must not be freed."""


def _recorder_for(device: torch.device) -> _Recorder | None:
    return _CudaRecorder(device) if device.type == "cuda" else None


def _require_capturable(optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, torch.optim.SGD):
        return
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if "capturable" not in group:
            raise ValueError(
                f"{name} cannot be part of a CUDA graph: it has no option `capturable`; use "
                "torch.optim.Adam(..., capturable=True), AdamW, or SGD"
            )
        if not group["capturable"]:
            raise ValueError(
                f"{name} keeps its step count on the host: build it with "
                f"{name}(..., capturable=True), so that it can be part of a CUDA graph"
            )


_LARGEST_EXACT_LENGTH = 8


def graph_length(num_terms: int) -> int:
    """Return how many terms the graph computes that serves a step of `num_terms`.

    Up to 8 just those, then 12, 16, 24, 32, 48, ...: terms beyond a block's own have weight zero.
    """
    length = num_terms
    if num_terms > _LARGEST_EXACT_LENGTH:
        power = 1 << (num_terms - 1).bit_length()
        length = power if num_terms > 3 * power // 4 else 3 * power // 4
    return length


class _CapturedStep:
    """A step captured for one shape of arguments: graphs, and the tensors that they share.

    Raises:
        _CaptureError: if it cannot be captured, or a replay differs from an eager step.
    """

    def __init__(self, step: EagerStep, arguments: tuple[Tensor, ...], recorder: _Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._inputs = tuple(each.detach().clone() for each in arguments)
        self._plan = TermPlan(arguments[0].device)
        self._replays: dict[int, Body] = {}
        self._lengths_met: set[int] = set()
        self._rates = _LearningRates(step.optimizer, arguments[0].device)
        self._modules = list(step.flow.modules())
        self._blocks = [each for each in self._modules if isinstance(each, ResidualTransform)]
        self._setting = self._present_setting()
        _require_known_to_work(step)
        self._older = held_by_graphs(step.parameters())
        random_state = _RandomState(recorder.generator)
        try:
            self._rates.settle()
            self._output = torch.empty_like(self._start().detach())
            self._states = self._prepared()
        except BaseException:
            self._rates.release()
            raise
        finally:
            random_state.restore()
        self._gradients = [(each, each.grad) for each in step.parameters()]
        self._places = _Places(step)

    def _start(self) -> Tensor:
        """Let layers that start from their first batch see it; put back what only counts batches.

        What the first pass changes and the second does not has started. Returns a loss.
        """
        before = _Snapshot(self._step.tensors())
        self._step.loss(self._step.flow, *self._inputs)
        after = _Snapshot(before.tensors)
        loss = self._step.loss(self._step.flow, *self._inputs)
        after.put_back_changed(before)
        return loss

    def _prepared(self) -> _OptimizerState:
        """Warm up, capture the first graph, and undo both."""
        optimizer = self._step.optimizer
        optimizer._warned_capturable_if_run_uncaptured = True
        before, known = _Snapshot(self._step.tensors()), set(optimizer.state)
        try:
            self._warm_up()
            self._capture(graph_length(self._plan.draw()))
            return _OptimizerState(optimizer)
        finally:
            before.restore()
            for parameter in set(optimizer.state) - known:
                del optimizer.state[parameter]

    def _warm_up(self) -> None:
        with self._plan.recording():
            self._recorder.run(self._body)
        self._plan.draw()
        before = _host_random_state(self._recorder.generator)
        with self._naming_errors(), self._recorder.refusing_to_wait(), self._plan.applied():
            self._recorder.run(self._body)
        after = _host_random_state(self._recorder.generator)
        drawn = [name for name in before if before[name] != after[name]]
        if drawn or self._plan.uses_generators:
            source = drawn[0] if drawn else "a generator of its own"
            raise _CaptureError(
                f"it draws random numbers from {source}, which a graph would repeat for ever; "
                "draw on the device, from torch's default generator"
            )

    def _body(self) -> None:
        self._output.copy_(self._step(*self._inputs))

    def _capture(self, length: int) -> None:
        """Capture the step for series of one length, and keep it if a replay is right.

        Nothing else is changed.
        """
        kept, random_state = _Snapshot(self._step.tensors()), _RandomState(self._recorder.generator)
        try:
            with self._plan.applied():
                self._recorder.run(self._body)
            expected = self._outcome()
            kept.restore()
            random_state.restore()
            self._plan.fill(capacity=length)
            with self._naming_errors(), self._plan.applied(capacity=length):
                replay = self._recorder.capture(self._body)
            replay()
            found = self._outcome()
        finally:
            kept.restore()
            random_state.restore()
        if not expected.is_finite:
            return  # nothing to compare with: a later step is captured
        difference = found.difference(expected, self._tolerance())
        if difference is not None:
            raise _CaptureError(difference)
        self._replays[length] = replay

    def _outcome(self) -> _Outcome:
        gradients = [each.grad for each in self._step.parameters() if each.grad is not None]
        return _Outcome(self._output.clone(), [each.clone() for each in gradients])

    def _tolerance(self) -> float:
        weights = {each.dtype for each in self._step.parameters()}
        is_half = self._setting.autocast is not None or weights & {torch.float16, torch.bfloat16}
        return 0.05 if is_half else 1e-3

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = _described(error, self._step)
            if self._older and reason.startswith(_BACKWARD):
                reason += (
                    f"; the graph of an earlier pass is alive, with {self._older} parameters, and "
                    "adds up their gradients on the stream of that pass: delete what holds it, or "
                    "keep loss.detach()"
                )
            raise _CaptureError(reason) from error

    def obstacle(self, arguments: tuple[Tensor, ...]) -> _Obstacle | None:
        """Return why a step cannot be replayed for now, if it cannot."""
        given, known = _kinds(arguments), _kinds(self._inputs)
        if given != known:
            return _Obstacle("shape", f"it is given {given}, and was captured for {known}")
        return self._setting.obstacle(self._present_setting())

    def _present_setting(self) -> _Setting:
        return _Setting.of(self._step, self._modules, self._blocks)

    def is_in_place(self) -> bool:
        """Whether the parameters are where the graphs read and write them."""
        return self._places.are_unchanged()

    def __call__(self, arguments: tuple[Tensor, ...]) -> Tensor:
        self._rates.settle()
        length = graph_length(self._plan.draw())
        if not self._states.adopt():
            return self.eagerly(arguments)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for static, given in zip(self._inputs, arguments, strict=True):
            static.copy_(given)
        if length not in self._replays:
            if length not in self._lengths_met:
                self._lengths_met.add(length)
                return self.eagerly(arguments)
            self._capture(length)
            if length not in self._replays:
                self._lengths_met.discard(length)
                return self.eagerly(arguments)
        self._plan.fill(capacity=length)
        self._replays[length]()
        self._step.optimizer._opt_called = True  # type: ignore[attr-defined]  # for schedulers
        return self._output.clone()

    def eagerly(self, arguments: tuple[Tensor, ...]) -> Tensor:
        """Do the step whose numbers of terms were drawn."""
        with self._plan.applied():
            return self._step(*arguments)


def _require_known_to_work(step: EagerStep) -> None:
    """Raise where a capture would fail in ways that cannot be taken back."""
    parallel = nn.parallel.DistributedDataParallel
    for name, module in step.flow.named_modules():
        if isinstance(module, parallel):
            raise _CaptureError("DistributedDataParallel reduces gradients outside the step")
        if getattr(module, "recompute", False) is True:
            raise _CaptureError(
                f"{_titled(name, module)} has recompute=True, which reads the state of the random "
                "generator; a graph needs recompute=False"
            )
    devices = {str(each.device) for each in step.tensors() if each.dim() > 0}
    if len(devices) > 1:
        raise _CaptureError(f"its tensors are on several devices: {', '.join(sorted(devices))}")


def _kinds(arguments: tuple[Tensor, ...]) -> str:
    return " and ".join(f"{tuple(each.shape)} {each.dtype}" for each in arguments)


@dataclass(frozen=True)
class _Setting:
    """What a graph has in it that is no tensor."""

    modes: tuple[bool, ...]
    autocast: torch.dtype | None
    tf32: bool
    hyperparameters: tuple[tuple[tuple[str, object], ...], ...]
    strategies: tuple[tuple[object, object], ...]

    @staticmethod
    def of(
        step: EagerStep, modules: Sequence[nn.Module], blocks: Sequence[ResidualTransform]
    ) -> _Setting:
        kind = step.optimizer.param_groups[0]["params"][0].device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        names = sorted(step.optimizer.defaults.keys() - {"lr", "fused", "foreach", "capturable"})
        hyperparameters = tuple(
            tuple((name, _comparable(group.get(name))) for name in names)
            for group in step.optimizer.param_groups
        )
        modes = tuple(bool(each.training) for each in modules)
        strategies = tuple((block.estimator, block.solver) for block in blocks)
        return _Setting(modes, autocast, precision.is_tf32_allowed(), hyperparameters, strategies)

    def obstacle(self, present: _Setting) -> _Obstacle | None:
        if present == self:
            return None
        if present.modes != self.modes:
            what = "a part of the model" if present.modes[0] == self.modes[0] else "the model"
            both = zip(self.modes, present.modes, strict=True)
            was_training = next(then for then, now in both if then != now)
            then, now = ("training", "evaluation")[:: 1 if was_training else -1]
            return _Obstacle("mode", f"{what} is in {now} mode, and was captured in {then} mode")
        if present.autocast != self.autocast:
            text = f"autocast is to {present.autocast}, and was to {self.autocast} when captured"
            return _Obstacle("autocast", text)
        if present.tf32 != self.tf32:
            then, now = ("inside", "outside")[:: 1 if self.tf32 else -1]
            text = f"the step was captured {then} of allow_tf32_in_training(), and is {now} now"
            return _Obstacle("TensorFloat-32", text)
        if present.strategies != self.strategies:
            pairs = zip(self.strategies, present.strategies, strict=True)
            old, new = next(pair for pair in pairs if pair[0] != pair[1])
            text = f"a block's estimator and solver are {new}, and were {old} when captured"
            return _Obstacle("strategies", text)
        groups = zip(self.hyperparameters, present.hyperparameters, strict=False)
        changed = {name for then, now in groups for name, _ in set(then) ^ set(now)}
        named = ", ".join(sorted(changed)) or "groups"
        return _Obstacle(
            "hyperparameters",
            f"the optimiser's {named} changed since the capture, and are constants of the graph: "
            "leave them (OneCycleLR has cycle_momentum=False), or build another GraphedStep",
        )


def _comparable(value: object) -> object:
    """Return what tells a value from another without looking into tensors."""
    if isinstance(value, Tensor):
        return id(value)
    return tuple(map(_comparable, value)) if isinstance(value, (tuple, list)) else value


class _Snapshot:
    """The values of tensors, to be put back where they were."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self._values = [each.detach().clone() for each in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in zip(self.tensors, self._values, strict=True):
            tensor.copy_(value)

    @torch.no_grad()
    def put_back_changed(self, before: _Snapshot) -> None:
        """Put back, as they were before, the tensors that have changed since this snapshot."""
        values = zip(self.tensors, self._values, before._values, strict=True)
        for tensor, value, earlier in values:
            if not torch.equal(tensor, value):
                tensor.copy_(earlier)


class _RandomState:
    """The state of all generators that a step may draw from, to be put back."""

    def __init__(self, generator: torch.Generator) -> None:
        self._torch = [(each, each.get_state()) for each in (torch.default_generator, generator)]
        self._numpy, self._python = np.random.get_state(), random.getstate()

    def restore(self) -> None:
        for generator, state in self._torch:
            generator.set_state(state)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


def _host_random_state(of_device: torch.Generator) -> dict[str, object]:
    """Return the states of the generators from which nothing may be drawn in a graph, by name."""
    numpy: Any = np.random.get_state(legacy=False)
    states: dict[str, object] = {
        "numpy.random": (numpy["state"]["key"].tobytes(), numpy["state"]["pos"]),
        "Python's random": random.getstate(),
    }
    if of_device is not torch.default_generator:
        states["torch's CPU generator"] = torch.get_rng_state().numpy().tobytes()
    return states


class _LearningRates:
    """The learning rates as tensors on the device, so that a graph reads what schedulers set.

    Schedulers fill such tensors in place; what is assigned instead is copied into them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._before = [dict(group) for group in optimizer.param_groups]
        self._tensors = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    def settle(self) -> None:
        """Let every group refer to its tensor, with the value that it refers to now."""
        for group, tensor in zip(self._optimizer.param_groups, self._tensors, strict=True):
            rate = group["lr"]
            if rate is tensor:
                continue
            tensor.copy_(rate.reshape(())) if isinstance(rate, Tensor) else tensor.fill_(rate)
            group["lr"] = tensor
            if isinstance(self._optimizer, torch.optim.SGD):
                group.update(fused=True, foreach=False)
            elif "capturable" in group:
                group["capturable"] = True

    def release(self) -> None:
        """Put back what the groups had."""
        for group, before in zip(self._optimizer.param_groups, self._before, strict=True):
            group.update({name: before[name] for name in before if name != "params"})


class _OptimizerState:
    """The optimiser's tensors that a graph reads and writes.

    Raises:
        _CaptureError: if the optimiser keeps a number, or a tensor on the host.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._tensors: list[tuple[Tensor, str, Tensor]] = []
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, (int, float)) or (
                    isinstance(value, Tensor) and value.device != parameter.device
                ):
                    kind = type(optimizer).__name__
                    raise _CaptureError(f"{kind} keeps {name!r} on the host")
                if isinstance(value, Tensor):
                    self._tensors.append((parameter, name, value))

    def adopt(self) -> bool:
        """Copy a state that was loaded, or made anew, into the graph's tensors.

        Returns:
            Whether there is a state; otherwise the optimiser has yet to make it.
        """
        for parameter, name, tensor in self._tensors:
            state = self._optimizer.state.get(parameter, {})
            if name not in state:
                return False
            if state[name] is not tensor:
                tensor.copy_(state[name])
                state[name] = tensor
        return True


class _Places:
    """Where everything is that a graph reads and writes."""

    def __init__(self, step: EagerStep) -> None:
        self._optimizer = step.optimizer
        self._groups = self._members()
        tables = [
            table
            for module in step.flow.modules()
            for table in (module._parameters, module._buffers, module._modules)
        ]
        self._tables = [(table, dict(table)) for table in tables if table]
        self._tensors = [
            (each, each.data_ptr(), each.requires_grad)
            for each in [*step.flow.parameters(), *step.flow.buffers()]
        ]

    def _members(self) -> list[int]:
        return [id(each) for group in self._optimizer.param_groups for each in group["params"]]

    def are_unchanged(self) -> bool:
        return (
            all(_has_same_values(now, then) for now, then in self._tables)
            and all(
                each.data_ptr() == address and each.requires_grad == is_trained
                for each, address, is_trained in self._tensors
            )
            and self._members() == self._groups
        )


def _has_same_values(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return len(now) == len(then) and all(now.get(name) is each for name, each in then.items())


class _Outcome(NamedTuple):
    """What a step computed."""

    loss: Tensor
    gradients: list[Tensor]

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are numbers."""
        return bool(np.isfinite([float(self.loss), _norm(self.gradients)]).all())

    def difference(self, expected: _Outcome, tolerance: float) -> str | None:
        """Say how a replay differs from an eager step, if it does."""
        loss, wanted = float(self.loss), float(expected.loss)
        distance = _norm([a - b for a, b in zip(self.gradients, expected.gradients, strict=True)])
        size = _norm(expected.gradients)
        is_near = abs(loss - wanted) <= tolerance * (1 + abs(wanted))
        if is_near and distance <= tolerance * size:
            return None
        return (
            f"the first replay gave the loss {loss:.9g}, an eager step with the same weights and "
            f"random numbers {wanted:.9g}; their gradients, of norm {size:.3g}, differ by "
            f"{distance:.3g}. Does the loss, or a module, count its calls or keep tensors?"
        )


def _norm(tensors: list[Tensor]) -> float:
    return float(sum((each.double().square().sum() for each in tensors), torch.zeros(()))) ** 0.5


def _titled(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    return f"{name} ({kind})" if name else kind


_BACKWARD = "the backward pass"


def _described(error: BaseException, step: EagerStep) -> str:
    """Say where a step could not go on, and why: its innermost module, or what else was running."""
    while error.__context__ is not None:
        error = error.__context__
    names = {id(module): _titled(name, module) for name, module in step.flow.named_modules()}
    place = "the loss"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.optim.Optimizer):
            place = f"{type(owner).__name__}.step"
        elif id(owner) in names:
            place = names[id(owner)]
        elif frame.f_code.co_name == "backward" and isinstance(owner, Tensor):
            place = _BACKWARD
    message = str(error).strip().split("\n")[0]
    return f"{place} cannot be part of a CUDA graph: {message}"
