"""Where each set of images is, and how its files become one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nflows_iresnet.datasets.files import SourceFile, read_file, read_members
from nflows_iresnet.datasets.imagefiles import parse_cifar, parse_idx
from nflows_iresnet.datasets.sources import DATA_VARIABLE, Folder, data_folder, read_digit_pixels


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """All images of a set, the published test images last.

    Args:
        images: [N, C, H, W], uint8.
        labels: [N], int64.
        levels: How many values a pixel can take.
        num_test: How many of the last images are the published test split, zero if there is none.
        source: The files with their hashes.
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


@dataclass(frozen=True)
class IdxSet:
    """A set in four IDX files, as MNIST and those that copied its format.

    Args:
        name: The data set.
        folders: Subfolders of the data folder in which the files may be.
        system_folders: Where an operating system's package puts them.
        remedy: Where to get them.
        sha256: Published hashes of the decompressed files, by name.
    """

    name: str
    folders: tuple[str, ...]
    remedy: str
    system_folders: tuple[str, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict, repr=False)

    def read(self, data_dir: Folder | None = None) -> LabelledImages:
        """Read the four files.

        Raises:
            ValueError: If they are absent, damaged or not the published ones.
        """
        roots = _roots(data_dir)
        folders = [root / folder for root in roots for folder in ("", *self.folders)]
        if data_dir is None:
            folders += map(Path, self.system_folders)
        paths = _find_together(self.name, folders, _IDX_FILES, self.remedy)
        files = [read_file(path) for path in paths]
        for name, file in zip(_IDX_FILES, files, strict=True):
            file.check(self.sha256.get(name))
        images = [parse_idx(files[index], 3) for index in (0, 2)]
        labels = [parse_idx(files[index], 1) for index in (1, 3)]
        return _joined(images, labels, files)


_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class CifarSet:
    """CIFAR's python version: a folder of pickles, or the archive of it.

    Args:
        name: The data set.
        folder: The folder that the archive unpacks to.
        archive: The archive.
        batches: The files, the test images last.
        labels_key: Where the pickles keep the labels.
    """

    name: str
    folder: str
    archive: str
    batches: tuple[str, ...]
    labels_key: str

    def read(self, data_dir: Folder | None = None) -> LabelledImages:
        """Read the files of the folder or the archive.

        Raises:
            ValueError: If they are absent or damaged.
        """
        files = self._files(data_dir)
        parts = [parse_cifar(file, self.labels_key) for file in files]
        images, labels = zip(*parts, strict=True)
        return _joined(
            [np.concatenate(images[:-1]), images[-1]],
            [np.concatenate(labels[:-1]), labels[-1]],
            files,
        )

    def _files(self, data_dir: Folder | None) -> list[SourceFile]:
        roots = _roots(data_dir)
        archives = [root / self.archive for root in roots if (root / self.archive).is_file()]
        folders = [root / folder for root in roots for folder in (self.folder, "")]
        if archives and not any((folder / self.batches[0]).is_file() for folder in folders):
            return read_members(archives[0], [f"{self.folder}/{name}" for name in self.batches])
        remedy = f"get {self.archive}, the 'python version', which torchvision downloads too"
        return [read_file(p) for p in _find_together(self.name, folders, self.batches, remedy)]


MNIST = IdxSet(
    name="mnist",
    folders=("MNIST/raw", "mnist", "mnist/MNIST/raw"),
    remedy="get the four IDX files of the data set, compressed or not; torchvision downloads them",
    sha256=dict(
        zip(
            _IDX_FILES,
            (
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
            strict=True,
        )
    ),
)
FASHION_MNIST = IdxSet(
    name="fashion-mnist",
    folders=("FashionMNIST/raw", "fashion-mnist", "fashion-mnist/FashionMNIST/raw"),
    system_folders=("/usr/share/datasets/fashion-mnist",),
    remedy="install the Debian package dataset-fashion-mnist, or let torchvision download them",
    sha256=dict(
        zip(
            _IDX_FILES,
            (
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            ),
            strict=True,
        )
    ),
)
CIFAR10 = CifarSet(
    name="cifar10",
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    batches=(*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
    labels_key="labels",
)
CIFAR100 = CifarSet(
    name="cifar100",
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    batches=("train", "test"),
    labels_key="fine_labels",
)


def read_digit_images(data_dir: Folder | None = None) -> LabelledImages:
    """Scikit-learn's 1797 handwritten digits; they are embedded, so `data_dir` is not looked at.

    Raises:
        ImportError: If scikit-learn is missing.

    Example:
        >>> read_digit_images().images.shape
        torch.Size([1797, 1, 8, 8])
    """
    pixels, labels = read_digit_pixels()
    return LabelledImages(
        images=torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 8, 8),
        labels=torch.from_numpy(labels.astype(np.int64)),
        levels=17,
        num_test=0,
        source="sklearn.datasets.load_digits",
    )


def _roots(data_dir: Folder | None) -> list[Path]:
    chosen = data_folder(data_dir)
    return [Path(chosen).expanduser()] if chosen else []


def _find_together(
    name: str, folders: Sequence[Path], files: Sequence[str], remedy: str
) -> list[Path]:
    """Return all files, from the first folder that holds every one of them."""
    for folder in folders:
        found = [_existing(folder, file) for file in files]
        if all(found):
            return [path for path in found if path is not None]
    looked = " or ".join(map(str, folders)) or "any folder, for none was named"
    raise ValueError(
        f"{name}: no {', '.join(files)} in {looked}; {remedy}, then name their folder with"
        f" data_dir (--data-dir) or in the environment variable {DATA_VARIABLE}"
    )


def _existing(folder: Path, name: str) -> Path | None:
    dotted = name.replace("-idx", ".idx")
    names = (name, f"{name}.gz", dotted, f"{dotted}.gz")
    return next((folder / each for each in names if (folder / each).is_file()), None)


def _joined(
    images: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]],
    labels: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.int64 | np.uint8]]],
    files: Sequence[SourceFile],
) -> LabelledImages:
    """Join training and test images, and add the channel where there is none."""
    for part, classes, file in zip(images, labels, (files[0], files[-1]), strict=True):
        if len(part) != len(classes) or not len(part):
            raise ValueError(f"{file.path}: {len(part)} images and {len(classes)} labels")
    if images[0].shape[1:] != images[1].shape[1:]:
        raise ValueError(
            f"{files[-1].path}: test images of shape {images[1].shape[1:]}, training images of"
            f" {images[0].shape[1:]}; they are not of one data set"
        )
    joined = torch.from_numpy(np.concatenate(images))
    return LabelledImages(
        images=joined if joined.dim() == 4 else joined[:, None],
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        levels=256,
        num_test=len(images[1]),
        source="; ".join(f"{file.path} sha256 {file.sha256}" for file in files),
    )
