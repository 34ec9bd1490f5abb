"""`nflows-iresnet bench`: check everything, measure, save after each case, and report."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nflows_iresnet.experiments.bench.catalogue import chosen_items, describe_items
from nflows_iresnet.experiments.bench.clock import clock_for
from nflows_iresnet.experiments.bench.items import Case, CaseResult, Item, Settings
from nflows_iresnet.experiments.bench.record import BenchRecord
from nflows_iresnet.experiments.config import UsageError, resolve_device
from nflows_iresnet.experiments.environment import check_extra, describe_environment
from nflows_iresnet.experiments.files import WriteError, prepare_folder, write_atomically
from nflows_iresnet.experiments.options import BenchOptions

if TYPE_CHECKING:
    from nflows_iresnet.experiments.bench.progress import CaseProgress

RESULTS = "bench.json"
OPTIONAL = "quality"


@dataclass
class Session:
    """A benchmark under way."""

    settings: Settings
    cases: dict[str, list[Case]]
    folder: Path
    record: BenchRecord
    quiet: bool

    def save(self) -> None:
        """Write what is measured so far."""
        write_atomically(self.folder / RESULTS, self.record.as_json().encode())


def run(parsed: BenchOptions) -> int:
    """Run the subcommand and return the exit status.

    Raises:
        UsageError: arguments cannot work; nothing was written.
    """
    if parsed.list:
        print(describe_items())
        return 0
    try:
        session = open_session(parsed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    torch.set_num_threads(session.settings.threads)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(nflows|normflows|torchflows)\.")
            _work(session)
    except KeyboardInterrupt:
        print(f"interrupted: what is measured is kept in {session.folder}", file=sys.stderr)
        return 130
    except WriteError as error:
        raise WriteError(f"{error}; what is measured is kept in {session.folder}") from error
    return 0


def open_session(parsed: BenchOptions) -> Session:
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
    session = Session(
        settings,
        {name: item.cases(settings) for name, item in items.items()},
        folder,
        _fresh_record(parsed, settings, items),
        parsed.quiet,
    )
    prepare_folder(folder)
    session.save()
    return session


def _fresh_record(parsed: BenchOptions, settings: Settings, items: dict[str, Item]) -> BenchRecord:
    arguments: dict[str, Any] = {
        "device": settings.device.type,
        "threads": settings.threads,
        "quick": settings.quick,
        "repeats": settings.repeats,
        "seed": settings.seed,
        "seconds": settings.seconds,
        "learning_rate": settings.learning_rate,
        "items": list(items),
    }
    return BenchRecord(
        arguments=arguments,
        environment={**describe_environment(settings.device.type), "load": _load()},
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        items=items,
    )


def _load() -> list[float] | None:
    """Return the load of the machine over 1, 5 and 15 minutes, where the system knows it."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _work(session: Session) -> None:
    from nflows_iresnet.experiments.bench.progress import CaseProgress

    total = sum(len(cases) for cases in session.cases.values())
    with CaseProgress(total, quiet=session.quiet) as progress:
        for name, item in session.record.items.items():
            for case in session.cases[name]:
                _measure(session, name, case, progress)
            with progress.paused():
                _show(session, name, item)
    _close(session)


def _measure(session: Session, name: str, case: Case, progress: CaseProgress) -> None:
    progress.begin(f"{name} · {case.label}")
    settings = session.settings
    item = session.record.items[name]
    cells = item.measure(case, settings, clock_for(settings.device))
    result = CaseResult(name, case.label, case.parameters, cells, settings.trusts_cpu_time)
    session.record.results.append(result)
    session.save()
    progress.finish()


def _show(session: Session, name: str, item: Item) -> None:
    from nflows_iresnet.experiments.bench import tables

    if not session.quiet:
        tables.print_item(tables.make_console(), name, item, session.record.of(name))


def _close(session: Session) -> None:
    from nflows_iresnet.experiments.bench import plots

    for name, picture in plots.draw(session.record).items():
        write_atomically(session.folder / name, picture)
    path = session.folder / RESULTS
    print(path if session.quiet else f"\nresults: {path}")


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
