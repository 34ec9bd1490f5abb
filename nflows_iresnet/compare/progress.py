"""The live progress bar, on stderr: where the comparison is, the loss, and the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nflows_iresnet.compare.results import DatasetSummary, Result

_RESOLUTION = 0.02
"""Updates are this fraction of a run apart, so that the time left is estimated over many runs."""


class LiveProgress:
    """A bar over all runs; without a terminal, one line per finished run."""

    def __init__(self, total: int, done: int, *, quiet: bool) -> None:
        """Start at `done` of `total` runs."""
        self._console = Console(stderr=True, quiet=quiet)
        self._done = done
        self._shown = 0.0
        self._data: DatasetSummary | None = None
        self._bar = Progress(
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            speed_estimate_period=600.0,
        )
        self._task = self._bar.add_task("preparing", total=total, completed=done, loss="-")

    def __enter__(self) -> LiveProgress:
        """Show the bar."""
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        self._bar.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bar away, so that something else can be printed."""
        self._bar.stop()
        yield
        self.__enter__()

    def begin(self, key: tuple[str, str, int], data: DatasetSummary) -> None:
        """Show which run is under way, on which data."""
        dataset, model, repeat = key
        label = f"{dataset} · {model}" + (f" · repeat {repeat + 1}" if repeat else "")
        self._data = data
        self._bar.update(self._task, description=label, loss="-")

    def step(self, done: float, loss: float) -> None:
        """Show how far the run is, from 0 to 1, and its loss, given in nats."""
        if 0 <= done - self._shown < _RESOLUTION:
            return
        self._shown = done
        bits = None if self._data is None else _bits(self._data, loss)
        shown = f"loss {loss:.3f}" if bits is None else bits
        self._bar.update(self._task, completed=self._done + done, loss=shown)

    def finish(self, result: Result, data: DatasetSummary) -> None:
        """Count a run as finished."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        if not self._console.is_terminal:
            self._console.print(_line(result, data), highlight=False, soft_wrap=True)


def _bits(data: DatasetSummary, nats: float) -> str | None:
    """Return the loss of images in bits per dimension."""
    bits = None if data.shape is None else data.bits_per_dim(nats)
    return None if bits is None else f"{bits:.3f} bits/dim"


def _line(result: Result, data: DatasetSummary) -> str:
    label = f"{result.dataset} · {result.model} · repeat {result.repeat + 1}: "
    nll = result.metrics.test_nll
    if nll is not None:
        label += f"test NLL {_bits(data, nll) or f'{nll:.3f} nats'}"
    return label + "".join(f"; FAILED {failure}" for failure in result.failures)
