"""Bytes from files and archives, and what pickles hold without doing anything that they say.

A pickle is a program: it may call any function, and numpy itself trusts the state that it gives to
an array (an array of objects without the flag that says so reads memory at any address). So nothing
that a pickle names is called here. What it asks for is written down as `Recorded`, if its name is
one that arrays and data frames need, and `to_array` and `read_frame` build numbers from that by
themselves, checking every size.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import pickle
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Folder = str | os.PathLike[str]
DATA_VARIABLE = "NFLOWS_IRESNET_DATA"
NAMING_THE_FOLDER = f"with data_dir (--data-dir) or in the environment variable {DATA_VARIABLE}"
"""How to say where the data are, for a message."""

_LONG = 160


def data_folder(data_dir: Folder | None) -> Path | None:
    """Return the folder that was named, else that of the environment variable, if there is one."""
    chosen = os.environ.get(DATA_VARIABLE) if data_dir is None else data_dir
    return Path(chosen).expanduser() if chosen else None


@dataclass(frozen=True)
class SourceFile:
    """What was in a file, decompressed, and where; a member of an archive has the names of both.

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

    def check(self, sha256: str) -> None:
        """Refuse a content that has another hash than the published one."""
        if self.sha256 != sha256:
            raise ValueError(
                f"{self.path} is not the published file: its sha256 is {self.sha256}, expected"
                f" {sha256}; get the file again"
            )


def one_line(text: object) -> str:
    r"""Return text from a file, or an error about it, escaped and cut so that it fits a message.

    Example:
        >>> one_line("a\nb")
        'a b'
        >>> one_line("\x1b[31m")
        '\\x1b[31m'
    """
    words = " ".join(str(text).split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return shown if len(shown) <= _LONG else shown[:_LONG] + "..."


@contextmanager
def refusing(problem: str, remedy: str = "get it again") -> Iterator[None]:
    """Turn whatever goes wrong with a file into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{problem} ({one_line(error)}); {remedy}") from error


def read_file(path: Path) -> SourceFile:
    """Read a file, decompressing ``.gz``; one that cannot be read or is damaged is a ValueError."""
    with refusing(f"{path} cannot be read or is damaged"):
        content = path.read_bytes()
        return SourceFile(str(path), gzip.decompress(content) if path.suffix == ".gz" else content)


def read_zipped(path: Path, name: str) -> SourceFile:
    """Read a member of a ``.zip`` or ``.whl`` archive, without unpacking anything."""
    with refusing(f"{path} is damaged or lacks {name}"), zipfile.ZipFile(path) as archive:
        return SourceFile(f"{path}:{name}", archive.read(name))


def read_members(path: Path, names: Sequence[str]) -> list[SourceFile]:
    """Read members of a ``.tar.gz`` archive in this order, without unpacking anything."""
    with refusing(f"{path} is damaged or incomplete"), tarfile.open(path) as archive:
        return [SourceFile(f"{path}:{name}", _member(archive, name)) for name in names]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()


_KNOWN = {
    "numpy": {"_reconstruct", "_frombuffer", "ndarray", "dtype"},
    "pandas": {
        *("DataFrame", "BlockManager", "_unpickle_block", "_new_Index", "Index", "RangeIndex"),
        *("Int64Index", "StringArray", "StringDtype", "__pyx_unpickle_NDArrayBacked"),
    },
    "builtins": {"slice"},
    "__builtin__": {"slice"},
}
_BYTES = (("_codecs", "encode"), ("__builtin__", "bytes"), ("builtins", "bytes"))
_NUMERIC = re.compile(r"b1|[iu][1248]|f[248]")
_MEMO = ("PUT", "BINPUT", "LONG_BINPUT")
_BYTE_ORDERS = ("<", ">", "|", "=")


# pandas.read_pickle runs what a pickle says; this reads the same data frames and runs nothing.
class Recorded:
    """What a pickle asked for: arguments and state of something that was never made.

    The class of an instance carries the name that was asked for, and is made anew for each pickle,
    so that nothing a pickle does to it outlives the reading.
    """

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Recorded:
        """Write down the arguments."""
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        """Write down the state."""
        self.state = state

    @property
    def name(self) -> str:
        """What was asked for."""
        return type(self).__name__


class _Latin1(Recorded):
    """Stands for `_codecs.encode` and `bytes`, by which Python 3 writes bytes as protocol 2."""

    __slots__ = ()

    def __new__(cls, text: str = "", encoding: object = None) -> bytes:  # type: ignore[misc]
        return text.encode("latin1")


class _ForbiddenError(pickle.UnpicklingError):
    """The pickle names something that no array needs."""


class _Recorder(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[Recorded]:
        if (module, name) in _BYTES:
            return type(name, (_Latin1,), {"__slots__": ()})
        if name not in _KNOWN.get(module.split(".")[0], ()):
            raise _ForbiddenError(f"{module}.{name}")
        return type(name, (Recorded,), {"__slots__": ()})


def read_pickle(file: SourceFile) -> Any:
    """Unpickle plain values, and write down what else is asked for, without running code.

    Text of Python 2 becomes bytes, and `Recorded` stands in the place of arrays and tables.

    Raises:
        ValueError: If the pickle names anything but arrays and tables, or is damaged.

    Example:
        >>> read_pickle(SourceFile("harmless", pickle.dumps({"a": [1, 2]})))
        {'a': [1, 2]}
        >>> read_pickle(SourceFile("harmful", pickle.dumps(print)))
        Traceback (most recent call last):
        ValueError: harmful refers to builtins.print, ...
    """
    with refusing(f"{file.path} is not a readable pickle"):
        _check_sizes(file.content)
        try:
            return _Recorder(io.BytesIO(file.content), encoding="bytes").load()
        except _ForbiddenError as error:
            forbidden = one_line(error)
    raise ValueError(
        f"{file.path} refers to {forbidden}, which no data set needs: it was not read further"
    )


def _check_sizes(content: bytes) -> None:
    """Refuse a pickle that is cut short, or asks for more memory than it has bytes."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in _MEMO and (argument or 0) > len(content):
            raise ValueError(f"{argument} values in {len(content)} bytes")


def to_array(value: object) -> npt.NDArray[Any]:
    """Build an array of numbers from what `read_pickle` wrote down; it may be read-only.

    Raises:
        ValueError: If it is no array of numbers, or its parts contradict each other.
    """
    data, dtype, shape, order = _array_parts(value)
    code = _text(_field(dtype, "dtype").args[0])
    if not _NUMERIC.fullmatch(code):
        raise ValueError(f"an array of dtype {code!r} where numbers are needed")
    if not isinstance(data, bytes | bytearray):
        raise ValueError("an array without its bytes")
    numbers = np.frombuffer(data, _byte_order(dtype) + code)
    if math.prod(shape) != numbers.size:
        raise ValueError(f"an array of shape {shape} with {numbers.size} values")
    return numbers.reshape(shape, order=order)


def read_frame(file: SourceFile) -> tuple[tuple[str, ...], FloatArray]:
    """Read column names and numbers [rows, columns] from a pickled data frame, without pandas.

    The file is from `DataFrame.to_pickle` of pandas 0.15 to 3, of any protocol from 2.

    Raises:
        ValueError: If it is anything else; the message says how to convert it.
    """
    found = read_pickle(file)
    remedy = (
        "if you trust it, convert it where pandas can read it: pandas.read_pickle(path)"
        ".to_csv('same name.csv', index=False), and put that beside it"
    )
    with refusing(f"{file.path} does not hold a pandas data frame of numbers", remedy):
        return _frame(found)


def _frame(found: object) -> tuple[tuple[str, ...], FloatArray]:
    state = _decoded(_field(found, "DataFrame").state)
    manager = _field(state.get("_mgr", state.get("_data")), "BlockManager")
    axes, blocks = _axes_and_blocks(manager)
    names = _names(axes[0])
    parts = [(to_array(values), _where(place, len(names))) for values, place in blocks]
    values = np.empty((parts[0][0].shape[1], len(names)))
    missing = np.ones(len(names), dtype=bool)
    for part, columns in parts:
        if part.shape != (len(columns), len(values)):
            raise ValueError(f"a block of shape {part.shape} for {len(columns)} columns")
        values[:, columns] = part.T
        missing[columns] = False
    if missing.any():
        raise ValueError(f"no values for column {names[int(missing.argmax())]}")
    return names, values


def _axes_and_blocks(manager: Recorded) -> tuple[Any, list[tuple[Any, Any]]]:
    """Return the index of each axis, and the values and columns of each block."""
    if manager.args:
        blocks, axes = manager.args
        return axes, [_field(block, "_unpickle_block").args[:2] for block in blocks]
    extra = _decoded(_decoded(manager.state[3])["0.14.1"])
    described = [_decoded(block) for block in extra["blocks"]]
    return extra["axes"], [(block["values"], block["mgr_locs"]) for block in described]


def _names(index: object) -> tuple[str, ...]:
    found = _decoded(_field(index, "_new_Index").args[1])
    if "data" not in found:
        return tuple(map(str, range(*(int(found[key]) for key in ("start", "stop", "step")))))
    labels = _labels(found["data"])
    return tuple(_text(label) for label in labels)


def _labels(value: object) -> Iterator[Any]:
    if isinstance(value, Recorded) and value.name == "__pyx_unpickle_NDArrayBacked":
        value = next(part for part in value.state if getattr(part, "name", "") in _ARRAYS)
    data = _array_parts(value)[0]
    return iter(data if isinstance(data, list) else to_array(value).tolist())


def _where(place: object, width: int) -> npt.NDArray[np.int64]:
    """Return the columns of a block."""
    everything = np.arange(width)
    if isinstance(place, Recorded) and place.name == "slice":
        start, stop, step = place.args
        return everything[slice(start, stop, step)]
    return everything[to_array(place)]


_ARRAYS = ("_reconstruct", "_frombuffer")


def _array_parts(value: object) -> tuple[Any, Any, tuple[int, ...], Any]:
    """Return the data, the dtype, the shape and the order of an array."""
    array = _field(value, *_ARRAYS)
    if array.name == "_frombuffer":
        data, dtype, shape, order = array.args
    else:
        _, shape, dtype, is_fortran, data = array.state
        order = "F" if is_fortran else "C"
    return data, dtype, tuple(int(size) for size in shape), _text(order)


def _byte_order(dtype: Recorded) -> str:
    order = _text(dtype.state[1]) if dtype.state else "="
    if order not in _BYTE_ORDERS:
        raise ValueError(f"an array of unknown byte order {order!r}")
    return order


def _field(value: object, *names: str) -> Recorded:
    if isinstance(value, Recorded) and value.name in names:
        return value
    found = value.name if isinstance(value, Recorded) else type(value).__name__
    raise ValueError(f"{found} in the place of {names[0]}")


def _decoded(details: object) -> dict[str, Any]:
    if not isinstance(details, dict):
        raise ValueError(f"{type(details).__name__} in the place of a dictionary")
    return {_text(key): value for key, value in details.items()}


def _text(value: object) -> str:
    """Return text; that of Python 2 is bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
