"""The file of results: everything that is needed to draw tables and pictures again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nflows_iresnet.experiments.bench.items import BASELINE, CaseResult, Cell, Item
from nflows_iresnet.experiments.bench.verdicts import fits, verdicts
from nflows_iresnet.experiments.record import finite

FORMAT = 1


@dataclass
class BenchRecord:
    """The content of bench.json.

    Args:
        arguments: the arguments of the run.
        environment: versions, device and machine.
        started: ISO date and time.
        items: what was to be measured, by name.
        results: what is finished.
    """

    arguments: dict[str, Any]
    environment: dict[str, Any]
    started: str
    items: dict[str, Item]
    results: list[CaseResult] = field(default_factory=list)

    def of(self, item: str) -> list[CaseResult]:
        """Return the results of an item."""
        return [result for result in self.results if result.item == item]

    def as_json(self) -> str:
        """Serialise raw samples and what follows from them; what is not finite becomes null."""
        content = {
            "format": FORMAT,
            "arguments": self.arguments,
            "environment": self.environment,
            "started": self.started,
            "results": [_plain(result) for result in self.results],
            "fits": _all(fits(item, self.of(name)) for name, item in self.items.items()),
            "targets": _all(verdicts(item, self.of(name)) for name, item in self.items.items()),
        }
        return json.dumps(finite(content), indent=1, allow_nan=False)


def _all(groups: Iterable[Sequence[Any]]) -> list[dict[str, Any]]:
    return [asdict(each) for group in groups for each in group]


def _plain(result: CaseResult) -> dict[str, Any]:
    return {**asdict(result), "cells": [_cell(result, cell) for cell in result.cells]}


def _cell(result: CaseResult, cell: Cell) -> dict[str, Any]:
    name = cell.contestant
    derived = {
        "milliseconds": result.milliseconds(name),
        "wall_ratio": result.time_ratio(BASELINE, name, cpu=False),
        "cpu_ratio": result.time_ratio(BASELINE, name, cpu=True),
    }
    return {
        **asdict(cell),
        **{key: None if value is None else asdict(value) for key, value in derived.items()},
        "figure_ratios": {key: result.figure_ratio(name, key) for key in cell.figures},
    }
