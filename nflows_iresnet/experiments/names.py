"""Names of all that can be chosen, with a line about each."""

from __future__ import annotations

from collections.abc import Iterable

from nflows_iresnet.experiments.bench.items import ITEMS
from nflows_iresnet.experiments.config import UsageError, suggest
from nflows_iresnet.experiments.figures import DESCRIPTIONS as FIGURES
from nflows_iresnet.experiments.models import IMAGE_MODELS, MODELS

__all__ = ["FIGURES", "check", "data_sets", "items", "listed", "models", "sets_of_images"]


def models(*, images: bool) -> dict[str, str]:
    """Return the models for rows, or for images."""
    return {name: spec.description for name, spec in (IMAGE_MODELS if images else MODELS).items()}


def items() -> dict[str, str]:
    """Return the items of the benchmark."""
    return {name: item.description for name, item in ITEMS.items()}


def data_sets() -> dict[str, str]:
    """Return the data sets of rows; to ask is to import torch."""
    from nflows_iresnet.datasets import available

    return available()


def sets_of_images() -> dict[str, str]:
    """Return the sets of images; to ask is to import torch."""
    from nflows_iresnet.datasets import available_images

    return available_images()


def listed(described_names: dict[str, str], width: int = 27) -> str:
    """Return a line for each name."""
    return "\n".join(f"  {name:{width}}{text}".rstrip() for name, text in described_names.items())


def check(kind: str, names: Iterable[str] | None, known: Iterable[str]) -> None:
    """Check names of a kind, such as "model".

    Raises:
        UsageError: one is not known; the message says which was probably meant.
    """
    every = list(known)
    for name in names or ():
        if name not in every:
            raise UsageError(f"unknown {kind} {name!r}: {suggest(name, every)}")
