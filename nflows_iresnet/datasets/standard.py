"""The five tables by which density estimators are compared, as their archive and papers have them.

POWER, GAS, HEPMASS, MINIBOONE and BSDS300 are read from the folders of the archive that came with
masked autoregressive flows, and treated as there: the same columns, noise, order, splits and units,
so that a test likelihood compares with the published ones. No seed changes that.

References:
    "Masked autoregressive flow for density estimation" (Papamakarios et al., 2017), appendix D;
    the archive is https://zenodo.org/record/1161203.
"""

from __future__ import annotations

import csv
import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nflows_iresnet.datasets.dataset import Dataset, licence_notes, split_sizes
from nflows_iresnet.datasets.files import one_line, read_file
from nflows_iresnet.datasets.pickles import read_frame
from nflows_iresnet.datasets.sources import DATA_VARIABLE, UCI, Folder, data_folder
from nflows_iresnet.datasets.tables import read_array, refuse_nonfinite

FloatArray = npt.NDArray[np.float64]
Rows = npt.NDArray[Any]

COMPARABLE = "test NLL compares with what papers report"
"""The note of a data set whose rows and units are the published ones."""

_ARCHIVE = "data.tar.gz of https://zenodo.org/record/1161203"
_SEED_OF_POWER = 42
_LARGEST_CORRELATION = 0.98
_MOST_REPEATS = 5


@dataclass(frozen=True, eq=False)
class Splits:
    """Training, validation and test rows in source units, and the units of the model.

    Args:
        parts: The three splits [rows, features].
        columns: One name per feature.
        location: What is subtracted [features].
        scale: By what is then divided [features].
    """

    parts: tuple[Rows, Rows, Rows]
    columns: tuple[str, ...]
    location: FloatArray
    scale: FloatArray


@dataclass(frozen=True)
class StandardTable:
    """One of the five tables.

    Args:
        name: The data set.
        files: The files that are needed; each may have other names, the best first.
        read: Reads the files that were found.
        shape: Published rows of the three splits, and features.
        origin: Where the rows come from.
        licence: On what terms they may be used.

    Example:
        >>> STANDARD["power"].shape
        (1659917, 184435, 204928, 6)
    """

    name: str
    files: tuple[tuple[str, ...], ...]
    read: Callable[[Sequence[Path]], Splits] = field(repr=False)
    shape: tuple[int, int, int, int]
    origin: str
    licence: str

    def load(
        self, data_dir: Folder | None = None, *, seed: int = 0, num_samples: int | None = None
    ) -> Dataset:
        """Read the files and make the splits.

        Args:
            data_dir: Folder into which the archive was unpacked, or its folder ``data``;
                ``None`` takes the environment variable ``NFLOWS_IRESNET_DATA``.
            seed: Recorded, without effect: noise, order and splits are the published ones.
            num_samples: Keep this many rows, 80/10/10, from the front of each split.

        Returns:
            The data set in the published units.

        Raises:
            ValueError: If the files are absent or not as expected.
            ImportError: If ``bsds300`` is asked for without h5py.

        Example:
            >>> STANDARD["gas"].load("/nowhere")
            Traceback (most recent call last):
            ValueError: gas: no gas/ethylene_CO.pickle in /nowhere or /nowhere/data; ...
        """
        paths = self._find(data_dir)
        splits = self.read(paths)
        kept = _first(self.name, splits.parts, num_samples)
        shape = (*(len(part) for part in kept), len(splits.columns))
        train, validation, test = (
            _standardised(part, splits.location, splits.scale) for part in kept
        )
        return Dataset(
            name=self.name,
            train=train,
            validation=validation,
            test=test,
            density=None,
            source=", ".join(map(str, paths)),
            seed=seed,
            columns=splits.columns,
            location=torch.from_numpy(splits.location),
            scale=torch.from_numpy(splits.scale),
            notes=(*self._notes(shape), *licence_notes(self.licence)),
            licence=self.licence,
        )

    def _notes(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        published = "splits and units of Papamakarios et al., 2017; the seed does not change them"
        found, wanted = ("{} + {} + {} rows of {} features".format(*s) for s in (shape, self.shape))
        other = f"{found} where papers have {wanted}: do not compare with what they report"
        return f"{self.origin}; {published}", COMPARABLE if shape == self.shape else other

    def _find(self, data_dir: Folder | None) -> list[Path]:
        named = data_folder(data_dir)
        if named is None:
            raise ValueError(
                f"{self.name} needs files that no package carries: get {_ARCHIVE}, unpack it, and"
                " name its folder by --data-dir (data_dir) or in the environment variable"
                f" {DATA_VARIABLE}"
            )
        root = Path(named).expanduser()
        return [self._find_one(names, [root, root / "data"]) for names in self.files]

    def _find_one(self, names: Sequence[str], roots: Sequence[Path]) -> Path:
        for path in (root / name for root in roots for name in names):
            if path.is_file():
                return path
        raise ValueError(
            f"{self.name}: no {names[-1]} in {' or '.join(map(str, roots))}; get {_ARCHIVE} and"
            " name the folder that it unpacks to"
        )


def read_power(paths: Sequence[Path]) -> Splits:
    """Electricity of one household, a row per minute: six of eight columns, with noise.

    Reactive power and current are dropped. The others get uniform noise as wide as their steps,
    0.001 kW, 0.01 V and 1 Wh, except the time of day, which gets none. Rows are shuffled before.
    Test rows are the last tenth, validation rows the last tenth of the rest, and mean and deviation
    those of training and validation rows together.

    References:
        "Individual household electric power consumption", UCI Machine Learning Repository
        (Hebrail and Berard, 2006).

    Args:
        paths: ``power/data.npy``.

    Returns:
        The splits.

    Raises:
        ValueError: If the file does not hold eight columns of finite numbers.
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

    Args:
        paths: ``gas/ethylene_CO.pickle``, a data frame that is read without running its code, or
            the same as ``.csv``.

    Returns:
        The splits.

    Raises:
        ValueError: If the file does not hold such a data frame of finite numbers.
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
    _refuse_constant(path, [names[index] for index in sensors], rows[:, sensors])
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

    Args:
        paths: ``hepmass/1000_train.csv`` and ``hepmass/1000_test.csv``.

    Returns:
        The splits.

    Raises:
        ValueError: If a file does not hold a table of finite numbers, or the test file has fewer
            columns.
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
    kept = [index for index, column in enumerate(train.T) if not _reoccurs(column)]
    train, test = train[:, kept], test[:, kept]
    columns = tuple(names[1:][index] for index in kept)
    if not columns:
        raise ValueError(f"{paths[0]}: every column is discrete; give the file of the archive")
    _refuse_constant(paths[0], columns, train)
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

    Args:
        paths: ``miniboone/data.npy``.

    Returns:
        The splits.

    Raises:
        ValueError: If the file does not hold 43 columns of finite numbers.
    """
    rows = _array(paths[0], 43)
    return _by_both(paths[0], _tenths(paths[0], rows), _numbered(43))


def read_bsds300(paths: Sequence[Path]) -> Splits:
    """Patches of 8 x 8 pixels of natural photographs without their mean and last pixel: 63 columns.

    Splits and units are those of the file.

    References:
        "A database of human segmented natural images" (Martin et al., 2001).

    Args:
        paths: ``BSDS300/BSDS300.hdf5``.

    Returns:
        The splits.

    Raises:
        ValueError: If the file does not hold three tables of 63 columns.
        ImportError: If h5py is missing.
    """
    train, validation, test = (_hdf5(paths[0], key, 63) for key in ("train", "validation", "test"))
    return Splits((train, validation, test), _numbered(63), np.zeros(63), np.ones(63))


STANDARD: dict[str, StandardTable] = {
    table.name: table
    for table in (
        StandardTable(
            name="power",
            files=(("power/data.npy",),),
            read=read_power,
            shape=(1_659_917, 184_435, 204_928, 6),
            origin="electricity of one household per minute, with noise",
            licence=UCI,
        ),
        StandardTable(
            name="gas",
            files=(("gas/ethylene_CO.csv", "gas/ethylene_CO.pickle"),),
            read=read_gas,
            shape=(852_174, 94_685, 105_206, 8),
            origin="gas sensors that correlate by less than 0.98",
            licence=UCI,
        ),
        StandardTable(
            name="hepmass",
            files=(("hepmass/1000_train.csv",), ("hepmass/1000_test.csv",)),
            read=read_hepmass,
            shape=(315_123, 35_013, 174_987, 21),
            origin="simulated collisions of class 1, continuous columns",
            licence=UCI,
        ),
        StandardTable(
            name="miniboone",
            files=(("miniboone/data.npy",),),
            read=read_miniboone,
            shape=(29_556, 3_284, 3_648, 43),
            origin="neutrino events of MiniBooNE, continuous columns",
            licence=UCI,
        ),
        StandardTable(
            name="bsds300",
            files=(("bsds300/bsds300.hdf5", "BSDS300/BSDS300.hdf5"),),
            read=read_bsds300,
            shape=(1_000_000, 50_000, 250_000, 63),
            origin="8 x 8 patches of natural photographs",
            licence="non-commercial research and education (Berkeley)",
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


def _standardised(rows: Rows, location: FloatArray, scale: FloatArray) -> Tensor:
    return torch.from_numpy(((rows - location) / scale).astype(np.float32))


def _array(path: Path, width: int) -> FloatArray:
    rows = read_array(path)
    if rows.shape[1] != width:
        raise ValueError(
            f"{path} has {rows.shape[1]} columns, expected {width}: give the file of the archive"
        )
    refuse_nonfinite(path, _numbered(width), rows)
    return rows


def _numbered(width: int) -> tuple[str, ...]:
    return tuple(map(str, range(width)))


def _without_tenth(path: Path, rows: FloatArray) -> tuple[FloatArray, FloatArray]:
    size = int(0.1 * len(rows))
    if size < 1:
        raise ValueError(f"{path} gives {len(rows)} rows: too few for a tenth of them")
    return rows[:-size], rows[-size:]


def _tenths(path: Path, rows: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    rest, test = _without_tenth(path, rows)
    return (*_without_tenth(path, rest), test)


def _by_both(
    path: Path, parts: tuple[FloatArray, FloatArray, FloatArray], columns: tuple[str, ...]
) -> Splits:
    """Standardise by training and validation rows together."""
    both = np.concatenate(parts[:2])
    _refuse_constant(path, columns, both)
    return Splits(parts, columns, both.mean(axis=0), both.std(axis=0))


def _uncorrelated(rows: FloatArray) -> list[int]:
    close = np.atleast_2d(np.corrcoef(rows.T)) > _LARGEST_CORRELATION
    kept = list(range(rows.shape[1]))
    while (crowded := close[np.ix_(kept, kept)].sum(axis=1) > 1).any():
        del kept[int(crowded.argmax())]
    return kept


def _reoccurs(column: FloatArray) -> bool:
    return int((column == column.min()).sum()) > _MOST_REPEATS


def _refuse_constant(path: Path, columns: Sequence[str], rows: FloatArray) -> None:
    constant = [n for n, column in zip(columns, rows.T, strict=True) if np.ptp(column) == 0]
    if constant:
        raise ValueError(
            f"{path}: constant, so without a density: column {', '.join(constant)}; give the file"
            " of the archive"
        )


def _read_csv(path: Path, width: int | None = None) -> tuple[tuple[str, ...], FloatArray]:
    """Read a large table with a header; of `width` columns, if the header names more than that."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            header = tuple(one_line(name) for name in next(csv.reader([file.readline()]), []))
            used = range(len(header) if width is None else width)
            rows = np.loadtxt(file, delimiter=",", usecols=used, comments=None, ndmin=2)
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} is not a table of numbers below one line of names ({one_line(error)}); give"
            " the file of the archive"
        ) from error
    if not header or not len(rows):
        raise ValueError(f"{path} holds no row below one line of names: give the archive's")
    return header, rows


def _hdf5(path: Path, key: str, width: int) -> Rows:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise ImportError("bsds300 is an HDF5 file, which needs h5py: pip install h5py") from error
    try:
        with h5py.File(path, "r") as file:
            rows = np.asarray(file[key])
    except Exception as error:
        raise ValueError(
            f"{path} is not an HDF5 file with a table {key!r} ({one_line(error)}); give that of the"
            " archive"
        ) from error
    if rows.dtype.kind != "f" or rows.ndim != 2 or rows.shape[1] != width or not len(rows):
        raise ValueError(
            f"{path}, {key}: {rows.dtype} of shape {rows.shape}, expected floating-point numbers of"
            f" shape (rows, {width}); give the file of the archive"
        )
    if not np.isfinite(rows).all():
        raise ValueError(f"{path}, {key}: NaN or infinite values; give the file of the archive")
    return rows
