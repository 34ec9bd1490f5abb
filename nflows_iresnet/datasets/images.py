"""Sets of labelled images as the integers that they are, split and ready for dequantisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from nflows_iresnet.datasets.dataset import split_sizes
from nflows_iresnet.datasets.imagesets import (
    CIFAR10,
    CIFAR100,
    FASHION_MNIST,
    MNIST,
    LabelledImages,
    read_digit_images,
)
from nflows_iresnet.datasets.sources import Folder

Nats = TypeVar("Nats", float, Tensor)

_DESCRIPTIONS = {
    "digits": "1797 images 1x8x8 of 17 levels: handwritten digits (needs scikit-learn)",
    "mnist": "70000 images 1x28x28: handwritten digits (needs a data folder)",
    "fashion-mnist": "70000 images 1x28x28: clothes (Debian package dataset-fashion-mnist)",
    "cifar10": "60000 images 3x32x32 of ten kinds (needs a data folder)",
    "cifar100": "60000 images 3x32x32 of a hundred kinds (needs a data folder)",
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
        name: What it was loaded as.
        train: Training images [N, C, H, W], uint8.
        validation: Validation images [N, C, H, W], uint8.
        test: Test images [N, C, H, W], uint8.
        train_labels: Classes of the training images [N], int64.
        validation_labels: Classes of the validation images [N], int64.
        test_labels: Classes of the test images [N], int64.
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
        """Negative log-likelihood of a dequantised image in bits per dimension.

        Args:
            nats: In the units of the data, where a level has width 1: a number or a tensor.

        Returns:
            ``nats / (features log 2)``.
        """
        return nats / (self.features * torch.tensor(2.0).log().item())


def available_images() -> dict[str, str]:
    """Every known set of images with a one-line description.

    Returns:
        Descriptions by name, for `load_images`.

    Example:
        >>> sorted(available_images())
        ['cifar10', 'cifar100', 'digits', 'fashion-mnist', 'mnist']
    """
    return dict(_DESCRIPTIONS)


_READERS: dict[str, Callable[[Folder | None], LabelledImages]] = {
    "digits": read_digit_images,
    "mnist": MNIST.read,
    "fashion-mnist": FASHION_MNIST.read,
    "cifar10": CIFAR10.read,
    "cifar100": CIFAR100.read,
}


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
    if name not in _READERS:
        raise ValueError(f"unknown set of images {name!r}: choose from {', '.join(_READERS)}")
    found = _READERS[name](data_dir)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(found.num_splittable, generator=generator)
    sizes = split_sizes(len(order), name)
    if found.num_test:
        sizes = [len(order) - sizes[1], sizes[1], 0]
    train, validation, rest = order.split(sizes)
    test = torch.cat([rest, torch.arange(len(order), len(order) + found.num_test)])
    train = train[: _checked_num_train(name, num_train, len(train))]
    parts = {"train": train, "validation": validation, "test": test}
    return ImageDataset(
        name=name,
        **{part: found.images[rows] for part, rows in parts.items()},
        **{f"{part}_labels": found.labels[rows] for part, rows in parts.items()},
        levels=found.levels,
        source=found.source,
        seed=seed,
        split=_describe(found, [len(rows) for rows in parts.values()], seed),
    )


def _checked_num_train(name: str, num_train: int | None, available: int) -> int:
    if num_train is None:
        return available
    if not 1 <= num_train <= available:
        raise ValueError(
            f"num_train={num_train}: {name} can give 1 to {available} training images; leave it"
            " out to take them all"
        )
    return num_train


def _describe(found: LabelledImages, sizes: list[int], seed: int) -> str:
    train, validation, test = sizes
    whole = f"the {found.num_splittable} {'training ' if found.num_test else ''}images"
    origin = "the published test images" if found.num_test else f"{test} of {whole}"
    return (
        f"{train} training and {validation} validation images of {whole} by torch.randperm with"
        f" seed {seed}; test: {origin}"
    )
