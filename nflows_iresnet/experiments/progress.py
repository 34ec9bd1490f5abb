"""The live progress bar, on stderr: where the comparison is, the loss, and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Bar = TypeVar("Bar", bound="TerminalBar")
_RESOLUTION = 0.02
"""Updates are this fraction of a run apart, so that the time left is estimated over many runs."""


class TerminalBar:
    """A bar that is shown on a terminal for the duration of a block."""

    _console: Console
    _bar: Progress

    def __enter__(self: Bar) -> Bar:
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


class LiveProgress(TerminalBar):
    """A bar over all runs; without a terminal, one line per finished run."""

    def __init__(self, total: int, done: int, *, quiet: bool) -> None:
        """Start at `done` of `total` runs."""
        self._console = Console(stderr=True, quiet=quiet)
        self._done = done
        self._shown = 0.0
        self._describe: Callable[[float], str] = _plain
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

    def begin(self, label: str, describe: Callable[[float], str] | None = None) -> None:
        """Show what is under way, and how its loss in nats is to be described."""
        self._describe = describe or _plain
        self._bar.update(self._task, description=label, loss="-")

    def step(self, done: float, loss: float) -> None:
        """Show how far the run is, from 0 to 1, and its loss, given in nats."""
        if 0 <= done - self._shown < _RESOLUTION:
            return
        self._shown = done
        self._bar.update(self._task, completed=self._done + done, loss=self._describe(loss))

    def finish(self, line: str) -> None:
        """Count a run as finished; without a terminal, print a line about it."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, soft_wrap=True)


def _plain(loss: float) -> str:
    return f"loss {loss:.3f}"
