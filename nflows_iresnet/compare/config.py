"""What a run depends on: every choice, validated, in one frozen value."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

DEFAULT_STEPS = 400


@dataclass(frozen=True)
class RunConfig:
    """Every choice that a result depends on: equal configurations give equal results.

    Args:
        datasets: names or paths of the data sets.
        models: names in `models.MODELS`.
        steps: optimiser steps per model, or None for a time budget.
        budget: training time per model in seconds, or None for a number of steps.
        device: "cpu" or "cuda".
        seed: seed of the data, the initial weights, the batches and the samples.
        repeats: how often each model is trained, with seeds `seed, seed + 1, ...`.
        data_dir: folder of the real data sets, or None.
        batch_size: rows per optimiser step.
        learning_rate: initial learning rate of Adam.
        hidden_features: width of the reference model, ResidualFlow.
        num_layers: transforms per model.
        num_blocks_per_layer: hidden layers of the network in each transform.
        threads: CPU threads that torch uses.
        images: whether the data sets are images, of which the rest speaks.
        num_train: training images to keep, or None for all.
        num_scales: how often images are squeezed and half of them factored out.
        amp: whether networks compute in bfloat16 while training.
        exact_images: test images that get the exact log-determinant where models estimate it, or
            None for 256, and fewer where images are large.
        dequantisations: draws of noise over which test likelihoods are averaged.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    datasets: tuple[str, ...]
    models: tuple[str, ...]
    steps: int | None = DEFAULT_STEPS
    budget: float | None = None
    device: str = "cpu"
    seed: int = 0
    repeats: int = 1
    data_dir: str | None = None
    batch_size: int = 256
    learning_rate: float = 5e-3
    hidden_features: int = 64
    num_layers: int = 6
    num_blocks_per_layer: int = 2
    threads: int = 1
    images: bool = False
    num_train: int | None = None
    num_scales: int = 2
    amp: bool = False
    exact_images: int | None = None
    dequantisations: int = 1

    def __post_init__(self) -> None:
        """Check that every number is in range."""
        if (self.steps is None) == (self.budget is None):
            raise ValueError("give either steps or budget, not both and not neither")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be between 0 and {2**31 - 1}, got {self.seed}")
        for name in _POSITIVE:
            _check_positive(name, getattr(self, name))
        if not self.images and (self.amp or self.num_train is not None):
            raise ValueError("amp and num_train are for images: add --images, or leave them out")

    def as_arguments(self) -> dict[str, Any]:
        """Every choice as plain JSON data."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


_POSITIVE = (
    "steps",
    "budget",
    "repeats",
    "batch_size",
    "learning_rate",
    "hidden_features",
    "num_layers",
    "num_blocks_per_layer",
    "threads",
    "num_train",
    "num_scales",
    "exact_images",
    "dequantisations",
)

IMAGE_DEFAULTS: dict[str, Any] = {
    "batch_size": 64,
    "learning_rate": 1e-3,
    "num_layers": 4,
}
"""What images need other defaults for."""


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value}")


def resolve_device(name: str) -> str:
    """Choose "cuda" or "cpu" for "auto", and check that "cuda" is there.

    Raises:
        ValueError: "cuda" was asked for and torch sees no GPU.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device 'cuda' is not available to torch {torch.__version__}: "
            "use --device cpu, or install a torch build with CUDA"
        )
    return name


def suggest(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant, else list them all."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}"


def slug(name: str) -> str:
    """Turn a name into something every file system accepts."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "data"


class UsageError(Exception):
    """Something that the user can mend; the message is one line."""
