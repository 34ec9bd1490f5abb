"""The progress bar, on stderr, that stands still while a clock runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nflows_iresnet.experiments.progress import TerminalBar


class CaseProgress(TerminalBar):
    """A bar over all cases. It has no thread of its own, which would be timed with the work."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        """Start at no case of `total`."""
        self._console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} {task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("preparing", total=total)

    def begin(self, label: str) -> None:
        """Show which case is under way; without a terminal, print it."""
        self._bar.update(self._task, description=label, refresh=self._console.is_terminal)
        if not self._console.is_terminal:
            self._console.print(label, highlight=False, soft_wrap=True)

    def finish(self) -> None:
        """Count a case as finished."""
        self._bar.update(self._task, advance=1, refresh=self._console.is_terminal)

    @contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """Show a case for the duration of a block, and count it."""
        self.begin(label)
        yield
        self.finish()
