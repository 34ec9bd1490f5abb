"""What a call asks of a device: kernels that are launched, and where the host waits for results."""

from __future__ import annotations

import collections
import inspect
import sys
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nflows_iresnet.experiments.bench.steps import OperationCounter, moves_data
from tests import pretended

WAITS = frozenset(
    {
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "masked_scatter",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "bincount",
        "histc",
        "multinomial",
        "repeat_interleave",
        "_linalg_eigh",
        "linalg_eig",
        "_linalg_svd",
        "linalg_lstsq",
        "_linalg_check_errors",
    }
)
"""Operators whose result, its shape, or whether they succeeded, is read by the host.

Decompositions are counted with them: they iterate until the host sees that they are done.
"""


class Operations(OperationCounter):
    """Counts kernels (views aside) and waits, by the place in the package that asks for them.

    What concerns the CPU alone is not counted where there is another device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self._device = device

    def __enter__(self) -> Operations:
        pretended.copies_from_host.append(self._wait)
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pretended.copies_from_host.remove(self._wait)
        super().__exit__(kind, error, trace)

    def see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [each for each in leaves if isinstance(each, Tensor)]
        on_device = [each for each in tensors if each.device.type == self._device.type]
        target = next((each for each in leaves if isinstance(each, torch.device)), None)
        if on_device or (target is not None and target.type == self._device.type):
            if moves_data(name):
                self.kernels[place()] += 1
            if name in WAITS or _is_indexed_by_mask(name, args) or self._crosses(tensors, target):
                self._wait()

    def _wait(self) -> None:
        self.waits[place()] += 1

    def _crosses(self, tensors: list[Tensor], target: torch.device | None) -> bool:
        """Whether values are copied between host and device; numbers of no dimension may be."""
        kinds = {each.device.type for each in tensors}
        if target is not None:
            return bool(tensors) and target.type not in kinds
        return len(kinds) > 1 and any(
            each.dim() > 0 for each in tensors if each.device.type != self._device.type
        )


def _is_indexed_by_mask(name: str, args: tuple[Any, ...]) -> bool:
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


_COUNTER = inspect.getfile(OperationCounter)


def place() -> str:
    """Return the innermost function of this package, or of nflows, that is running."""
    frame: Any = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        for package in ("/nflows_iresnet/", "/nflows/"):
            if package in path and path != _COUNTER:
                file = path.rsplit(package, 1)[-1]
                own = "" if package == "/nflows_iresnet/" else "nflows/"
                return f"{own}{file}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
