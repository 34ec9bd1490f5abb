"""`nflows-iresnet bench`: check everything, measure, save after each case, and report."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch

from nflows_iresnet import interruption
from nflows_iresnet.experiments.bench.items import Item, chosen_items
from nflows_iresnet.experiments.bench.measure import Benchmark, CaseResult, trusts_cpu_time
from nflows_iresnet.experiments.config import UsageError, resolve_device
from nflows_iresnet.experiments.environment import check_extra
from nflows_iresnet.experiments.files import WriteError, prepare_folder, write_atomically
from nflows_iresnet.experiments.options import BenchOptions

RESULTS = "bench.json"


def run(parsed: BenchOptions) -> int:
    """Run the subcommand and return the exit status.

    Raises:
        UsageError: arguments cannot work; nothing was written.
    """
    items = chosen_items(parsed.only, quality=parsed.quality)
    try:
        check_extra()
        options = replace(parsed, device=resolve_device(parsed.device))
        folder = open_folder(parsed.out)
    except ValueError as error:
        raise UsageError(str(error)) from error
    torch.set_num_threads(options.threads)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(nflows|normflows)\.")
            _work(options, items, folder)
    except KeyboardInterrupt:
        print(f"interrupted: what is measured is kept in {folder}", file=sys.stderr)
        return interruption.STATUS
    except WriteError as error:
        raise WriteError(f"{error}; what is measured is kept in {folder}") from error
    return 0


def open_folder(out: str | None) -> Path:
    """Create the output folder.

    Raises:
        ValueError: it cannot be written, or holds results already.
    """
    folder = Path(out or f"results/bench-{datetime.now():%Y%m%d-%H%M%S}")
    if (folder / RESULTS).exists():
        raise ValueError(f"{str(folder)!r} already holds results: choose another --out")
    prepare_folder(folder)
    return folder


def _work(options: BenchOptions, items: Mapping[str, Item], folder: Path) -> None:
    from nflows_iresnet.experiments.bench import report
    from nflows_iresnet.experiments.progress import CaseProgress
    from nflows_iresnet.experiments.tables import make_console

    chosen = ("device", "threads", "quick", "repeats", "seed", "seconds", "learning_rate")
    arguments = {**{name: getattr(options, name) for name in chosen}, "items": list(items)}
    record = Benchmark.begin(arguments, options.device)
    record.environment["load"] = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    write_atomically(folder / RESULTS, record.as_json().encode())
    cases = {name: item.cases(options) for name, item in items.items()}
    with CaseProgress(sum(map(len, cases.values())), quiet=options.quiet) as progress:
        for name, item in items.items():
            for case in cases[name]:
                with progress.stage(f"{name} · {case.label}"):
                    measured = case.measure(options)
                    identity = name, case.label, case.parameters
                    result = CaseResult(*identity, measured, trusts_cpu_time(options))
                    record = replace(record, results=(*record.results, result))
                    write_atomically(folder / RESULTS, record.as_json().encode())
            if not options.quiet:
                with progress.paused():
                    report.print_item(make_console(report.WIDTH), name, item, record.of(name))
    for name, picture in report.draw(record).items():
        write_atomically(folder / name, picture)
    path = folder / RESULTS
    print(path if options.quiet else f"\nresults: {path}")
