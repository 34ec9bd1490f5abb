"""Marks of tests that need what may not be installed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import pytest


def named(names: Iterable[str], slow: Iterable[str] = ()) -> list[Any]:
    """Return the names of models as parameters, skipped where their library is missing.

    Args:
        names: the models.
        slow: those whose test is slow.
    """
    missing = pytest.mark.skipif(find_spec("zuko") is None, reason="needs zuko: .[ffjord]")
    marks = {name: [missing] if name.startswith(("ffjord", "zuko")) else [] for name in names}
    for name in slow:
        marks[name].append(pytest.mark.slow)
    return [pytest.param(name, marks=each) for name, each in marks.items()]
