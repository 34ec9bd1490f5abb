"""`nflows-iresnet bench`: check everything, measure, save after each case, and report."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from nflows_iresnet.experiments import session
from nflows_iresnet.experiments.bench.items import chosen_items
from nflows_iresnet.experiments.bench.measure import Benchmark, CaseResult, trusts_cpu_time
from nflows_iresnet.experiments.options import BenchOptions
from nflows_iresnet.files import write_atomically

RESULTS = "bench.json"


def _work(options: BenchOptions, folder: Path) -> int:
    """Measure what was asked for, and return the exit status."""
    from nflows_iresnet.experiments.bench import report
    from nflows_iresnet.experiments.progress import CaseProgress
    from nflows_iresnet.experiments.tables import make_console

    items = chosen_items(options.only, quality=options.quality)
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
    return 0


run = partial(
    session.run_at_once,
    _work,
    results=RESULTS,
    files=("bench.png", "quality.png"),
    kept="what is measured is kept",
)
"""Run the subcommand and return the exit status."""
