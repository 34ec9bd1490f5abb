"""What is measured: one line per item."""

from __future__ import annotations

from collections.abc import Iterable

from nflows_iresnet.compare.bench import (
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
from nflows_iresnet.compare.bench.items import Item
from nflows_iresnet.compare.config import suggest

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
