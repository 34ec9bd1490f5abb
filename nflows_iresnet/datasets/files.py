"""Numbers from files: found, unpacked, parsed, and refused in one line where they are unfit.

A pickle is a program: it may call any function, and numpy itself trusts the state that it gives to
an array (an array of objects without the flag that says so reads memory at any address). So nothing
that a pickle names is called here. What it asks for is written down as `Recorded`, if its name is
one that arrays and data frames need, and `to_array` and `read_frame` build numbers from that by
themselves, checking every size.
"""

from __future__ import annotations

import csv
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Folder = str | os.PathLike[str]
Names = tuple[str, ...]
DATA_VARIABLE = "NFLOWS_IRESNET_DATA"
NAMING_THE_FOLDER = f"with data_dir (--data-dir) or in the environment variable {DATA_VARIABLE}"
"""How to say where the data are, for a message."""

_LONG = 160


def data_folder(data_dir: Folder | None) -> Path | None:
    """Return the folder that was named, else that of the environment variable, if there is one."""
    chosen = os.environ.get(DATA_VARIABLE) if data_dir is None else data_dir
    return Path(chosen).expanduser() if chosen else None


def find(
    name: str,
    files: Mapping[str, Sequence[str]],
    folders: Sequence[Path],
    remedy: str = "",
    nowhere: str = "",
) -> list[Path]:
    """Return the path of each file from the first folder that has them all.

    A file may have several names, the best first; the usual one is the key. ``remedy`` says how to
    get them, ``nowhere`` where they were looked for without folders.
    """
    for folder in folders:
        found = [
            [p for each in names if (p := folder / each).is_file()] for names in files.values()
        ]
        if all(found):
            return [paths[0] for paths in found]
    wanted, places = ", ".join(files), " or ".join(map(str, folders)) or nowhere
    problem = f"no {wanted} in {places}" if places else f"no folder was named that has {wanted}"
    get = f"{remedy}, then " if remedy else ""
    raise ValueError(f"{name}: {problem}; {get}name the folder {NAMING_THE_FOLDER}")


@dataclass(frozen=True)
class SourceFile:
    """What was in a file, decompressed, and where; a member of an archive has the names of both."""

    path: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Hash of the content, decompressed."""
        return hashlib.sha256(self.content).hexdigest()


def one_line(text: object) -> str:
    r"""Return text from a file, or an error about it, escaped and cut so that it fits a message."""
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
        content, is_packed = path.read_bytes(), path.suffix.lower() == ".gz"
        return SourceFile(str(path), gzip.decompress(content) if is_packed else content)


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


# --- text and arrays ------------------------------------------------------------------------------

_LARGEST = 1e100
_MISSING = ("", "?", "-", "na", "n/a", "null", "none", ".")


# pandas.read_csv does not say where a bad cell is, and fills short rows with NaN.
def read_text(
    file: SourceFile, width: int | None = None, columns: Names | None = None, comment: str = ""
) -> tuple[Names, FloatArray]:
    """Read column names and finite numbers [rows, columns] from a file of delimited text.

    Cells are separated by commas, semicolons, tabs or spaces. A first row without any number is
    taken for the names, whether or not it begins with numpy's ``#``; so is ``0, 1, 2, ...``, as
    pandas calls columns without names, above a row with a decimal point. Other rising whole
    numbers above decimals everywhere, and a lone 0, may be names or a row, and are refused. What
    follows another ``#`` is never read, as it may be a row taken out. Columns without names
    are called ``0, 1, ...``. The first row must have ``width`` cells. ``columns`` are names for the
    first of them, which are kept. Lines that begin with ``comment``, and blank ones, are no rows.
    """
    path, (lines, rows) = file.path, _split(file, comment)
    if width not in (None, len(rows[0])):
        raise ValueError(
            f"{path}, line {lines[0]}: {len(rows[0])} cells, expected {width};"
            " the file is not the one that the package carries"
        )
    width, names = len(rows[0]), numbered(len(rows[0]))
    if columns and len(columns) > width:
        raise ValueError(
            f"{path}, line {lines[0]}: {len(rows[0])} cells for {len(columns)} named columns;"
            " name those that the file has"
        )
    if not any(_is_number(_pointed(cell)) for cell in rows[0]):
        names, lines, rows = tuple(map(one_line, rows[0])), lines[1:], rows[1:]
    elif _are_pandas_numbers(rows):
        names, lines, rows = tuple(rows[0]), lines[1:], rows[1:]
    elif columns is None and _may_be_names(rows):
        raise ValueError(
            f"{path}, line {lines[0]}: {one_line(','.join(rows[0]))} may be the names of the "
            "columns, or a row: give names a letter, or numbers a decimal point"
        )
    names = columns or names
    for line, cells in zip(lines, rows, strict=True):
        if len(cells) != width:
            ends = len(cells) == width + 1 and not cells[-1]
            remedy = "remove the separator at its end" if ends else "give every row the same number"
            raise ValueError(
                f"{path}, line {line}: {len(cells)} cells where the first row has {width}; {remedy}"
            )
    try:
        values = np.array([[_number(cell) for cell in cells[: len(names)]] for cells in rows])
    except ValueError:
        raise ValueError(_first_bad_cell(path, names, lines, rows)) from None
    values = values.reshape(len(rows), len(names))
    refuse_nonfinite(path, names, values, lines)
    return names, values


def _are_pandas_numbers(rows: list[list[str]]) -> bool:
    """Whether the first row is what pandas calls three or more columns without names.

    An empty name before them is that of its index.
    """
    first, second = tuple(rows[0]), rows[1] if len(rows) > 1 else []
    is_counted = first in (numbered(len(first)), ("", *numbered(len(first) - 1)))
    return is_counted and len(first) > 2 and any("." in cell for cell in second)


def _may_be_names(rows: list[list[str]]) -> bool:
    """Whether the first row is rising whole numbers, or 0, and the next three decimals alone."""
    first, others = rows[0], rows[1:4]
    if len(others) < 3 or not all(cell.isdecimal() for cell in first):
        return False
    numbers = [int(cell) for cell in first]
    is_named = numbers == sorted(set(numbers)) if len(first) > 1 else first == ["0"]
    return is_named and all("." in cell for cells in others for cell in cells)


def _without_hashes(lines: dict[int, str]) -> dict[int, str]:
    """Return the rows, and a header: what follows a hash is neither, but for names above rows.

    Those are the last such line without a number and with as many cells as the first row.
    """

    def cells(line: str) -> list[str]:
        return line.split(_separator(line))

    def are_names(line: str) -> bool:
        return not any(_is_number(cell) for cell in cells(line))

    is_hidden = {number: line.lstrip()[0] == "#" for number, line in lines.items()}
    rows = {number: line for number, line in lines.items() if not is_hidden[number]}
    names = {number: line.lstrip(" #") for number, line in lines.items() if is_hidden[number]}
    if not rows:
        return {}
    first, row = next(iter(rows.items()))
    fitting = {
        number: line
        for number, line in names.items()
        if number < first and are_names(line) and len(cells(line)) == len(cells(row))
    }
    header = {} if are_names(row) else dict(list(fitting.items())[-1:])
    return {**header, **rows}


def _separator(line: str) -> str | None:
    """Return what is between the cells of a line; None for white space."""
    return next((each for each in ";,\t" if each in line), None)


def _split(file: SourceFile, comment: str) -> tuple[list[int], list[list[str]]]:
    """Return the numbers of the lines that are rows, from one, and their cells."""
    text = file.content.decode("utf-8-sig", errors="replace")
    if "\0" in text:
        raise ValueError(f"{file.path} is not UTF-8 text: save it as .csv in UTF-8, or as .npy")
    lines = {
        number: line
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not (comment and line.startswith(comment))
    }
    kept = _without_hashes(lines)
    if not kept:
        raise ValueError(f"{file.path} is empty: give a file with at least ten rows of numbers")
    separator = _separator(next(iter(kept.values())))
    with refusing(f"{file.path} is not a table of numbers", "give every cell less text"):
        rows = [
            next(csv.reader([line], delimiter=separator)) if separator else line.split()
            for line in kept.values()
        ]
    return list(kept), [[cell.strip() for cell in cells] for cells in rows]


def _number(cell: str) -> float:
    """Read a number as tables have it, not as Python has it: 1_000 is none."""
    if "_" in cell:
        raise ValueError(cell)
    return float(cell)


def _pointed(cell: str) -> str:
    """Return a number that has a decimal comma with a point."""
    return cell.replace(",", ".")


def _is_number(cell: str) -> bool:
    try:
        _number(cell)
    except ValueError:
        return False
    return True


def _first_bad_cell(path: str, names: Names, lines: list[int], rows: list[list[str]]) -> str:
    kept = [cells[: len(names)] for cells in rows]
    line, index, cell = next(
        (line, index, cell)
        for line, cells in zip(lines, kept, strict=True)
        for index, cell in enumerate(cells)
        if not _is_number(cell)
    )
    is_first = line == lines[0] and len(kept) > 1 and all(map(_is_number, kept[1]))
    if is_first and any(map(_is_number, kept[0])):
        return (
            f"{path}, line {line}: {one_line(','.join(rows[0]))} is no row for '{one_line(cell)}', "
            "and no line of names for its numbers: give every name a letter"
        )
    place = f"{path}, line {line}, column {names[index]} (index {index})"
    return f"{place}: '{one_line(cell)}' is not a number; {_remedy([c[index] for c in kept], cell)}"


def _remedy(column: list[str], cell: str) -> str:
    """Say what to do about a cell of a column that is no number."""
    if not any(column):
        return "the column is empty: remove it, or the separator that ends each line"
    if cell.lower() in _MISSING:
        return "fill it, or remove its row"
    if _is_number(_pointed(cell)):
        return "write a decimal point in place of the comma"
    return "keep numeric columns, with a decimal point"


def read_array(path: Path) -> FloatArray:
    """Read the numbers [rows, columns] of a ``.npy`` file, finite or not."""
    with refusing(f"{path} is empty, damaged or of object dtype", "save a plain numeric array"):
        array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path} has dtype {array.dtype}: save an array of real numbers")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{path} has shape {array.shape} and must have (rows, columns);"
            " for one column use array.reshape(-1, 1)"
        )
    return np.array(array, dtype=np.float64)


def numbered(width: int) -> Names:
    """Names of columns that have none: 0, 1, ..."""
    return tuple(map(str, range(width)))


def refuse_nonfinite(
    path: Path | str, columns: Names, values: FloatArray, lines: Sequence[int] | None = None
) -> None:
    """Refuse NaN, infinite and absurdly large values; ``lines`` of text number the rows."""
    is_bad = ~(np.abs(values) <= _LARGEST)
    bad = [
        f"{count} in column {name} (index {index})"
        for index, (name, count) in enumerate(zip(columns, is_bad.sum(axis=0), strict=True))
        if count
    ]
    if bad:
        row, column = np.argwhere(is_bad)[0]
        number = f"row {row} (from 0)" if lines is None else f"line {lines[row]}"
        raise ValueError(
            f"{path}, {number}, column {columns[column]}: {values[row, column]:g}; NaN, infinite or"
            f" beyond {_LARGEST:g}: {', '.join(bad)}; remove or fill those rows"
        )


# --- pickles --------------------------------------------------------------------------------------

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
_ARRAYS = ("_reconstruct", "_frombuffer")
_NUMERIC = re.compile(r"b1|[iu][1248]|f[248]")
_MEMO = ("PUT", "BINPUT", "LONG_BINPUT")


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


class _ForbiddenError(pickle.UnpicklingError):
    """The pickle names something that no array needs."""


class _Recorder(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) in _BYTES:  # by which Python 3 writes bytes as protocol 2
            return lambda text="", encoding=None: text.encode("latin1")
        if name not in _KNOWN.get(module.split(".")[0], ()):
            raise _ForbiddenError(f"{module}.{name}")
        return type(name, (Recorded,), {"__slots__": ()})


def read_pickle(file: SourceFile) -> Any:
    """Unpickle plain values, and write down what else is asked for, without running code.

    Text of Python 2 becomes bytes, and `Recorded` stands in the place of arrays and tables.
    """
    size = len(file.content)
    with refusing(f"{file.path} is not a readable pickle"):
        for operation, argument, _ in pickletools.genops(file.content):
            if operation.name in _MEMO and (argument or 0) > size:
                raise ValueError(f"{argument} values in {size} bytes")
        try:
            return _Recorder(io.BytesIO(file.content), encoding="bytes").load()
        except _ForbiddenError as error:
            forbidden = one_line(error)
    raise ValueError(
        f"{file.path} refers to {forbidden}, which no data set needs: it was not read further"
    )


def to_array(value: object) -> npt.NDArray[Any]:
    """Build an array of numbers from what `read_pickle` wrote down; it may be read-only."""
    data, dtype, shape, order = _array_parts(value)
    code = _text(_field(dtype, "dtype").args[0])
    byte_order = _text(dtype.state[1]) if dtype.state else "="
    if not _NUMERIC.fullmatch(code):
        raise ValueError(f"an array of dtype {code!r} where numbers are needed")
    if not isinstance(data, bytes | bytearray):
        raise ValueError("an array without its bytes")
    if byte_order not in ("<", ">", "|", "="):
        raise ValueError(f"an array of unknown byte order {byte_order!r}")
    numbers = np.frombuffer(data, byte_order + code)
    if math.prod(shape) != numbers.size:
        raise ValueError(f"an array of shape {shape} with {numbers.size} values")
    return numbers.reshape(shape, order=order)


def read_frame(file: SourceFile) -> tuple[Names, FloatArray]:
    """Read column names and numbers [rows, columns] from a pickled data frame, without pandas.

    The file is from `DataFrame.to_pickle` of pandas 0.15 to 3, of any protocol from 2.
    """
    found = read_pickle(file)
    remedy = (
        "if you trust it, convert it where pandas can read it: pandas.read_pickle(path)"
        ".to_csv('same name.csv', index=False), and put that beside it"
    )
    with refusing(f"{file.path} does not hold a pandas data frame of numbers", remedy):
        state = _decoded(_field(found, "DataFrame").state)
        return _frame(_field(state.get("_mgr", state.get("_data")), "BlockManager"))


def _frame(manager: Recorded) -> tuple[Names, FloatArray]:
    axes, blocks = _axes_and_blocks(manager)
    names = _labels(axes[0])
    everything = np.arange(len(names))
    parts = [(to_array(values), everything[_where(place)]) for values, place in blocks]
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


def _labels(index: object) -> Names:
    found = _decoded(_field(index, "_new_Index").args[1])
    if "data" not in found:
        return tuple(map(str, range(*(int(found[key]) for key in ("start", "stop", "step")))))
    value = found["data"]
    if isinstance(value, Recorded) and value.name == "__pyx_unpickle_NDArrayBacked":
        value = next(part for part in value.state if getattr(part, "name", "") in _ARRAYS)
    data = _array_parts(value)[0]
    return tuple(map(_text, data if isinstance(data, list) else to_array(value).tolist()))


def _where(place: object) -> slice | npt.NDArray[Any]:
    """Return the columns of a block."""
    if isinstance(place, Recorded) and place.name == "slice":
        return slice(*place.args)
    return to_array(place)


def _array_parts(value: object) -> tuple[Any, Any, tuple[int, ...], Any]:
    """Return the data, the dtype, the shape and the order of an array."""
    array = _field(value, *_ARRAYS)
    if array.name == "_frombuffer":
        data, dtype, shape, order = array.args
    else:
        _, shape, dtype, is_fortran, data = array.state
        order = "F" if is_fortran else "C"
    return data, dtype, tuple(int(size) for size in shape), _text(order)


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
