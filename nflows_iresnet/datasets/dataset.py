"""Rows that are split, standardised and ready to train on, with the way back to their units."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Generator, Tensor

from nflows_iresnet.datasets.density import Density
from nflows_iresnet.datasets.tables import Table

Nats = TypeVar("Nats", float, Tensor)

MIN_ROWS = 10


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    r"""Three disjoint splits of a data set in model units, and how to leave those units.

    A row :math:`x` of the source is stored as :math:`z = (x - \text{location}) / \text{scale}`, so

    .. math:: -\log p_x(x) = -\log p_z(z) + \sum_j \log \text{scale}_j

    and the last sum is ``log_scale``. Toy densities are not rescaled: there it is zero.

    Args:
        name: What it was loaded as.
        train: Training rows [num_train, features], float32.
        validation: Validation rows [num_validation, features], float32.
        test: Test rows [num_test, features], float32.
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
        """Undo the standardisation.

        Args:
            inputs: Rows in model units [..., features].

        Returns:
            Rows in the units of the source [..., features], float64.

        Example:
            >>> from nflows_iresnet import datasets
            >>> moons = datasets.load("moons", num_samples=20)
            >>> torch.equal(moons.to_original(moons.test), moons.test.double())
            True
        """
        return inputs.double() * self.scale.to(inputs.device) + self.location.to(inputs.device)

    def to_original_nats(self, nats: Nats) -> Nats:
        """Negative log-likelihood per row in the units of the source.

        Args:
            nats: Negative log-likelihood in model units: a number or a tensor of them.

        Returns:
            ``nats + log_scale``.

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

        Args:
            nats: Negative log-likelihood in model units: a number or a tensor of them.

        Returns:
            Bits per dimension.

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

    Args:
        table: Finite rows in source units.
        generator: Torch's generator for the permutation; its initial seed is recorded.
        num_samples: Keep this many of the shuffled rows; ``None`` keeps all.

    Returns:
        The data set.

    Raises:
        ValueError: If rows are too few, or a column is constant in the training split.

    Example:
        >>> import numpy as np
        >>> table = Table("squares", ("a", "b"), np.arange(40.0).reshape(20, 2) ** 2, "doctest")
        >>> dataset = from_table(table, torch.Generator().manual_seed(0))
        >>> len(dataset.train), len(dataset.validation), len(dataset.test)
        (16, 2, 2)
    """
    rows = _shuffled(table, generator, num_samples)
    parts = rows.split(split_sizes(len(rows), table.name))
    _refuse_constant(table, parts[0])
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
    """Return what readers of a report must know about the terms of use.

    Example:
        >>> licence_notes("MIT"), licence_notes(None)
        (('licence: MIT',), ())
    """
    return () if licence is None else (f"licence: {licence}",)


def split_sizes(num_rows: int, name: str) -> list[int]:
    """Sizes of the training, validation and test splits: 80/10/10, the remainder to training.

    Args:
        num_rows: Rows to split.
        name: What they are called, for the message.

    Returns:
        Three sizes that sum to ``num_rows``.

    Raises:
        ValueError: If there are fewer than ten rows.

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


def _refuse_constant(table: Table, train: Tensor) -> None:
    is_constant = (train == train[0]).all(dim=0).tolist()
    names = [name for name, constant in zip(table.columns, is_constant, strict=True) if constant]
    if names:
        raise ValueError(
            f"{table.name}: constant in the training split, so without a density: column"
            f" {', '.join(names)}; remove it"
        )
