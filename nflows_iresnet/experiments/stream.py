"""The training batches of a data set."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from nflows_iresnet.datasets import Dataset
from nflows_iresnet.training import Batches


def training_batches(
    data: Dataset, batch_size: int, seed: int, device: str | torch.device = "cpu"
) -> Batches:
    """Return batches of the training rows; quantised rows get fresh noise in each.

    Args:
        data: the data set.
        batch_size: rows per batch.
        seed: of order and noise.
        device: where the rows are.
    """
    train, levels = data.train.to(device), data.levels
    if levels is None:
        return Batches(train, batch_size, seed)
    location, scale = data.location.to(device), data.scale.to(device)
    rows = ((train * scale + location) * levels).floor()

    def with_noise(batch: Tensor, generator: Generator) -> Tensor:
        noise = torch.rand(batch.shape, generator=generator, device=batch.device).to(batch)
        return (((batch + noise) / levels - location) / scale).to(train.dtype)

    return Batches(rows, batch_size, seed, with_noise)
