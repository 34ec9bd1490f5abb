"""What is measured: one line per item."""

from __future__ import annotations

from collections.abc import Iterable

from nflows_iresnet.experiments.bench import (
    accuracy,
    compiled,
    imagesteps,
    implicit,
    inverses,
    likelihood,
    operations,
    quality,
    steps,
)
from nflows_iresnet.experiments.bench.contestants import CONTESTANTS
from nflows_iresnet.experiments.bench.items import Item
from nflows_iresnet.experiments.config import suggest

ITEMS: dict[str, Item] = {
    "step-dimension": steps.STEP_DIMENSION,
    "step-batch-2": steps.STEP_BATCH_2,
    "step-batch-64": steps.STEP_BATCH_64,
    "step-depth": steps.STEP_DEPTH,
    "step-image": imagesteps.STEP_IMAGE,
    "operations": operations.ITEM,
    "step-compiled": compiled.STEP_COMPILED,
    "memory": steps.STEP_MEMORY,
    "likelihood": likelihood.EXACT_LIKELIHOOD,
    "inverse": inverses.INVERSE,
    "inverse-scaling": inverses.INVERSE_SCALING,
    "implicit-gradient": implicit.IMPLICIT_GRADIENT,
    "accuracy": accuracy.ACCURACY,
    "quality": quality.QUALITY,
}


def find_item(name: str) -> Item:
    """Look an item up by name.

    Raises:
        ValueError: there is no such item; the message names the nearest one.
    """
    if name not in ITEMS:
        raise ValueError(f"unknown item {name!r}: {suggest(name, ITEMS)}")
    return ITEMS[name]


def chosen_items(names: Iterable[str] | None, optional: Iterable[str] = ()) -> dict[str, Item]:
    """Return the named items; without names all that are not optional, and the optional named.

    Raises:
        ValueError: there is no item of a name.
    """
    if names is not None:
        return {name: find_item(name) for name in [*dict.fromkeys(names), *optional]}
    wanted = set(optional)
    return {name: item for name, item in ITEMS.items() if not item.is_optional or name in wanted}


def describe_items() -> str:
    """List items and contestants with one line each."""
    items = [f"  {name:18}{item.description}" for name, item in ITEMS.items()]
    models = [f"  {name:18}{contestant.description}" for name, contestant in CONTESTANTS.items()]
    return "\n".join(
        [
            *("items:", *items, ""),
            *("contestants of a training step:", *models, ""),
            *("targets, held against what is measured:", *_targets()),
        ]
    )


def _targets() -> list[str]:
    return [
        f"  {name:18}{target.text}: {'at least' if target.at_least else 'at most'} {target.bound:g}"
        for name, item in ITEMS.items()
        for target in item.targets
    ]
