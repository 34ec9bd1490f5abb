"""Ctrl-C: at once while the command starts, at the end of a step while a model is trained.

SIGTERM, by which `timeout`, Slurm and others end a process, is told as Ctrl-C is, once. This
module imports next to nothing, so that it is there as soon as the interpreter is.
"""

from __future__ import annotations

import os
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

ENDINGS = (signal.SIGINT, signal.SIGTERM)
_was_terminated = False
BEFORE_TRAINING = "nflows-iresnet: interrupted before training began"
_POSTPONED = "finishing this step, then saving a checkpoint"
SECONDS_OF_ONE_PRESS = 0.5
"""Launchers pass on to their processes what the terminal has told those already."""


def exit_status() -> int:
    """Return what shells report of a command that Ctrl-C ended, or SIGTERM."""
    return 128 + (signal.SIGTERM if _was_terminated else signal.SIGINT)


class TerminatedLikeInterrupted:
    """A block in which SIGTERM does what Ctrl-C does, unless either is ignored or another's.

    A second one does nothing: `timeout` tells the process and then its group, which is the process
    again.
    """

    def __enter__(self) -> None:
        """Take over from the default, which ends the process."""
        global _was_terminated
        _was_terminated = False
        self._is_ours = (
            signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._is_ours:
            try:
                signal.signal(signal.SIGTERM, self._handle)
            except ValueError:  # not in the main thread
                self._is_ours = False

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        if self._is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        global _was_terminated
        _was_terminated = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.raise_signal(signal.SIGINT)


class Handled:
    """A block in which Ctrl-C is handled, unless it is ignored, or another's, or a thread asks."""

    def __enter__(self) -> Handled:
        """Take over from Python's own handler."""
        self._is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._is_ours:
            try:
                signal.signal(signal.SIGINT, self._handle)
            except ValueError:  # not in the main thread
                self._is_ours = False
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give it back."""
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class EndsTheProcess(Handled):
    """Ctrl-C in the block says in one line that nothing was trained, and leaves.

    An exception would not do while modules are imported: callbacks of the interpreter and the
    start of compiled modules print it with a traceback, or turn it into another one.
    """

    def _handle(self, number: int, frame: FrameType | None) -> None:
        _say(f"{BEFORE_TRAINING}\n")
        os._exit(exit_status())


class Postponed(Handled):
    """Ctrl-C in the block is noted, and raised at its end; the second one is raised at once.

    Args:
        what_follows: what is done about the first one, in words.
        tell: called at the first one.

    Raises:
        KeyboardInterrupt: at the end of a block that went well, if it was pressed.
    """

    was_pressed = False

    def __init__(
        self, what_follows: str = _POSTPONED, tell: Callable[[], None] = lambda: None
    ) -> None:
        self._what_follows, self._tell = what_follows, tell

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give it back, and raise what was postponed."""
        super().__exit__(kind)
        if self.was_pressed and kind is None:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.was_pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _say(f"\ninterrupted: {self._what_follows} (Ctrl-C again stops at once)\n")
        self._tell()


class Noted(Handled):
    """Ctrl-C in the block is noted, and the second one is raised at once."""

    _first: float | None = None

    @property
    def was_pressed(self) -> bool:
        """Whether it was."""
        return self._first is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first > SECONDS_OF_ONE_PRESS:
            raise KeyboardInterrupt


class Ignored:
    """A block whose new processes leave Ctrl-C and SIGTERM to this one, from their start on."""

    def __enter__(self) -> None:
        """Ignore both, which processes inherit."""
        try:
            self._before = {each: signal.signal(each, signal.SIG_IGN) for each in ENDINGS}
        except ValueError:  # not in the main thread
            self._before = {}

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for each, handler in self._before.items():
            if handler is not None:
                signal.signal(each, handler)


def _say(line: str) -> None:
    """Write to stderr past Python's buffer, which a handler may have interrupted in its work."""
    try:
        os.write(2, line.encode())
    except OSError:
        return
