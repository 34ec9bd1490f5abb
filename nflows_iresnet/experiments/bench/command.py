"""`nflows-iresnet bench`: check everything, measure, save after each case, and report."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nflows_iresnet import interruption
from nflows_iresnet.experiments.bench.items import BASELINE, Item, chosen_items
from nflows_iresnet.experiments.bench.measure import (
    Case,
    CaseResult,
    Measurement,
    Settings,
    check_targets,
    fits,
)
from nflows_iresnet.experiments.config import (
    UsageError,
    check_extra,
    describe_environment,
    resolve_device,
)
from nflows_iresnet.experiments.files import WriteError, prepare_folder, write_atomically
from nflows_iresnet.experiments.options import BenchOptions
from nflows_iresnet.training import finite

if TYPE_CHECKING:
    from nflows_iresnet.experiments.progress import CaseProgress

RESULTS = "bench.json"
FORMAT = 1
OPTIONAL = "quality"


@dataclass
class Benchmark:
    """A benchmark under way; everything but `cases` and `quiet` is kept in bench.json.

    Args:
        settings: of every measurement.
        items: what is to be measured, by name.
        cases: of each item.
        folder: where results go.
        quiet: whether to print the path of the results alone.
        environment: versions, device and machine.
        started: ISO date and time.
        results: what is finished.
    """

    settings: Settings
    items: dict[str, Item]
    cases: dict[str, list[Case]]
    folder: Path
    quiet: bool
    environment: dict[str, Any]
    started: str
    results: list[CaseResult] = field(default_factory=list)

    def of(self, item: str) -> list[CaseResult]:
        """Return the results of an item."""
        return [result for result in self.results if result.item == item]

    def save(self) -> None:
        """Write what is measured so far."""
        write_atomically(self.folder / RESULTS, self.as_json().encode())

    def as_json(self) -> str:
        """Serialise raw samples and what follows from them; what is not finite becomes null."""
        settings = {**asdict(self.settings), "device": self.settings.device.type}
        groups = [(item, self.of(name)) for name, item in self.items.items()]
        content = {
            "format": FORMAT,
            "arguments": {**settings, "items": list(self.items)},
            "environment": self.environment,
            "started": self.started,
            "results": [_result(each) for each in self.results],
            "fits": _plain([fit for group in groups for fit in fits(*group)]),
            "targets": _plain([target for group in groups for target in check_targets(*group)]),
        }
        return json.dumps(finite(content), indent=1, allow_nan=False)


_KEYS = {"model": "contestant", "measurements": "cells", "numbers": "figures"}
"""What the file calls some attributes, since its first format."""


def _plain(records: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        asdict(each, dict_factory=lambda pairs: {_KEYS.get(key, key): v for key, v in pairs})
        for each in records
    ]


def _result(result: CaseResult) -> dict[str, Any]:
    (plain,) = _plain([result])
    for content, each in zip(plain["cells"], result.measurements, strict=True):
        content |= _derived(result, each)
    return plain


def _derived(result: CaseResult, measurement: Measurement) -> dict[str, Any]:
    name = measurement.model
    spreads = {
        "milliseconds": result.milliseconds(name),
        "wall_ratio": result.time_ratio(BASELINE, name, cpu=False),
        "cpu_ratio": result.time_ratio(BASELINE, name, cpu=True),
    }
    ratios = {key: result.number_ratio(name, key) for key in measurement.numbers}
    return {
        **{key: None if value is None else asdict(value) for key, value in spreads.items()},
        "figure_ratios": ratios,
    }


def run(parsed: BenchOptions) -> int:
    """Run the subcommand and return the exit status.

    Raises:
        UsageError: arguments cannot work; nothing was written.
    """
    try:
        benchmark = open_benchmark(parsed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    torch.set_num_threads(benchmark.settings.threads)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(nflows|normflows|torchflows)\.")
            _work(benchmark)
    except KeyboardInterrupt:
        print(f"interrupted: what is measured is kept in {benchmark.folder}", file=sys.stderr)
        return interruption.STATUS
    except WriteError as error:
        raise WriteError(f"{error}; what is measured is kept in {benchmark.folder}") from error
    return 0


def open_benchmark(parsed: BenchOptions) -> Benchmark:
    """Check everything that can be checked, then create the output folder.

    Raises:
        ValueError: something cannot work; the message names it and nothing was written.
    """
    check_extra()
    settings = to_settings(parsed)
    items = chosen_items(parsed.only, [OPTIONAL] if parsed.quality else [])
    folder = Path(parsed.out or f"results/bench-{datetime.now():%Y%m%d-%H%M%S}")
    if (folder / RESULTS).exists():
        raise ValueError(f"{str(folder)!r} already holds results: choose another --out")
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    benchmark = Benchmark(
        settings,
        items,
        {name: item.cases(settings) for name, item in items.items()},
        folder,
        parsed.quiet,
        environment={**describe_environment(settings.device.type), "load": load},
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
    )
    prepare_folder(folder)
    benchmark.save()
    return benchmark


def _work(benchmark: Benchmark) -> None:
    from nflows_iresnet.experiments.bench import report
    from nflows_iresnet.experiments.progress import CaseProgress
    from nflows_iresnet.experiments.tables import make_console

    total = sum(len(cases) for cases in benchmark.cases.values())
    with CaseProgress(total, quiet=benchmark.quiet) as progress:
        for name, item in benchmark.items.items():
            for case in benchmark.cases[name]:
                _measure(benchmark, name, case, progress)
            if not benchmark.quiet:
                with progress.paused():
                    report.print_item(make_console(report.WIDTH), name, item, benchmark.of(name))
    for name, picture in report.draw(benchmark.items, benchmark.results).items():
        write_atomically(benchmark.folder / name, picture)
    path = benchmark.folder / RESULTS
    print(path if benchmark.quiet else f"\nresults: {path}")


def _measure(benchmark: Benchmark, name: str, case: Case, progress: CaseProgress) -> None:
    with progress.stage(f"{name} · {case.label}"):
        measurements = case.measure(benchmark.settings)
        on_cpu_time = benchmark.settings.trusts_cpu_time
        result = CaseResult(name, case.label, case.parameters, measurements, on_cpu_time)
        benchmark.results.append(result)
        benchmark.save()


def to_settings(parsed: BenchOptions) -> Settings:
    """Turn parsed arguments into settings.

    Raises:
        ValueError: the device is not there.
    """
    return Settings(
        device=torch.device(resolve_device(parsed.device)),
        threads=parsed.threads,
        quick=parsed.quick,
        repeats=parsed.repeats,
        seed=parsed.seed,
        seconds=parsed.seconds,
        learning_rate=parsed.learning_rate,
    )
