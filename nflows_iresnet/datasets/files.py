"""Bytes from files, compressed files and archives, with where they came from."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LONG = 160


@dataclass(frozen=True)
class SourceFile:
    """A file that was read, and what was in it.

    Args:
        path: Where it is; for a member of an archive, the archive and the member.
        content: The bytes, decompressed.

    Example:
        >>> SourceFile("empty", b"").sha256[:8]
        'e3b0c442'
    """

    path: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Hash of the content, decompressed."""
        return hashlib.sha256(self.content).hexdigest()

    def check(self, sha256: str | None) -> None:
        """Refuse a content that is not the published one.

        Args:
            sha256: The published hash, ``None`` where it is not known.

        Raises:
            ValueError: If the hashes differ.
        """
        if sha256 is not None and self.sha256 != sha256:
            raise ValueError(
                f"{self.path} is not the published file: its sha256 is {self.sha256}, expected"
                f" {sha256}; get the file again"
            )


def one_line(text: object) -> str:
    r"""Return text from a file, or an error about it, so that it can stand in a message.

    Args:
        text: Anything; what cannot be printed is escaped, and what is long is cut.

    Returns:
        One line.

    Example:
        >>> one_line("a\nb")
        'a b'
        >>> one_line("\x1b[31m")
        '\\x1b[31m'
    """
    words = " ".join(str(text).split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return shown if len(shown) <= _LONG else shown[:_LONG] + "..."


def read_file(path: Path) -> SourceFile:
    """Read a file, decompressing ``.gz``.

    Args:
        path: An existing file.

    Returns:
        The file with its content.

    Raises:
        ValueError: If it cannot be read or is damaged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "one.gz"
        >>> _ = path.write_bytes(gzip.compress(b"1"))
        >>> read_file(path).content
        b'1'
    """
    try:
        content = path.read_bytes()
        return SourceFile(str(path), gzip.decompress(content) if path.suffix == ".gz" else content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read or is damaged ({one_line(error)}); get it again"
        ) from error


def read_zipped(path: Path, name: str) -> SourceFile:
    """Read a member of a ``.zip`` or ``.whl`` archive, without unpacking anything.

    Args:
        path: An existing archive.
        name: Name of the member.

    Returns:
        The member.

    Raises:
        ValueError: If the member is missing or the archive is damaged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "one.whl"
        >>> with zipfile.ZipFile(path, "w") as archive:
        ...     archive.writestr("folder/one.txt", b"1")
        >>> read_zipped(path, "folder/one.txt").content
        b'1'
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return SourceFile(f"{path}:{name}", archive.read(name))
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or lacks {name} ({one_line(error)}); get it again"
        ) from error


def read_members(path: Path, names: Sequence[str]) -> list[SourceFile]:
    """Read members of a ``.tar.gz`` archive, without unpacking anything.

    Args:
        path: An existing archive.
        names: Names of the members.

    Returns:
        The members, in the order of their names.

    Raises:
        ValueError: If a member is missing or the archive is damaged.
    """
    try:
        with tarfile.open(path) as archive:
            return [SourceFile(f"{path}:{name}", _member(archive, name)) for name in names]
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or incomplete ({one_line(error)}); get it again"
        ) from error


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()
