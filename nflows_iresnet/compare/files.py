"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


class WriteError(OSError):
    """A file could not be written; the message names it and the cause."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        WriteError: the disk is full, or the folder cannot be written.
    """
    try:
        _replace(path, content)
    except OSError as error:
        raise WriteError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def prepare_folder(path: Path) -> None:
    """Make a folder and prove that it can be written.

    Raises:
        ValueError: it cannot.
    """
    probe = path / ".probe"
    try:
        path.mkdir(parents=True, exist_ok=True)
        _replace(probe, b"")
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


def _replace(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink(missing_ok=True)
        raise
