"""The checkpoint of a training: a file that is whole, and says which training it is of."""

from __future__ import annotations

import io
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nflows_iresnet.files import WriteError, read_intact, write_atomically
from nflows_iresnet.settings import SAVED_WITH


class CheckpointError(ValueError):
    """A checkpoint cannot be gone on with; the message names the file and the remedy."""


@dataclass
class Keeper:
    """Keeps the last checkpoint of one training; reading it runs no code.

    Args:
        path: the file.
        settings: what the training depends on, by name; a checkpoint of another one is refused, as
            far as it names them: those of earlier versions lack some.
        every: seconds between checkpoints.
        remedy: what follows where a file that is refused is deleted, or what else can be done.
    """

    path: Path
    settings: Mapping[str, object] = field(default_factory=dict)
    every: float = 60.0
    remedy: str = "to train from the start, or give another path"
    _last: float = field(default_factory=time.monotonic, init=False)
    _has_saved: bool = field(default=False, init=False)

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another one."""
        return time.monotonic() - self._last >= self.every

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint, whole or not at all."""
        content = _written({"settings": self._named, "state": state})
        if not self._has_saved:
            self._require_readable(content)
        self._has_saved = True
        write_atomically(self.path, content.getvalue())
        self._last = time.monotonic()

    def require_plain(self, state: dict[str, Any]) -> None:
        """Make sure that a state could be read again.

        Raises:
            CheckpointError: it holds what only running code could read.
        """
        self._require_readable(_written(state))

    def _require_readable(self, content: io.BytesIO) -> None:
        content.seek(0)
        try:
            torch.load(content, weights_only=True)
        except Exception as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = found[1] if found else type(error).__name__
            raise CheckpointError(
                f"checkpoint {str(self.path)!r} could not be read again: the state of the model or "
                f"of its optimiser holds a {what}, and to read that is to run code. Let it hold "
                "tensors, numbers and strings, or train without a checkpoint"
            ) from error

    def load(self) -> dict[str, Any] | None:
        """Return the state of the checkpoint, None if there is none.

        Raises:
            CheckpointError: the file is damaged, of another training, or none of ours.
        """
        if not self.path.exists():
            return None
        try:
            found = torch.load(read_intact(self.path), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may raise anything
            raise self.damaged() from error
        if not isinstance(found, dict) or {*found} != {"settings", "state"}:
            raise CheckpointError(
                f"{str(self.path)!r} is no checkpoint of a training, but may be what you saved "
                "yourself, such as a state_dict: give another path"
            )
        settings, state = found["settings"], found["state"]
        named = self._named
        for name, then in settings.items():
            if then != (now := named.get(name)):
                raise self._refused(f"of another training: {name} was {then} there and is {now}")
        return state

    def damaged(self) -> CheckpointError:
        """Return the error that says that the file is damaged."""
        return self._refused("damaged, of another version, or none")

    def refused_by(self, error: Exception) -> CheckpointError:
        """Return the error that says why its state could not be loaded."""
        reason = next((line for line in str(error).splitlines() if SAVED_WITH in line), None)
        if reason is not None:
            return self._refused(f"of another flow ({reason.strip()})")
        return self.damaged()

    def discard(self) -> None:
        """Delete the checkpoint.

        Raises:
            WriteError: the folder cannot be written.
        """
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(f"cannot delete {str(self.path)!r}: {error.strerror}") from error

    def _refused(self, why: str) -> CheckpointError:
        delete = f"delete it (rm {shlex.quote(str(self.path))})"
        return CheckpointError(f"checkpoint {str(self.path)!r} is {why}: {delete} {self.remedy}")

    @property
    def _named(self) -> dict[str, str]:
        return {name: repr(value) for name, value in self.settings.items()}


def _written(value: dict[str, Any]) -> io.BytesIO:
    """Return a file of `torch.save` in memory."""
    content = io.BytesIO()
    torch.save(value, content)
    return content
