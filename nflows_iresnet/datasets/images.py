"""Sets of labelled images as the integers that they are, from the files that people have.

References:
    "The MNIST database of handwritten digits" (LeCun et al., 1998);
    "Learning multiple layers of features from tiny images" (Krizhevsky, 2009), for CIFAR.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nflows_iresnet.datasets.files import (
    Folder,
    Recorded,
    SourceFile,
    data_folder,
    find,
    one_line,
    read_file,
    read_members,
    read_pickle,
    to_array,
)
from nflows_iresnet.datasets.tables import Nats, read_digit_pixels, split_sizes

Bytes = npt.NDArray[np.uint8]
Part = tuple[Bytes, npt.NDArray[np.int64]]
"""Images [rows, C, H, W] and labels [rows]."""

_IDX_UNSIGNED_BYTE = 8


def parse_idx(file: SourceFile, dimensions: int) -> Bytes:
    """Parse the IDX format: two zero bytes, a type, the number of dimensions, sizes, values."""
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


def _parse_idx_pairs(files: Sequence[SourceFile]) -> list[Part]:
    images = [parse_idx(file, 3)[:, None] for file in files[::2]]
    labels = [parse_idx(file, 1).astype(np.int64) for file in files[1::2]]
    return list(zip(images, labels, strict=True))


def parse_cifar(file: SourceFile, labels_key: str) -> Part:
    """Parse a batch of CIFAR's python version."""
    batch = read_pickle(file)
    wanted = (b"data", labels_key.encode())
    if not isinstance(batch, dict) or not all(key in batch for key in wanted):
        raise ValueError(
            f"{file.path} is not a CIFAR batch: it must hold a dictionary with 'data' and"
            f" {labels_key!r}; get the 'python version' of the data set"
        )
    try:
        data, labels = (_array(batch[key]) for key in wanted)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{file.path} is not a CIFAR batch: {one_line(error)}; get it again"
        ) from error
    well_formed = data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    if not well_formed or labels.shape != data.shape[:1]:
        raise ValueError(
            f"{file.path} is not a CIFAR batch: 'data' must be uint8 of shape (rows, 3072) with as"
            f" many labels, found {data.shape} and {labels.shape}"
        )
    return data.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _array(value: object) -> npt.NDArray[Any]:
    if isinstance(value, Recorded):
        return to_array(value)
    return np.asarray(value, dtype=np.int64)


def _parse_cifar_batches(files: Sequence[SourceFile], labels_key: str) -> list[Part]:
    *training, test = (parse_cifar(file, labels_key) for file in files)
    images, labels = (np.concatenate(parts) for parts in zip(*training, strict=True))
    return [(images, labels), test]


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """All images [N, C, H, W] uint8 and labels [N] of a set, the published test images last.

    ``num_test`` is how many of them those are, zero if the set has no published test split.
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    levels: int
    num_test: int
    source: str

    @property
    def num_splittable(self) -> int:
        """How many images are not published as test images."""
        return len(self.images) - self.num_test


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """A set of images: its name, what `available_images` says of it, and where its files are.

    Its ``folders`` are subfolders of the data folder, ``system_folders`` those of an operating
    system's package. Its ``files`` lie in one of them, or in its ``archive`` below the first of its
    folders; ``sha256`` are their published hashes, decompressed, where they are known. ``parse``
    makes training and test images of them.
    """

    name: str
    description: str
    files: tuple[str, ...]
    folders: tuple[str, ...]
    remedy: str
    parse: Callable[[Sequence[SourceFile]], list[Part]] = field(repr=False)
    archive: str | None = None
    system_folders: tuple[str, ...] = ()
    sha256: tuple[str, ...] = field(default=(), repr=False)

    def read(self, data_dir: Folder | None = None) -> LabelledImages:
        """Read all images; files that are absent, damaged or not the published are ValueErrors."""
        files = self._read_files(data_dir)
        for file, published in zip(files, self.sha256, strict=bool(self.sha256)):
            if file.sha256 != published:
                raise ValueError(
                    f"{file.path} is not the published file: its sha256 is {file.sha256}, expected"
                    f" {published}; get the file again"
                )
        parts = self.parse(files)
        for (images, labels), file in zip(parts, (files[0], files[-1]), strict=True):
            if len(images) != len(labels) or not len(images):
                raise ValueError(f"{file.path}: {len(images)} images and {len(labels)} labels")
        (train, train_labels), (test, test_labels) = parts
        if train.shape[1:] != test.shape[1:]:
            raise ValueError(
                f"{files[-1].path}: test images of shape {test.shape[1:]}, training images of"
                f" {train.shape[1:]}; they are not of one data set"
            )
        return LabelledImages(
            images=torch.from_numpy(np.concatenate([train, test])),
            labels=torch.from_numpy(np.concatenate([train_labels, test_labels])),
            levels=256,
            num_test=len(test),
            source="; ".join(f"{file.path} sha256 {file.sha256}" for file in files),
        )

    def _read_files(self, data_dir: Folder | None) -> list[SourceFile]:
        root = data_folder(data_dir)
        folders = [root / folder for folder in self.folders] if root else []
        if data_dir is None:
            folders += map(Path, self.system_folders)
        lie_open = any((folder / self.files[0]).is_file() for folder in folders)
        if root and self.archive and not lie_open and (root / self.archive).is_file():
            return read_members(
                root / self.archive, [f"{self.folders[0]}/{name}" for name in self.files]
            )
        wanted = {name: _other_names(name) for name in self.files}
        return [read_file(path) for path in find(self.name, wanted, folders, self.remedy)]


def _other_names(name: str) -> list[str]:
    dotted = name.replace("-idx", ".idx")
    return [name, f"{name}.gz", dotted, f"{dotted}.gz"]


def _idx_set(**about: Any) -> ImageFiles:
    """Return a set in four IDX files, as MNIST and those that copied its format."""
    files = ("images-idx3-ubyte", "labels-idx1-ubyte")
    names = tuple(f"{part}-{file}" for part in ("train", "t10k") for file in files)
    return ImageFiles(files=names, parse=_parse_idx_pairs, **about)


def _cifar_set(folder: str, archive: str, labels_key: str, **about: Any) -> ImageFiles:
    """Return a set of CIFAR's python version: a folder of pickles, or the archive of it."""
    return ImageFiles(
        folders=(folder, ""),
        archive=archive,
        remedy=f"get {archive}, the 'python version', which torchvision downloads too",
        parse=partial(_parse_cifar_batches, labels_key=labels_key),
        **about,
    )


@dataclass(frozen=True)
class EmbeddedDigits:
    """Scikit-learn's handwritten digits, which come with it: no folder is looked at."""

    name: str = "digits"
    description: str = "1797 images 1x8x8 of 17 levels: handwritten digits (needs scikit-learn)"

    def read(self, data_dir: Folder | None = None) -> LabelledImages:
        """Read the images; without scikit-learn that is an ImportError."""
        pixels, labels = read_digit_pixels()
        return LabelledImages(
            images=torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 8, 8),
            labels=torch.from_numpy(labels.astype(np.int64)),
            levels=17,
            num_test=0,
            source="sklearn.datasets.load_digits",
        )


MNIST = _idx_set(
    name="mnist",
    description="70000 images 1x28x28: handwritten digits (needs a data folder)",
    folders=("", "MNIST/raw", "mnist", "mnist/MNIST/raw"),
    remedy="get these four files (torchvision downloads them), compressed or not",
    sha256=(
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
)
FASHION_MNIST = _idx_set(
    name="fashion-mnist",
    description="70000 images 1x28x28: clothes (Debian package dataset-fashion-mnist)",
    folders=("", "FashionMNIST/raw", "fashion-mnist", "fashion-mnist/FashionMNIST/raw"),
    system_folders=("/usr/share/datasets/fashion-mnist",),
    remedy="install the Debian package dataset-fashion-mnist, or let torchvision download them",
    sha256=(
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)
CIFAR10 = _cifar_set(
    name="cifar10",
    description="60000 images 3x32x32 of ten kinds (needs a data folder)",
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    files=(*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
    labels_key="labels",
)
CIFAR100 = _cifar_set(
    name="cifar100",
    description="60000 images 3x32x32 of a hundred kinds (needs a data folder)",
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    files=("train", "test"),
    labels_key="fine_labels",
)

IMAGE_SETS: dict[str, ImageFiles | EmbeddedDigits] = {
    each.name: each for each in (EmbeddedDigits(), MNIST, FASHION_MNIST, CIFAR10, CIFAR100)
}


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageDataset:
    r"""Three disjoint splits of a set of images, as integers 0, ..., levels - 1.

    A density model sees x + u with u uniform on [0, 1) (`transforms.dequantize`), and the expected
    -log p(x + u) in nats bounds the code length of the integers from above, so that

    .. math:: \text{bits/dim} = -\log p(x + u) / (D \log 2).

    References:
        "A note on the evaluation of generative models" (Theis et al., 2016).

    Args:
        train, validation, test: Images of the splits [N, C, H, W], uint8.
        train_labels, validation_labels, test_labels: Their classes [N], int64.
        levels: How many values a pixel can take.
        source: The files with their sha256, decompressed.
        seed: Seed of the permutation that made the splits.
        split: How the splits were made.

    Example:
        >>> from nflows_iresnet import datasets
        >>> digits = datasets.load_images("digits")
        >>> digits.shape, digits.levels, len(digits.test)
        ((1, 8, 8), 17, 179)
        >>> digits.to_bits_per_dim(64 * 2.0)
        2.885...
    """

    name: str
    train: Tensor = field(repr=False)
    validation: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    validation_labels: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    levels: int
    source: str
    seed: int
    split: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    @property
    def features(self) -> int:
        """Number of values of an image."""
        return self.train[0].numel()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(torch.cat([self.train_labels, self.test_labels]).max()) + 1

    def to_bits_per_dim(self, nats: Nats) -> Nats:
        """Nats of a dequantised image, where a level has width 1, in bits per dimension."""
        return nats / (self.features * torch.tensor(2.0).log().item())


def available_images() -> dict[str, str]:
    """Every known set of images by name, for `load_images`, with a one-line description.

    Example:
        >>> sorted(available_images())
        ['cifar10', 'cifar100', 'digits', 'fashion-mnist', 'mnist']
    """
    return {each.name: each.description for each in IMAGE_SETS.values()}


def load_images(
    name: str,
    data_dir: Folder | None = None,
    seed: int = 0,
    num_train: int | None = None,
) -> ImageDataset:
    """Load a set of images from the files that people have.

    A folder may hold torchvision's layout (``MNIST/raw``, ``FashionMNIST/raw``,
    ``cifar-10-batches-py``), the files themselves, compressed or not, or CIFAR's archive. Where the
    published hashes are known they are checked, and pickles are read without running code.

    The test split is the published one, and a tenth of the training images is for validation;
    digits, which have no published split, are split 80/10/10.

    Args:
        name: A key of `available_images`.
        data_dir: Folder of the files; ``None`` takes the environment variable
            ``NFLOWS_IRESNET_DATA``, then the place where Debian puts Fashion-MNIST.
        seed: Seed of the permutation behind the splits.
        num_train: Keep this many training images; ``None`` keeps all.

    Returns:
        The data set.

    Raises:
        ValueError: If the name is unknown, or the files are absent or not the published ones; the
            message says which files are wanted, where they were looked for and where to get them.
        ImportError: If ``digits`` is asked for without scikit-learn.

    Example:
        >>> load_images("digits", num_train=100).train.shape
        torch.Size([100, 1, 8, 8])
        >>> load_images("mnist", data_dir="/nowhere")
        Traceback (most recent call last):
        ValueError: mnist: no train-images-idx3-ubyte, ... in /nowhere...
    """
    if name not in IMAGE_SETS:
        raise ValueError(f"unknown set of images {name!r}: choose from {', '.join(IMAGE_SETS)}")
    with torch.device("cpu"):
        return _split(name, IMAGE_SETS[name].read(data_dir), seed, num_train)


def _split(name: str, found: LabelledImages, seed: int, num_train: int | None) -> ImageDataset:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(found.num_splittable, generator=generator)
    sizes = split_sizes(len(order), name)
    if found.num_test:
        sizes = [len(order) - sizes[1], sizes[1], 0]
    train, validation, rest = order.split(sizes)
    test = torch.cat([rest, torch.arange(len(order), len(order) + found.num_test)])
    if num_train is not None and not 1 <= num_train <= len(train):
        raise ValueError(
            f"num_train={num_train}: {name} can give 1 to {len(train)} training images; leave it"
            " out to take them all"
        )
    parts = {"train": train[:num_train], "validation": validation, "test": test}
    return ImageDataset(
        name=name,
        **{part: found.images[rows] for part, rows in parts.items()},
        **{f"{part}_labels": found.labels[rows] for part, rows in parts.items()},
        levels=found.levels,
        source=found.source,
        seed=seed,
        split=_describe(found, [len(rows) for rows in parts.values()], seed),
    )


def _describe(found: LabelledImages, sizes: list[int], seed: int) -> str:
    train, validation, test = sizes
    whole = f"the {found.num_splittable} {'training ' if found.num_test else ''}images"
    origin = "the published test images" if found.num_test else f"{test} of {whole}"
    return (
        f"{train} training and {validation} validation images of {whole} by torch.randperm with"
        f" seed {seed}; test: {origin}"
    )
