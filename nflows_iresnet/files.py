"""Files that a reader sees whole or not at all, and errors of the system in words."""

from __future__ import annotations

import io
import os
import secrets
import shlex
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


class WriteError(OSError):
    """A file could not be written; the message names it and the cause."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Whenever the process or the machine stops. What a link leads to is replaced, and not the link.
    What a process that was killed had written in part is removed by the next that writes into the
    folder.

    Raises:
        WriteError: the disk is full, or the folder cannot be written.
    """
    try:
        _replace(path.resolve() if path.is_symlink() else path, content)
    except OSError as error:
        reason = error.strerror or str(error)
        if path.is_dir():
            reason = f"a folder is in the way; move it away ({moved_away(path)})"
        raise WriteError(f"cannot write {str(path)!r}: {reason}") from error


def moved_away(path: Path) -> str:
    """Return the command that moves something out of the way."""
    return f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.moved')}"


def read_intact(path: Path) -> io.BytesIO:
    """Read a file of `torch.save`, or an `.npz`, whose parts have the sums that it says.

    `torch.load` does not look at them: weights with a wrong bit would be weights as others.

    Raises:
        zipfile.BadZipFile: one has not, or it is no such file.
    """
    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged!r} does not have the sum that the file says")
    content.seek(0)
    return content


def describe_os_error(error: OSError) -> str:
    """Say which file and why, without the number of the error."""
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename!r}: {error.strerror}"


def _replace(path: Path, content: bytes) -> None:
    _remove_abandoned(path.parent)
    temporary = path.with_name(f".{path.name}.part-{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    handle = os.open(temporary, flags, 0o666)
    try:
        with _claimed(handle):
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _keep_name(path.parent)


def _keep_name(folder: Path) -> None:
    """Let names in a folder outlast a loss of power, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _claimed(handle: int) -> Iterator[None]:
    """Let others know that a file is being written, until it has its name or its writer is dead.

    Where files that are open cannot be removed, they know.
    """
    if sys.platform == "win32":
        yield
        return
    kept = os.dup(handle)
    try:
        with suppress(OSError):
            fcntl.flock(kept, fcntl.LOCK_EX)
        yield
    finally:
        os.close(kept)


def _remove_abandoned(folder: Path) -> None:
    """Remove what dead processes have written in part; who has an empty file is about to claim it.

    A file that is claimed is left: the attempt to claim it raises an error, as to remove it does
    where files that are open cannot be removed.
    """
    for part in folder.glob(".*.part-????????"):
        with suppress(OSError), part.open("r+b") as file:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_size > 0:
                part.unlink()
