"""Rows as users give them: batches for ever, and the mean loss of all."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Generator, Tensor, nn

from nflows_iresnet import logdet, transforms
from nflows_iresnet.graphs import Loss
from nflows_iresnet.training.processes import (
    ALONE,
    Processes,
    random_state,
    seeded,
    set_random_state,
)

_EXACT_FEATURES = 64
"""Up to so many dimensions validation takes the exact log-determinant of residual blocks."""
_ROWS_AT_ONCE = 1_024
_VALIDATION_SEED = 10_000
_NOISE_SEED = 2**32

Batch = Tensor | tuple[Tensor, ...]
"""Rows (B, *), or rows and their context (B, C)."""
Rows = Tensor | tuple[Tensor, ...] | Iterable[Batch | list[Tensor]]


class Batches(Iterator[Any]):
    """Batches for ever, one seeded shuffle per epoch; a remainder of rows is left out.

    Everything random comes from generators of its own, so equal seeds yield equal batches whatever
    a model draws in between. What `prepare` draws comes from one where the rows are: on a GPU it is
    other noise, and no batch waits for the device.

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
        self._noise = None if prepare is None else Generator(self._device).manual_seed(noise)
        self._start_epoch()

    def __next__(self) -> Any:
        """Return the next batch: a tensor for a tensor, a tuple for a tuple."""
        if self._position + self._size > self._count:
            self._start_epoch()
        chosen = self._order[self._position : self._position + self._size]
        self._position += self._size
        chosen = chosen[self._processes.rank :: self._processes.count]
        batch, *rest = (each[chosen] for each in self._rows)
        if self._prepare is not None and self._noise is not None:
            batch = self._prepare(batch, self._noise)
        return batch if self._single else (batch, *rest)

    def _start_epoch(self) -> None:
        self._before_shuffle = self._shuffles.get_state()
        order = torch.randperm(self._count, generator=self._shuffles, device="cpu")
        self._order = order.to(self._device)
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position, from which `load_state_dict` goes on."""
        return {
            "shuffle": self._before_shuffle,
            "position": self._position,
            "noise": None if self._noise is None else self._noise.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where batches of the same rows were."""
        self._shuffles.set_state(state["shuffle"])
        self._start_epoch()
        self._position = state["position"]
        if self._noise is not None:
            self._noise.set_state(state["noise"])


class GivenRows:
    """Rows as users give them: tensors, or a data loader.

    Args:
        rows: a tensor, a tuple of rows and context, or a data loader of either.
        like: what tells the device and the precision.
        what: these rows are, in words.
        processes: that share them out.

    Raises:
        ValueError: they are nothing of that, none, not finite, or not the same in each process.
    """

    def __init__(self, rows: Any, like: Tensor, what: str, processes: Processes = ALONE) -> None:
        self.what, self.processes = what, processes
        self._like, self.loader = like, rows
        self._is_looked_at = False
        self._tensors: tuple[Tensor, ...] = ()
        if processes.count == 1:
            self._take(rows)
        else:
            self._agree_to_take(rows)

    @property
    def device(self) -> torch.device:
        """Where they are moved."""
        return self._like.device

    def _take(self, rows: Any) -> None:
        if isinstance(rows, Tensor | tuple):
            given = rows if isinstance(rows, tuple) else (rows,)
            present = [each for each in given if each is not None]
            self._tensors = tuple(map(self._moved, present))
            self._check()
            for each in present if self._is_single else ():
                rounding = _Rounding()
                rounding.add(each)
                rounding.require_little(f"{self.what} rows")
        elif not isinstance(rows, Iterable):
            raise ValueError(
                f"the {self.what} rows must be a tensor, a tuple of rows and context, or a data "
                f"loader, got {type(rows).__name__}"
            )

    def _moved(self, values: Any) -> Tensor:
        if not isinstance(values, Tensor):
            raise ValueError(
                f"the {self.what} rows must be tensors, got {type(values).__name__}: convert by "
                "torch.as_tensor"
            )
        dtype = self._like.dtype if values.is_floating_point() else values.dtype
        return values.detach().to(self._like.device, dtype)

    def _check(self) -> None:
        tensors = self._tensors
        if not tensors or tensors[0].dim() == 0 or tensors[0].shape[0] == 0:
            raise ValueError(f"there are no {self.what} rows")
        for each in tensors:
            if each.dim() == 0 or each.shape[0] != tensors[0].shape[0]:
                raise ValueError(
                    f"there must be one context for each of the {tensors[0].shape[0]} "
                    f"{self.what} rows, got shape {tuple(each.shape)}"
                )
            _require_finite(each, f"{self.what} rows")

    def _agree_to_take(self, rows: Any) -> None:
        """Take them, and raise in every process what is wrong in one of them, or between them."""
        own, error = "", None
        try:
            self._take(rows)
            own = str(self) if self._tensors else "a data loader"
        except Exception as raised:  # whatever it is, the others wait to be told
            error = raised
        told = self.processes.of_all((own, None if error is None else str(error)))
        if error is not None:
            raise error
        wrong = next((each for _, each in told if each is not None), None)
        if wrong is not None:
            raise ValueError(f"another process was given what cannot be trained on: {wrong}")
        found = sorted({kind for kind, _ in told})
        if len(found) > 1:
            raise ValueError(
                f"processes have different {self.what} rows ({'; '.join(found)}): give all rows to "
                "each, which then takes its share, or a data loader of its own rows"
            )

    def __str__(self) -> str:
        """Say what tells these rows from others."""
        if not self._tensors:
            return type(self.loader).__name__
        on_host = [each.detach().cpu().contiguous().reshape(-1) for each in self._tensors]
        sums = [zlib.crc32(each.view(torch.uint8).numpy().data) for each in on_host]
        shapes = [tuple(each.shape) for each in self._tensors]
        return f"{shapes} with sums {' '.join(f'{each:08x}' for each in sums)}"

    def stream(self, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
        """Return batches for ever."""
        if not self._tensors:
            return _Cycle(self)
        seed = self.processes.first(lambda: int(torch.randint(2**31, ())))
        return Batches(self._tensors, batch_size, seed, processes=self.processes)

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Return all rows once."""
        if self._tensors:
            yield from zip(*(each.split(_ROWS_AT_ONCE) for each in self._tensors), strict=True)
            return
        looks = self._is_single and not self._is_looked_at and self.processes.count == 1
        seen: dict[int, _Rounding] = {}
        for batch in self.loader:
            given = tuple(batch) if isinstance(batch, Sequence) else (batch,)
            moved = tuple(map(self._moved, given))
            for index, each in enumerate(given if looks else ()):
                seen.setdefault(index, _Rounding()).add(each)
            yield moved
        self._is_looked_at = True
        for each in seen.values():
            each.require_little(f"{self.what} rows")

    @property
    def _is_single(self) -> bool:
        return self._like.dtype == torch.float32

    def some(self, count: int) -> tuple[Tensor, ...]:
        """Return rows from all over, the first of a loader; each process has its share."""
        rank, sharers = self.processes.rank, self.processes.count
        if self._tensors and self._tensors[0].shape[0] >= sharers:
            return tuple(spaced(each, count)[rank::sharers] for each in self._tensors)
        count = -(-count // sharers)
        parts: list[tuple[Tensor, ...]] = []
        for batch in self.batches():
            parts.append(batch)
            if sum(part[0].shape[0] for part in parts) >= count:
                break
        if not parts:
            raise ValueError(f"the {self.what} loader has no batch")
        return tuple(torch.cat(each)[:count] for each in zip(*parts, strict=True))


def spaced(rows: Tensor, count: int) -> Tensor:
    """Return so many rows at equal distances, or all: tables may be sorted."""
    total = rows.shape[0]
    if total <= count:
        return rows
    return rows[torch.arange(count, device=rows.device) * total // count]


class _Cycle(Iterator[tuple[Tensor, ...]]):
    """A data loader again and again."""

    def __init__(self, given: GivenRows) -> None:
        self._given, self._epoch, self._position = given, -1, 0
        self._batches: Iterator[tuple[Tensor, ...]] = iter(())

    def __next__(self) -> tuple[Tensor, ...]:
        batch = next(self._batches, None)
        if batch is None:
            self._start_epoch(self._epoch + 1)
            batch = next(self._batches, None)
        if batch is None:
            ran_out = _if_it_ran_out(self._given.loader)
            raise ValueError(f"the {self._given.what} loader has no batch{ran_out}")
        self._position += 1
        return batch

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        for owner in self._owners:
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)
        own = [each.get_state() for each in self._generators]
        self._start = {
            "epoch": epoch,
            "before": random_state(self._given.device),
            "before_own": own,
        }
        self._batches = self._given.batches()

    @property
    def _owners(self) -> list[Any]:
        """The loader and its samplers, each once."""
        loader: Any = self._given.loader
        batches = getattr(loader, "batch_sampler", None)
        samplers = getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)
        return list({id(each): each for each in (loader, *samplers)}.values())

    @property
    def _generators(self) -> list[Generator]:
        """Those of the loader and of its samplers, each once."""
        found = (getattr(owner, "generator", None) for owner in self._owners)
        return list({id(each): each for each in found if isinstance(each, Generator)}.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the position, from which `load_state_dict` goes on."""
        return {**self._start, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Run through the epoch as far as it had come; the random state is then another."""
        set_random_state(state["before"], self._given.device)
        for generator, before in zip(self._generators, state["before_own"], strict=True):
            generator.set_state(before)
        self._start_epoch(state["epoch"])
        for _ in range(state["position"]):
            next(self)


def _if_it_ran_out(rows: object) -> str:
    if not isinstance(rows, Iterator):
        return ""
    return (
        f": a {type(rows).__name__} runs out after one pass; give a data loader, or a list of "
        "the batches"
    )


def _require_finite(values: Tensor, what: str, first: int = 0) -> None:
    """Check values (N, *) or (N,); `first` is the number of their first row."""
    bad = (~values.isfinite())[:, None].flatten(start_dim=1).any(dim=1).nonzero().flatten()
    if bad.numel():
        raise ValueError(
            f"{bad.numel()} of {values.shape[0]} {what} are not finite, first row "
            f"{first + int(bad[0])}: drop or impute them"
        )


_ROUNDING = 1e-2
"""Part of a feature's standard deviation that may be lost to the precision of a flow."""
_CONSTANT = 1e-12
"""A feature with a smaller deviation, relative to its mean, has that of rounding alone."""


class _Rounding:
    """What single precision leaves of float64 rows, which are given in parts.

    Where a feature is many thousands of deviations from zero, that is few values. Constants have
    none to lose.
    """

    _count = 0

    def add(self, rows: Tensor) -> None:
        """Look at a part, unless it is of another precision, or shape than the first."""
        if rows.dtype != torch.float64 or rows.dim() < 2 or len(rows) == 0:
            return
        rows = rows.detach()
        count, mean = len(rows), rows.mean(0)
        squares, error = (rows - mean).square().sum(0), (rows - rows.float()).abs().amax(0)
        if self._count == 0:
            self._count, self._mean, self._squares, self._error = count, mean, squares, error
        elif mean.shape == self._mean.shape:
            total, way = self._count + count, mean - self._mean
            self._mean = self._mean + way * (count / total)
            self._squares = self._squares + squares + way.square() * (self._count * count / total)
            self._count, self._error = total, self._error.maximum(error)

    def require_little(self, what: str) -> None:
        """Raise if a feature has lost more than a part of its deviation."""
        if self._count < 2:
            return
        mean, std = self._mean, (self._squares / (self._count - 1)).sqrt()
        is_lost = (self._error > _ROUNDING * std) & (std > _CONSTANT * mean.abs())
        for index in is_lost.flatten().nonzero().flatten().tolist()[:1]:
            raise ValueError(
                f"{int(is_lost.sum())} features of the {what} are lost to the precision of the "
                f"flow, float32: feature {index} has mean {float(mean.flatten()[index]):.6g} and "
                f"deviation {float(std.flatten()[index]):.3g}. Subtract its mean, or take "
                "flow.double()"
            )


class Validator:
    """The mean loss of all validation rows, with the same random numbers each time."""

    def __init__(self, rows: Rows, like: Tensor, loss: Loss | None) -> None:
        if isinstance(rows, Iterator):
            raise ValueError(f"validation has no rows the second time{_if_it_ran_out(rows)}")
        self.rows = GivenRows(rows, like, "validation")
        self._loss, self._device = loss, like.device
        self._differentiates = False

    def __call__(self, flow: Any) -> float:
        """Return it, in nats; a loss that differentiates in the rows is found out by trying."""
        try:
            with torch.set_grad_enabled(self._differentiates):
                return self._mean(flow)
        except RuntimeError as error:
            if self._differentiates or "does not require grad" not in str(error):
                raise
        self._differentiates = True
        return self(flow)

    def _mean(self, flow: Any) -> float:
        total, count = 0.0, 0
        with seeded(_VALIDATION_SEED, self._device):
            for batch in self.rows.batches():
                rows, value = batch[0].shape[0], self._value(flow, batch)
                if not math.isfinite(value):
                    for each in batch:
                        _require_finite(each, "validation rows of a batch", first=count)
                total, count = total + rows * value, count + rows
        if not count:
            raise ValueError("the validation loader has no batch")
        return total / count

    def _value(self, flow: Any, batch: tuple[Tensor, ...]) -> float:
        if self._loss is not None:
            loss = self._loss(flow, *batch)
            return float(loss.detach() if isinstance(loss, Tensor) else loss)
        exact = batch[0].shape[1:].numel() <= _EXACT_FEATURES
        with _exactly(flow) if exact else nullcontext():
            return -float(flow.log_prob(*batch).double().mean())


def _exactly(flow: nn.Module) -> AbstractContextManager[object]:
    if not any(isinstance(each, transforms.ResidualTransform) for each in flow.modules()):
        return nullcontext()
    return transforms.using(flow, estimator=logdet.Exact())
