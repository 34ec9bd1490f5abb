"""Batches for ever, from a position that can be saved and taken up again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from nflows_iresnet.datasets import Dataset

Prepare = Callable[[Tensor, Generator], Tensor]
_OTHER_SEED = 2**32
"""Added to the seed of the shuffles, for the noise."""


class Batches(Iterator[Tensor]):
    """Batches for ever, one seeded shuffle per epoch; a remainder of rows is left out.

    Everything random comes from two generators of its own, so equal seeds yield equal batches
    whatever a model draws in between. Noise is drawn where the rows are: on a GPU it is other
    noise, and no batch waits for the device.

    Args:
        rows: (N, *).
        batch_size: rows per batch; N if there are fewer rows.
        seed: equal seeds yield equal batches in equal order.
        prepare: turns rows and a generator into a batch, to add noise for example.
    """

    def __init__(
        self, rows: Tensor, batch_size: int, seed: int, prepare: Prepare | None = None
    ) -> None:
        self._rows, self._prepare = rows, prepare
        self._size = min(batch_size, len(rows))
        self._shuffles = Generator().manual_seed(seed)
        self._noise = Generator(rows.device).manual_seed(seed + _OTHER_SEED)
        self._start_epoch()

    def __next__(self) -> Tensor:
        """Return the next batch."""
        if self._position + self._size > len(self._rows):
            self._start_epoch()
        chosen = self._order[self._position : self._position + self._size]
        self._position += self._size
        batch = self._rows[chosen]
        return batch if self._prepare is None else self._prepare(batch, self._noise)

    def _start_epoch(self) -> None:
        self._before_shuffle = self._shuffles.get_state()
        order = torch.randperm(len(self._rows), generator=self._shuffles)
        self._order = order.to(self._rows.device)
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


def training_batches(
    data: Dataset, batch_size: int, seed: int, device: str | torch.device = "cpu"
) -> Batches:
    """Return batches of the training rows; quantised rows get fresh noise in each.

    Args:
        data: the data set.
        batch_size: rows per batch.
        seed: of order and noise.
        device: where the rows are.
    """
    train, levels = data.train.to(device), data.levels
    if levels is None:
        return Batches(train, batch_size, seed)
    location, scale = data.location.to(device), data.scale.to(device)
    rows = ((train * scale + location) * levels).floor()

    def with_noise(batch: Tensor, generator: Generator) -> Tensor:
        noise = torch.rand(batch.shape, generator=generator, device=batch.device).to(batch)
        return (((batch + noise) / levels - location) / scale).to(train.dtype)

    return Batches(rows, batch_size, seed, with_noise)
