"""A plugin of pytest: the quickest tests come first, so that a fault is killed soon.

How long a test takes is read from, and written to, the file that `PLANTED_DURATIONS` names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

_UNKNOWN = 0.3
_KNOWN: dict[str, float] = {}


def _file() -> Path:
    return Path(os.environ["PLANTED_DURATIONS"])


def _read() -> dict[str, float]:
    try:
        known: dict[str, float] = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return known


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _KNOWN.update(_read())
    items.sort(key=lambda item: _KNOWN.get(item.nodeid, _UNKNOWN))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        _KNOWN[report.nodeid] = report.duration


def pytest_sessionfinish() -> None:
    whole = _file().with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps(_read() | _KNOWN))
    whole.replace(_file())
