"""A device that is pretended: on a CPU, what a GPU would refuse and where its host would wait.

Its tensors hold one on the CPU and are computed with there, but to torch and to the package they
are on another device: what branches on the device takes the GPU's way; to combine them with tensors
of the CPU, to read them by `numpy()`, or to draw them by a generator of the CPU fails as it does on
a GPU. torch wants to know a device before the first backward pass of a process, so that tests run
on it by `pytest --device pretended`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

NAME = "pretended"

copies_from_host: list[Callable[[], None]] = []
"""Called where torch copies from the host and asks no dispatch mode, as `torch.tensor` does."""

_generators: dict[int, torch.Generator] = {}
"""Of the device, by what torch calls them by: each call is handed another object for one."""

_MAY_MIX = {"_to_copy", "copy_", "_copy_from", "copy"}


class OnDevice(Tensor):
    """A tensor of the device, and what it holds on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[OnDevice], held: Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.held!r} on a device that is pretended"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.held, self.requires_grad, isinstance(self, torch.nn.Parameter))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.is_inference_mode_enabled():  # where torch leaves it to others to decompose
            result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return _run(func, args, kwargs or {})


def register() -> torch.device:
    """Tell torch about the device, once, and return it."""
    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        for name in _FACTORIES:
            _LIBRARY.impl(name, _factory(name), "PrivateUse1")
        _LIBRARY.impl("_copy_from", _copied, "PrivateUse1")
        _FALLBACKS.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        torch.serialization.add_safe_globals([_rebuilt])
        torch.__future__.set_overwrite_module_params_on_conversion(True)
    return torch.device(NAME, 0)


def generator(seed: int) -> torch.Generator:
    """Return a generator of the device."""
    made = torch.Generator().manual_seed(seed)
    _generators[_address(made)] = made
    return made


def _address(generator: torch.Generator) -> int:
    return int(generator._cdata)  # type: ignore[attr-defined]


_FACTORIES = [
    "empty.memory_format",
    "empty_strided",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
]
"""Out of which torch makes the others; `arange` and `eye` would enlarge an empty tensor."""

_LIBRARY = torch.library.Library("aten", "IMPL")
_FALLBACKS = torch.library.Library("_", "IMPL")


def _factory(name: str) -> Callable[..., Any]:
    packet, overload = f"{name}.default".split(".")[:2]
    operator = getattr(getattr(torch.ops.aten, packet), overload)
    return lambda *args, **kwargs: _run(operator, args, kwargs)


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    for call in list(copies_from_host):
        call()
    _held(target).copy_(_held(source))
    return target


def _rebuilt(held: Tensor, requires_grad: bool, is_parameter: bool) -> Tensor:
    made = OnDevice(held.detach())
    if is_parameter:
        return torch.nn.Parameter(made, requires_grad)
    return made.requires_grad_(requires_grad)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on what the tensors hold."""
    name, leaves = func._schema.name.split("::")[-1], pytree.tree_leaves((args, kwargs))
    if name not in _MAY_MIX:
        _refuse_mixture(func, leaves)
    to = kwargs.get("device")
    results = func(*pytree.tree_map(_held, args), **pytree.tree_map(_held, kwargs))
    if name == "_to_copy" and to is not None and to.type == "cpu":
        return results
    known = {id(each.held): each for each in leaves if isinstance(each, OnDevice)}

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in known:
            return OnDevice(value)
        if known[id(value)].shape != value.shape:
            raise NotImplementedError(f"{func} changes the shape of a tensor in place")
        return known[id(value)]

    with _as_normal_as(args[0] if func.is_view else None):
        return pytree.tree_map(back, results)


def _as_normal_as(base: Any) -> AbstractContextManager[object]:
    """A view of a tensor that is none of inference mode is none either, even in that mode."""
    is_normal = isinstance(base, Tensor) and not base.is_inference()
    return torch.inference_mode(False) if is_normal else nullcontext()


def _held(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.held
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def _refuse_mixture(func: Any, leaves: list[Any]) -> None:
    for each in leaves:
        if isinstance(each, Tensor) and not isinstance(each, OnDevice) and each.dim() > 0:
            raise RuntimeError(
                f"{func}: all tensors must be on {NAME}, found {tuple(each.shape)} on {each.device}"
            )
        if isinstance(each, torch.Generator) and _address(each) not in _generators:
            raise RuntimeError(f"{func}: the generator must be on {NAME}, found {each.device}")


_DummyModule: Any = getattr(backend_registration, "_DummyBackendModule", object)


class _Module(_DummyModule):
    """What torch asks of `torch.pretended`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: object = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = 0) -> None:
        torch.set_rng_state(state)

    def synchronize(self, device: object = 0) -> None:
        pass
