"""The live progress bars, on stderr: where the command is, the loss, and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
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

    def __init__(
        self, total: int, done: int, *columns: ProgressColumn, quiet: bool, refresh: bool = True
    ) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            BarColumn(bar_width=24),
            *columns,
            console=self._console,
            transient=True,
            auto_refresh=refresh,
            speed_estimate_period=600.0,
        )
        self._task = self._bar.add_task("preparing", total=total, completed=done, loss="-")

    def __enter__(self: Bar) -> Bar:
        """Show the bar."""
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        self._bar.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bar away, so that something else can be printed."""
        self._bar.stop()
        yield
        self.__enter__()

    def _print_without_terminal(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, soft_wrap=True)


class LiveProgress(TerminalBar):
    """A bar over all runs; without a terminal, one line per finished run."""

    def __init__(self, total: int, done: int, *, quiet: bool) -> None:
        """Start at `done` of `total` runs."""
        columns = (
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        super().__init__(total, done, *columns, quiet=quiet)
        self._done = done
        self._shown = 0.0
        self._describe: Callable[[float], str] = _plain

    def begin(self, label: str, describe: Callable[[float], str] | None = None) -> None:
        """Show what is under way, and how its loss in nats is to be described."""
        self._describe = describe or _plain
        self._bar.update(self._task, description=label, loss="-")

    def step(self, done: float, loss: float) -> None:
        """Show how far what is under way is, in runs, and the loss, given in nats."""
        if 0 <= done - self._shown < _RESOLUTION:
            return
        self._shown = done
        self._bar.update(self._task, completed=self._done + done, loss=self._describe(loss))

    def finish(self, line: str) -> None:
        """Count a run as finished; without a terminal, print a line about it."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        self._print_without_terminal(line)


def _plain(loss: float) -> str:
    return f"loss {loss:.3f}"


class CaseProgress(TerminalBar):
    """A bar over all cases. It has no thread of its own, which would be timed with the work."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        """Start at no case of `total`."""
        label = TextColumn("{task.completed}/{task.total} {task.description}")
        super().__init__(total, 0, label, TimeElapsedColumn(), quiet=quiet, refresh=False)

    def begin(self, label: str) -> None:
        """Show which case is under way; without a terminal, print it."""
        self._bar.update(self._task, description=label, refresh=self._console.is_terminal)
        self._print_without_terminal(label)

    def finish(self) -> None:
        """Count a case as finished."""
        self._bar.update(self._task, advance=1, refresh=self._console.is_terminal)

    @contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """Show a case for the duration of a block, and count it."""
        self.begin(label)
        yield
        self.finish()
