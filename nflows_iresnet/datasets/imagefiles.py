"""Files of labelled images as people have them: IDX, and CIFAR's pickles without running code.

A pickle may call any function while it is read. `read_pickle` builds arrays, dictionaries, lists,
numbers and text, and refuses everything else.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_IDX_UNSIGNED_BYTE = 8


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
        raise ValueError(f"{path} cannot be read or is damaged ({error}); get it again") from error


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
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); get it again") from error


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()


def parse_idx(file: SourceFile, dimensions: int) -> Bytes:
    r"""Parse the IDX format: two zero bytes, a type, the number of dimensions, sizes, values.

    References:
        "The MNIST database of handwritten digits" (LeCun et al., 1998).

    Args:
        file: The file.
        dimensions: How many dimensions it must have: three for images, one for labels.

    Returns:
        The values, uint8.

    Raises:
        ValueError: If the file is not in this format or has another length than it says.

    Example:
        >>> parse_idx(SourceFile("labels", bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9])), 1)
        array([7, 9], dtype=uint8)
    """
    start, content = 4 + 4 * dimensions, file.content
    if content[:4] != bytes([0, 0, _IDX_UNSIGNED_BYTE, dimensions]) or len(content) < start:
        raise ValueError(
            f"{file.path} is not an IDX file of unsigned bytes in {dimensions} dimensions: it"
            f" begins with {content[:4].hex()}; get the ubyte file of the data set"
        )
    shape = tuple(np.frombuffer(content, ">u4", count=dimensions, offset=4).tolist())
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{file.path} holds {len(content) - start} values and announces {math.prod(shape)};"
            " it was cut short, get it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def parse_cifar(file: SourceFile, labels_key: str) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Parse a batch of CIFAR's python version.

    References:
        "Learning multiple layers of features from tiny images" (Krizhevsky, 2009).

    Args:
        file: The file.
        labels_key: ``labels`` for CIFAR-10, ``fine_labels`` for CIFAR-100.

    Returns:
        Images [rows, 3, 32, 32] and labels [rows].

    Raises:
        ValueError: If the file is not such a batch.
    """
    batch = read_pickle(file)
    wanted = (b"data", labels_key.encode())
    if not isinstance(batch, dict) or not all(key in batch for key in wanted):
        raise ValueError(
            f"{file.path} is not a CIFAR batch: it must hold a dictionary with 'data' and"
            f" {labels_key!r}; get the 'python version' of the data set"
        )
    data, labels = (batch[key] for key in wanted)
    well_formed = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2
    if not well_formed or data.shape[1] != 3072 or len(labels) != len(data):
        raise ValueError(
            f"{file.path} is not a CIFAR batch: 'data' must be uint8 of shape (rows, 3072) with as"
            f" many labels, found {getattr(data, 'shape', type(data).__name__)} and {len(labels)}"
        )
    return data.reshape(-1, 3, 32, 32), np.asarray(labels, dtype=np.int64)


def read_pickle(file: SourceFile) -> Any:
    """Unpickle plain values and arrays, and nothing that could run code.

    Args:
        file: The file; text of Python 2 becomes bytes.

    Returns:
        What was pickled.

    Raises:
        ValueError: If the pickle names anything but numpy's arrays, or is damaged.

    Example:
        >>> read_pickle(SourceFile("harmless", pickle.dumps({"a": [1, 2]})))
        {'a': [1, 2]}
        >>> read_pickle(SourceFile("harmful", pickle.dumps(print)))
        Traceback (most recent call last):
        ValueError: harmful refers to builtins.print, ...
    """
    try:
        return _ArraysOnly(io.BytesIO(file.content), encoding="bytes").load()
    except _ForbiddenError as error:
        raise ValueError(
            f"{file.path} refers to {error}, which no data set needs: it was not read further"
        ) from None
    except Exception as error:
        raise ValueError(f"{file.path} is not a readable pickle ({error}); get it again") from error


class _ForbiddenError(pickle.UnpicklingError):
    """The pickle names something that is not an array."""


def _latin1(text: str, encoding: object = None) -> bytes:
    """Stand for `_codecs.encode`, by which Python 3 writes bytes into old protocols."""
    return text.encode("latin1")


_REBUILD: Callable[..., Any] = np.zeros(0).__reduce__()[0]  # type: ignore[assignment]
_SAFE: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _REBUILD,
    ("numpy._core.multiarray", "_reconstruct"): _REBUILD,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise _ForbiddenError(f"{module}.{name}")
        return _SAFE[module, name]
