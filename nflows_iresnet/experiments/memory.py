"""Peak memory of a piece of work, in the same words on a CPU and on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEASURE = {
    "cpu": "bytes of the tensors alive at once, scratch space inside a kernel not counted",
    "cuda": "torch.cuda.max_memory_allocated above the level before",
}


def peak_megabytes(work: Callable[[], object], device: torch.device) -> float:
    """Return the peak of tensor memory, in MB, that some work adds to what was there before.

    Args:
        work: the work; it is run once.
        device: where its tensors live; `MEASURE` says what is counted there.
    """
    measure = _peak_on_cuda if device.type == "cuda" else _peak_on_cpu
    return measure(work) / 1e6


def _peak_on_cuda(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(work: Callable[[], object]) -> int:
    with _LiveStorages() as storages:
        work()
    return storages.peak


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of every storage from the operation that makes it to its release."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        for leaf in tree_leaves((args, kwargs)):
            self._know(leaf)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._count(leaf)
        return result

    def _know(self, leaf: object) -> None:
        if isinstance(leaf, Tensor):
            self._known.add(leaf.untyped_storage())

    def _count(self, leaf: object) -> None:
        if not isinstance(leaf, Tensor) or leaf.untyped_storage() in self._known:
            return
        storage = leaf.untyped_storage()
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, num_bytes: int) -> None:
        self.live -= num_bytes
