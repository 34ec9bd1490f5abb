"""Names of all that can be chosen, with a line about each, readable before torch is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

import nflows_iresnet
from nflows_iresnet.experiments.config import UsageError, suggest

MODELS = "nflows_iresnet.experiments.models:MODELS"
IMAGE_MODELS = "nflows_iresnet.experiments.imagemodels:IMAGE_MODELS"
DATASETS = "nflows_iresnet.datasets.catalogue:_DESCRIPTIONS"
IMAGES = "nflows_iresnet.datasets.images:_DESCRIPTIONS"
ITEMS = "nflows_iresnet.experiments.bench.catalogue:ITEMS"
FIGURES = "nflows_iresnet.experiments.figures.catalogue:FIGURES"


def described(registry: str) -> dict[str, str]:
    """Return names and descriptions of a registry, from its source until it is imported.

    To import it is to import torch: seconds, for a help or the remark on a typing error.

    Args:
        registry: module:NAME of a dictionary that is written out, by names, of descriptions or of
            calls that begin with one; other values have none.
    """
    module, name = registry.split(":")
    entries = getattr(sys.modules.get(module), name, None)
    if entries is not None:
        return {
            key: entry if isinstance(entry, str) else entry.description
            for key, entry in entries.items()
        }
    file = Path(nflows_iresnet.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id == name and isinstance(node.value, ast.Dict):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {ast.literal_eval(key): _first_text(value) for key, value in pairs if key}
    raise LookupError(f"{file} has no dictionary {name} that is written out")


def _first_text(value: ast.expr) -> str:
    constants = (node.value for node in ast.walk(value) if isinstance(node, ast.Constant))
    return next((text for text in constants if isinstance(text, str)), "")


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
