"""CUDA graphs on a CPU: what is recorded is operations on tensors, and no Python runs again.

A replay repeats the recorded operations with the recorded arguments: numbers stay as they were,
tensors are read where they lay, random numbers are new. A recording changes nothing. What would
make a GPU's host wait, or copy from it, raises an error.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nflows_iresnet import graphs

_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}


class RefusesToWait(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        is_copy = name == "lift_fresh" and args[0].dim() > 0
        if name in _WAITS or is_copy:
            raise RuntimeError(f"called a synchronizing operation, {func}")
        return func(*args, **(kwargs or {}))


class Tape(RefusesToWait):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._random = torch.get_rng_state()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for written in _written(func, args, kwargs):
            if written.untyped_storage().data_ptr() not in self._made:
                self._before.setdefault(id(written), (written, written.clone()))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        given = {_place(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and _place(each) not in given:
                self._made.add(_place(each))
        self._calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        for tensor, value in self._before.values():
            tensor.detach().copy_(value)
        torch.set_rng_state(self._random)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self._calls:
            if _is_view(func):
                continue
            results = tree_leaves(func(*args, **kwargs))
            for old, new in zip(tree_leaves(recorded), results, strict=True):
                if isinstance(old, Tensor) and _place(old) != _place(new):
                    old.detach().copy_(new.reshape(old.shape))  # it may be squeezed since


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_SHAPES_ONLY = {"squeeze_", "unsqueeze_", "t_", "transpose_", "as_strided_", "detach_"}


def _is_view(func: Any) -> bool:
    if func._schema.name.split("::")[-1] in _SHAPES_ONLY:
        return True
    infos = [each.alias_info for each in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Any] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            found += tree_leaves(given)
    return [each for each in found if isinstance(each, Tensor)]


class EmulatedRecorder:
    """In place of `graphs._CudaRecorder`; `distort` plants a fault into what it replays."""

    generator = torch.default_generator

    def __init__(self, distort: Callable[[], None] | None = None) -> None:
        self.captures = self.replays = 0
        self._distort = distort

    def run(self, body: Callable[[], None]) -> None:
        body()

    @contextmanager
    def refusing_to_wait(self) -> Iterator[None]:
        with RefusesToWait():
            yield

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        tape = Tape()
        try:
            with tape:
                body()
        finally:
            tape.undo()

        def replay() -> None:
            self.replays += 1
            tape.replay()
            if self._distort is not None:
                self._distort()

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> EmulatedRecorder:
    """Let `GraphedStep` capture on the CPU, and the CPU behave as a GPU does."""
    emulated = EmulatedRecorder()
    use(emulated, monkeypatch)
    return emulated


def use(emulated: EmulatedRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    supported = ["cpu", "cuda"]
    monkeypatch.setattr(graphs, "_recorder_for", lambda device: emulated)
    for kind in ("adam", "adamw", "rmsprop", "nadam"):
        module = importlib.import_module(f"torch.optim.{kind}")
        if hasattr(module, "_get_capturable_supported_devices"):
            monkeypatch.setattr(
                module, "_get_capturable_supported_devices", lambda *args, **kwargs: supported
            )
    only_on_cpus = "nflows_iresnet.precision.require_finite_rows"
    monkeypatch.setattr(only_on_cpus, lambda name, values: None)
    monkeypatch.setattr("nflows_iresnet.nn.layers._check_finite", lambda norms: None)
    monkeypatch.setattr("nflows_iresnet.logdet.power_series._is_negligible", lambda power: False)
