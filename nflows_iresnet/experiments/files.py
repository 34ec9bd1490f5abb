"""Folders that commands write into, checkpoints of runs, and errors of the system in words."""

from __future__ import annotations

import io
import json
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nflows_iresnet.files import WriteError, read_intact, write_atomically


def prepare_folder(path: Path) -> None:
    """Make a folder and prove that it can be written.

    Raises:
        ValueError: it cannot.
    """
    probe = path / ".probe"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to the output folder {str(path)!r} ({error.strerror}): "
            "choose another one with --out"
        ) from error


def describe_os_error(error: OSError) -> str:
    """Say which file and why, without the number of the error."""
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename!r}: {error.strerror}"


class CheckpointError(ValueError):
    """A checkpoint cannot be gone on with; the message names the file and the remedy."""


@dataclass
class Keeper:
    """Keeps the last checkpoint of one run.

    Args:
        path: the file.
        identity: what the run depends on, as plain JSON data; a checkpoint of another run is
            refused.
        every: seconds between checkpoints.
    """

    path: Path
    identity: Any = None
    every: float = 300.0
    _last: float = field(default_factory=time.monotonic, init=False)

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another one."""
        return time.monotonic() - self._last >= self.every

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        import torch

        buffer = io.BytesIO()
        torch.save({"identity": self._named, "state": state}, buffer)
        write_atomically(self.path, buffer.getvalue())
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return the state of the checkpoint, None if there is none.

        Raises:
            CheckpointError: the file is damaged, or of another run.
        """
        if not self.path.exists():
            return None
        import torch

        try:
            found = torch.load(read_intact(self.path), map_location="cpu", weights_only=True)
            identity, state = found["identity"], dict(found["state"])
        except Exception as error:  # a damaged file may raise anything
            raise self.damaged() from error
        if identity != self._named:
            raise CheckpointError(
                f"checkpoint {str(self.path)!r} is of a run with other arguments; delete it, or "
                "choose another --out"
            )
        return state

    def damaged(self) -> CheckpointError:
        """Return the error that says that the file is damaged."""
        return CheckpointError(
            f"checkpoint {str(self.path)!r} is damaged; delete it (rm "
            f"{shlex.quote(str(self.path))}) and give the same command again: that model is then "
            "trained from its start"
        )

    def discard(self) -> None:
        """Delete the checkpoint.

        Raises:
            WriteError: the folder cannot be written.
        """
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(f"cannot delete {str(self.path)!r}: {error.strerror}") from error

    @property
    def _named(self) -> str:
        return json.dumps(self.identity, sort_keys=True)
