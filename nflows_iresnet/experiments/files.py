"""Folders that commands write into, and errors of the system in words."""

from __future__ import annotations

from pathlib import Path


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
