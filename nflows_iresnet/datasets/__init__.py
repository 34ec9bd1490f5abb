"""Toy densities with exact log-probabilities, tabular data and images, ready to train on.

To add a data set, add one entry: a density to ``densities.DESCRIBED``; a file of the data folder to
``_ENTRIES`` here, by ``_file``; a table to ``tables.PACKAGED`` if a package carries it, and to
``tables.STANDARD`` if its splits are published; images to ``images.IMAGE_SETS``.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator

from nflows_iresnet.datasets.densities import (
    DESCRIBED,
    Checkerboard,
    Circles,
    Density,
    EightGaussians,
    Moons,
    Pinwheel,
    TwoSpirals,
)
from nflows_iresnet.datasets.files import Folder, Names, data_folder, find
from nflows_iresnet.datasets.images import ImageDataset, available_images, load_images
from nflows_iresnet.datasets.tables import (
    FILE_TYPES,
    PACKAGED,
    STANDARD,
    Dataset,
    Table,
    from_table,
    read_digits,
    read_table,
    split_sizes,
    standardised,
)

__all__ = [
    "TOYS",
    "Checkerboard",
    "Circles",
    "Dataset",
    "Density",
    "EightGaussians",
    "ImageDataset",
    "Moons",
    "Pinwheel",
    "TwoSpirals",
    "available",
    "available_images",
    "load",
    "load_images",
    "make",
]

Loader = Callable[[Folder | None, int, int | None], Dataset]
"""Folder of the data, seed and number of rows, ``None`` where not given, to the data set."""

_TOY_SAMPLES = 20_000


@dataclass(frozen=True)
class Entry:
    """What a data set is called, what `available` says of it, and how it is loaded."""

    name: str
    description: str
    load: Loader
    density: Density | None = None


def _toy(name: str, description: str, density: Density) -> Entry:
    def load(data_dir: Folder | None, seed: int, num_samples: int | None) -> Dataset:
        sizes = split_sizes(_TOY_SAMPLES if num_samples is None else num_samples, name)
        return _sampled(name, density, sizes, seed)

    return Entry(name, f"2-D toy, exact density: {description}", load, density)


def _table(name: str, description: str, read: Callable[[Folder | None, Generator], Table]) -> Entry:
    def load(data_dir: Folder | None, seed: int, num_samples: int | None) -> Dataset:
        generator = torch.Generator().manual_seed(seed)
        return from_table(read(data_dir, generator), generator, num_samples)

    return Entry(name, description, load)


def _file(
    name: str,
    description: str,
    filename: str,
    *,
    columns: Names | None = None,
    licence: str | None = None,
) -> Entry:
    """Return the entry of a file in the data folder, or in its subfolder with the set's name.

    Text without a header has ``columns`` for names; columns behind those are left out.
    """

    def read(data_dir: Folder | None, _: Generator) -> Table:
        root = data_folder(data_dir)
        folders = [root, root / name] if root else []
        (path,) = find(name, {filename: (filename,)}, folders)
        return replace(read_table(path, columns), name=name, licence=licence)

    return _table(name, f"{description} ({filename} in --data-dir)", read)


_ENTRIES = {
    entry.name: entry
    for entry in (
        *(_toy(name, about, density) for name, (about, density) in DESCRIBED.items()),
        _table(
            "digits",
            "1797 x 64: handwritten digits, dequantised (needs scikit-learn)",
            lambda _, generator: read_digits(generator),
        ),
        *(Entry(table.name, table.description, table.load) for table in PACKAGED),
        *(Entry(table.name, table.description, table.load) for table in STANDARD.values()),
    )
}

TOYS: dict[str, Density] = {
    entry.name: entry.density for entry in _ENTRIES.values() if entry.density is not None
}


def available() -> dict[str, str]:
    """Every known data set by name, for `load`, with a one-line description.

    Example:
        >>> available()["moons"]
        '2-D toy, exact density: two interleaved half circles'
    """
    return {entry.name: entry.description for entry in _ENTRIES.values()}


def make(
    name: str,
    *,
    num_train: int = 16_000,
    num_validation: int = 2_000,
    num_test: int = 2_000,
    seed: int = 0,
) -> Dataset:
    """Sample a toy density, one of the keys of ``TOYS``, three times over.

    Returns:
        Independent samples, not standardised, with their density.

    Raises:
        ValueError: If the name is unknown or a number is below one.

    Example:
        >>> dataset = make("8-gaussians", num_train=100, num_validation=10, num_test=10)
        >>> dataset.density.log_prob(dataset.test).shape
        torch.Size([10])
    """
    if name not in TOYS:
        raise ValueError(_unknown(name, list(TOYS)))
    sizes = (num_train, num_validation, num_test)
    if min(sizes) < 1:
        raise ValueError(f"num_train, num_validation and num_test must be at least 1, got {sizes}")
    with torch.device("cpu"):
        return _sampled(name, TOYS[name], sizes, seed)


def _sampled(name: str, density: Density, sizes: Sequence[int], seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.zeros(density.features, dtype=torch.float64)
    return standardised(
        [density.sample(size, generator) for size in sizes],
        location=zeros,
        scale=zeros + 1,
        name=name,
        density=density,
        source=repr(density),
        seed=seed,
        columns=tuple(f"x{index}" for index in range(1, density.features + 1)),
    )


def load(
    name_or_path: str | os.PathLike[str],
    *,
    data_dir: Folder | None = None,
    seed: int = 0,
    num_samples: int | None = None,
) -> Dataset:
    """Load a data set by name, or the numbers of a file by path.

    Names win over files: write ``./moons`` for a file of that name. Rows are on the CPU, whatever
    torch's default device. Everything random (samples, noise, the permutation behind the splits)
    comes from ``seed``.

    Args:
        name_or_path: A key of `available`, or a ``.npy`` or delimited text file, compressed
            (``.csv.gz``) or not.
        data_dir: Folder that holds the files of ``casp``, ``magic`` or ``galaxies``, or the wheels
            of the packages that carry them, or into which the archive of ``power``, ``gas``,
            ``hepmass``, ``miniboone`` and ``bsds300`` was unpacked (module `tables`). ``None``
            takes the environment variable ``NFLOWS_IRESNET_DATA``, then the installed packages.
        seed: Seed of torch's generator; the five tables of the archive have splits of their own.
        num_samples: Rows of the three splits together, 80/10/10; ``None`` is every row, or 20000
            of a toy.

    Returns:
        The data set; only toys are not standardised.

    Raises:
        ValueError: If the name is unknown, or the data are absent or unfit; the message names the
            place and the remedy.
        ImportError: If ``digits`` is asked for without scikit-learn, or ``bsds300`` without h5py.

    Example:
        >>> load("moons", num_samples=1000).train.shape
        torch.Size([800, 2])
        >>> load("moon")
        Traceback (most recent call last):
        ValueError: unknown data set 'moon', did you mean 'moons'? Known: ...
    """
    name = os.fspath(name_or_path)
    with torch.device("cpu"):
        if name in _ENTRIES:
            return _ENTRIES[name].load(data_dir, seed, num_samples)
        generator = torch.Generator().manual_seed(seed)
        return from_table(read_table(_existing_file(name)), generator, num_samples)


def _existing_file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{name} is a folder: name one file in it ({FILE_TYPES})")
    if path.suffix or os.sep in name:
        raise ValueError(
            f"no file or data set {name} (looked for {path.absolute()}): give the path of a"
            f" {FILE_TYPES} file, or one of {', '.join(_ENTRIES)}"
        )
    raise ValueError(_unknown(name, list(_ENTRIES)) + f"; or a {FILE_TYPES} file")


def _unknown(name: str, known: list[str]) -> str:
    if name in available_images():
        return f"{name!r} is a set of images: use load_images"
    nearest = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else "."
    return f"unknown data set {name!r}{hint} Known: {', '.join(known)}"
