"""The processes that train one flow together, and the random numbers of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

if distributed.is_available():
    import torch.distributed.nn  # after init_process_group it would keep the group's threads alive

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

    def of_all(self, value: _Result) -> list[_Result]:
        """Return the value of every process."""
        found: list[Any] = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(found, value)
        return found

    def numbers_of_all(self, numbers: list[float]) -> list[list[float]]:
        """Return the numbers of every process, as many of each: faster than `of_all`."""
        if self.count == 1:
            return [numbers]
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        given = torch.tensor(numbers, dtype=torch.float64, device=device)
        found = [torch.empty_like(given) for _ in range(self.count)]
        distributed.all_gather(found, given)
        return [each.tolist() for each in found]

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


def seed_everything(seed: int) -> None:
    """Seed torch, and numpy's global generator, from which normflows draws its truncation."""
    torch.manual_seed(seed)
    np.random.seed(seed)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the global generators of the host and of one device, and of no other GPU."""
    if device.type in ("cpu", "cuda"):
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    np.random.seed(seed)


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the generators of a device for a block, and leave them as they were; not with None."""
    if seed is None:
        yield
        return
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_generators(seed, device)
        try:
            yield
        finally:
            np.random.set_state(state)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the global generators that a model on a device draws from."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()  # an array would need code to be read
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": numpy,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on with the random numbers of `random_state`, on the same device or another."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(state["numpy"])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
