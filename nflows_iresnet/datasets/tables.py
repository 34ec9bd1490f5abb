"""Tables of numbers from .npy and delimited text files, or a clear reason why not."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nflows_iresnet.datasets.files import SourceFile, one_line

Place = Path | str
"""Where something is, for a message."""

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".data")
SUFFIXES = (".npy", *TEXT_SUFFIXES)

_LARGEST = 1e100
_FEW_VALUES = 0.05
_MISSING = ("", "?", "-", "na", "n/a", "null", "none", ".")


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns of finite float64 numbers.

    Args:
        name: What the data are called.
        columns: One name per column.
        values: The numbers [rows, columns].
        source: Where they come from.
        notes: What deserves care, a sentence each.
        levels: How many values a quantised entry took, where that is known.
        licence: On what terms the data may be used, where that is known.

    Example:
        >>> Table("ones", ("a",), np.ones((10, 1)), "doctest").values.shape
        (10, 1)
    """

    name: str
    columns: tuple[str, ...]
    values: npt.NDArray[np.float64]
    source: str
    notes: tuple[str, ...] = ()
    levels: int | None = None
    licence: str | None = None


@dataclass(frozen=True)
class TextRow:
    """One line of a delimited text file.

    Args:
        number: Line number in the file, from one.
        cells: Its cells, stripped.

    Example:
        >>> TextRow(1, ["1.5", "2"]).cells
        ['1.5', '2']
    """

    number: int
    cells: list[str]


def read_table(path: Path) -> Table:
    """Read the numbers of a ``.npy`` or delimited text file.

    Text may be separated by commas, semicolons, tabs or spaces. A first row without any number
    is taken for the column names, whether or not it begins with numpy's ``#``; columns without
    names are called ``0, 1, ...``.

    Args:
        path: An existing file.

    Returns:
        The table; its notes say which rows repeat and which columns are quantised.

    Raises:
        ValueError: If the file does not hold a table of finite numbers; the message names the
            place and the remedy.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "table.csv"
        >>> _ = path.write_text("a;b" + chr(10) + "1;2" + chr(10) + "3;4")
        >>> read_table(path).columns
        ('a', 'b')
    """
    if path.suffix.lower() == ".npy":
        values = read_array(path)
        columns = tuple(str(index) for index in range(values.shape[1]))
        refuse_nonfinite(path, columns, values)
    elif path.suffix.lower() in TEXT_SUFFIXES:
        rows = read_text(path)
        columns, values = to_numbers(path, rows)
        refuse_nonfinite(path, columns, values, rows)
    else:
        raise ValueError(f"{path}: file type {path.suffix!r} is unknown; save it as .npy or .csv")
    notes = (*_repeat_notes(values), *quantised_notes(columns, values))
    return Table(path.stem, columns, values, str(path), notes)


def read_text(file: Path | SourceFile, comment: str | None = None) -> list[TextRow]:
    """Split a delimited text file into cells.

    Args:
        file: An existing file, or what was in it.
        comment: Skip the lines that begin with this.

    Returns:
        The rows that are not blank.

    Raises:
        ValueError: If no row is left, or the file is not text.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "table.txt"
        >>> _ = path.write_text("1 2" + chr(10) + "3 4")
        >>> read_text(path)[1]
        TextRow(number=2, cells=['3', '4'])
    """
    path, content = (
        (file, file.read_bytes()) if isinstance(file, Path) else (file.path, file.content)
    )
    text = content.decode("utf-8-sig", errors="replace")
    if "\0" in text:
        raise ValueError(f"{path} is not UTF-8 text: save it as .csv in UTF-8, or as .npy")
    kept = [
        (number, line)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not (comment and line.startswith(comment))
    ]
    if not kept:
        raise ValueError(f"{path} is empty: give a file with at least ten rows of numbers")
    separator = _separator(kept[0][1])
    try:
        return [TextRow(number, _cells(line, separator)) for number, line in kept]
    except csv.Error as error:
        raise ValueError(f"{path} is not a table of numbers ({one_line(error)})") from error


def to_numbers(path: Place, rows: list[TextRow]) -> tuple[tuple[str, ...], npt.NDArray[np.float64]]:
    """Parse the cells of a text table.

    Args:
        path: The file, for the messages.
        rows: Its rows, the first of which may hold the column names.

    Returns:
        The column names, and the numbers [rows, columns].

    Raises:
        ValueError: If a row has another length than the first, or a cell is not a number.

    Example:
        >>> to_numbers(Path("table.csv"), [TextRow(1, ["1", "2"])])
        (('0', '1'), array([[1., 2.]]))
    """
    width = len(rows[0].cells)
    columns, rows = _split_header(rows)
    for row in rows:
        if len(row.cells) != width:
            raise ValueError(
                f"{path}, line {row.number}: {len(row.cells)} cells where the first row has"
                f" {width}; give every row the same number"
            )
    try:
        values = np.array([[_number(cell) for cell in row.cells] for row in rows])
    except ValueError:
        raise ValueError(_first_bad_cell(path, columns, rows)) from None
    return columns, values.reshape(len(rows), width)


def refuse_nonfinite(
    path: Place,
    columns: tuple[str, ...],
    values: npt.NDArray[np.float64],
    rows: Sequence[TextRow] | None = None,
) -> None:
    """Refuse NaN, infinite and absurdly large values.

    Args:
        path: The file, for the message.
        columns: One name per column.
        values: The numbers [rows, columns].
        rows: The rows of a text file, the last of which hold the numbers; ``None`` for an array.

    Raises:
        ValueError: Naming the place of the first, each column that holds some, and how many.

    Example:
        >>> refuse_nonfinite(Path("table.npy"), ("a", "b"), np.array([[1.0, np.nan]]))
        Traceback (most recent call last):
        ValueError: table.npy, row 0 (from 0), column b: nan; NaN, infinite or beyond 1e+100: ...
    """
    is_bad = ~(np.abs(values) <= _LARGEST)
    bad = [
        f"{count} in column {name} (index {index})"
        for index, (name, count) in enumerate(zip(columns, is_bad.sum(axis=0), strict=True))
        if count
    ]
    if bad:
        row, column = np.argwhere(is_bad)[0]
        number = f"row {row} (from 0)" if rows is None else f"line {rows[row - len(values)].number}"
        raise ValueError(
            f"{path}, {number}, column {columns[column]}: {values[row, column]:g}; NaN, infinite or"
            f" beyond {_LARGEST:g}: {', '.join(bad)}; remove or fill those rows"
        )


def quantised_notes(columns: tuple[str, ...], values: npt.NDArray[np.float64]) -> tuple[str, ...]:
    """Name the columns with few distinct values, where a density has no upper bound.

    Args:
        columns: One name per column.
        values: The numbers [rows, columns].

    Returns:
        A sentence for each such column.

    Example:
        >>> quantised_notes(("a",), np.repeat([[0.0], [1.0]], 50, axis=0))
        ('column a has only 2 distinct values: its density is unbounded; add noise to it',)
    """
    counts = [len(np.unique(column)) for column in values.T]
    return tuple(
        f"column {name} has only {count} distinct values: its density is unbounded; add noise to it"
        for name, count in zip(columns, counts, strict=True)
        if count < _FEW_VALUES * len(values)
    )


def read_array(path: Path) -> npt.NDArray[np.float64]:
    """Read the numbers of a ``.npy`` file.

    Args:
        path: An existing file.

    Returns:
        The numbers [rows, columns], finite or not.

    Raises:
        ValueError: If the file holds anything else.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "table.npy"
        >>> np.save(path, [[1, 2]])
        >>> read_array(path)
        array([[1., 2.]])
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:
        raise ValueError(
            f"{path} is empty, damaged or of object dtype ({one_line(error)}); save a plain numeric"
            " array"
        ) from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path} has dtype {array.dtype}: save an array of real numbers")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{path} has shape {array.shape} and must have (rows, columns);"
            " for one column use array.reshape(-1, 1)"
        )
    return np.array(array, dtype=np.float64)


def _separator(line: str) -> str | None:
    return next((separator for separator in ";,\t" if separator in line), None)


def _cells(line: str, separator: str | None) -> list[str]:
    line = line.lstrip("#")
    cells = line.split() if separator is None else next(csv.reader([line], delimiter=separator))
    return [cell.strip() for cell in cells]


def _number(cell: str) -> float:
    """Read a number as tables have it, not as Python has it: 1_000 is none."""
    if "_" in cell:
        raise ValueError(cell)
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        _number(cell)
    except ValueError:
        return False
    return True


def _split_header(rows: list[TextRow]) -> tuple[tuple[str, ...], list[TextRow]]:
    first = rows[0].cells
    if any(_is_number(cell) for cell in first):
        return tuple(str(index) for index in range(len(first))), rows
    return tuple(map(one_line, first)), rows[1:]


def _first_bad_cell(path: Place, columns: tuple[str, ...], rows: list[TextRow]) -> str:
    row, index = next(
        (row, index) for row in rows for index, cell in enumerate(row.cells) if not _is_number(cell)
    )
    cell = row.cells[index]
    is_missing = cell.lower() in _MISSING
    return (
        f"{path}, line {row.number}, column {columns[index]} (index {index}):"
        f" '{one_line(cell)}' is not a number; "
        + (
            "fill it, or remove its row"
            if is_missing
            else "keep numeric columns, with a decimal point"
        )
    )


def _repeat_notes(values: npt.NDArray[np.float64]) -> tuple[str, ...]:
    count = len(values) - len(np.unique(values, axis=0))
    return (f"{count} rows repeat an earlier row: splits may share them",) if count else ()
