"""Public names that changed: the old ones work for one release, and warn."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any


def renamed(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module that still knows the old names of some attributes.

    Args:
        module: the name of the module.
        names: new names by old ones.
    """

    def getattr_(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", f"{module}.{names[name]}")
        return getattr(sys.modules[module], names[name])

    return getattr_


def warn_renamed(old: str, new: str) -> None:
    """Say that a name is another now.

    Args:
        old: what was used.
        new: what to use.
    """
    warnings.warn(
        f"{old} is now {new}; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=3,
    )
