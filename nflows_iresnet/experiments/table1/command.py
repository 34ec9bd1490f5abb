"""`nflows-iresnet table1`: check everything, train and examine each classifier, report."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path

import torch

from nflows_iresnet import datasets, interruption
from nflows_iresnet.datasets import ImageDataset
from nflows_iresnet.experiments import checkpoints, published
from nflows_iresnet.experiments.checkpoints import CheckpointError, Keeper
from nflows_iresnet.experiments.config import UsageError, resolve_device
from nflows_iresnet.experiments.environment import check_extra
from nflows_iresnet.experiments.files import WriteError, describe_os_error, write_atomically
from nflows_iresnet.experiments.options import Table1Options
from nflows_iresnet.experiments.record import Folder, flags
from nflows_iresnet.experiments.table1 import (
    DEFAULT_COEFFS,
    QUICK,
    TUNED,
    Settings,
)
from nflows_iresnet.experiments.table1.classifiers import Size, builders, execute
from nflows_iresnet.experiments.table1.record import DataSummary, Outcome, Record


def to_settings(parsed: Table1Options) -> Settings:
    """Turn parsed arguments into settings.

    Raises:
        ValueError: a value cannot work.
    """
    given = {field.name: getattr(parsed, field.name) for field in fields(Settings)}
    if parsed.minutes is not None:
        given["budget"] = 60 * parsed.minutes
    device = resolve_device(parsed.device)
    defaults = dict(TUNED.get(parsed.dataset, {}).get(device, {}))
    if parsed.quick:
        defaults |= QUICK
    if given["budget"] is not None or given["steps"] is not None:
        defaults |= {"steps": None, "budget": None}
    chosen = defaults | {name: value for name, value in given.items() if value is not None}
    coeffs = tuple(dict.fromkeys(chosen.pop("coeffs", DEFAULT_COEFFS)))
    return Settings(**{**chosen, "coeffs": coeffs, "device": device})


def run(parsed: Table1Options) -> int:
    """Run the subcommand and return the exit status.

    Raises:
        UsageError: arguments or data cannot work; nothing was written.
    """
    try:
        session = open_session(parsed)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(describe_os_error(error)) from error
    torch.set_num_threads(session.settings.threads)
    try:
        _work(session)
    except KeyboardInterrupt:
        print(f"interrupted: {session.kept}\ngo on with: {session.resume}", file=sys.stderr)
        return interruption.STATUS
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    except WriteError as error:
        raise WriteError(f"{error}; {session.kept}; go on with: {session.resume}") from error
    return 0


@dataclass
class Session:
    """A table under way; `data` holds the splits of each repeat."""

    settings: Settings
    data: list[ImageDataset]
    folder: Folder
    record: Record
    quiet: bool

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Every row with every repeat."""
        repeats = range(self.settings.repeats)
        return [(model, r) for model in builders(self.settings.coeffs) for r in repeats]

    @property
    def pending(self) -> list[tuple[str, int]]:
        """The runs without an outcome yet."""
        finished = {outcome.key for outcome in self.record.outcomes}
        return [key for key in self.runs if key not in finished]

    @property
    def kept(self) -> str:
        """What a later run need not do again."""
        return self.folder.kept(len(self.record.outcomes), len(self.runs), self.pending)

    @property
    def resume(self) -> str:
        """The command that goes on."""
        from nflows_iresnet.experiments.table1.report import command_line

        return self.folder.resume(command_line(self.record))

    def keeper(self, key: tuple[str, int]) -> Keeper:
        """Return what keeps the checkpoints of a run."""
        return Keeper(self.folder.checkpoint(key), [self.settings.as_json(), *key])

    def save(self, record: Record) -> None:
        """Write results.json."""
        write_atomically(self.folder.results, record.as_json().encode())
        self.record = record


def open_session(parsed: Table1Options) -> Session:
    """Check everything that can be checked, then create the output folder.

    Raises:
        ValueError: something cannot work; the message names it and nothing was written.
    """
    check_extra()
    settings = to_settings(parsed)
    data = [_load(settings, repeat) for repeat in range(settings.repeats)]
    folder = Folder(Path(parsed.out or f"results/table1-{datetime.now():%Y%m%d-%H%M%S}"))
    record = _fresh_record(settings, data)
    if parsed.resume:
        record = _resumed(folder, record)
    else:
        folder.refuse_results(Record.from_json)
    for build in builders(settings.coeffs).values():
        build(Size.of(data[0], settings))  # an impossible size is said before anything is trained
    session = Session(settings, data, folder, record, parsed.quiet)

    def write() -> None:
        folder.create()
        session.save(record)

    keepers = [session.keeper(key) for key in session.pending]
    checkpoints.begin(keepers, write, resume=parsed.resume)
    return session


def _load(settings: Settings, repeat: int) -> ImageDataset:
    return datasets.load_images(
        settings.dataset, settings.data_dir, settings.seed + repeat, settings.num_train
    )


def _fresh_record(settings: Settings, data: list[ImageDataset]) -> Record:
    first = data[0]
    tests = torch.cat([each.test for each in data]).flatten(start_dim=1)
    return Record.begin(
        settings.as_json(),
        settings.device,
        data=DataSummary(
            name=first.name,
            source=first.source,
            split=first.split,
            shape=first.shape,
            levels=first.levels,
            num_classes=first.num_classes,
            num_train=len(first.train),
            num_test=len(first.test),
            num_distinct=len(torch.unique(tests, dim=0)),
        ),
        published=published.CLASSIFICATION_ERROR,
    )


def _resumed(folder: Folder, now: Record) -> Record:
    then = folder.load(Record.from_json)
    folder.check_same(flags(then.arguments), flags(now.arguments))
    return then


def _work(session: Session) -> None:
    """Do what is not done yet, save after each classifier, and show the table."""
    from nflows_iresnet.experiments.progress import LiveProgress

    pending, total = session.pending, len(session.runs)
    with LiveProgress(total, total - len(pending), quiet=session.quiet) as progress:
        for model, repeat in pending:
            progress.begin(f"{model} · repeat {repeat + 1}")
            keeper = session.keeper((model, repeat))
            data = session.data[repeat]
            outcome = execute(model, repeat, data, session.settings, progress.step, keeper)
            session.save(session.record.adding(outcome))
            keeper.discard()
            progress.finish(_line(outcome))
    _show(session)


def _line(outcome: Outcome) -> str:
    label = f"{outcome.model} · repeat {outcome.repeat + 1}: "
    if outcome.failure is not None:
        return f"{label}FAILED {outcome.failure}"
    reason = outcome.capture_reason
    eager = "" if reason is None else f"; steps not captured: {reason}"
    return f"{label}{outcome.num_wrong} of {outcome.num_test} test images wrong{eager}"


def _show(session: Session) -> None:
    from nflows_iresnet.experiments.table1.report import columns_for, draw, render
    from nflows_iresnet.experiments.tables import make_console, print_grid

    record, picture = session.record, draw(session.record)
    write_atomically(session.folder.path / "table1.png", picture)
    page = session.folder.path / "report.html"
    write_atomically(page, render(record, picture).encode())
    if session.quiet:
        print(page)
        return
    console = make_console(width=140)
    console.print(f"\n[bold]{record.data.name}[/]: {record.caption()}")
    print_grid(console, columns_for(record), record.rows())
    for line in record.captures():
        console.print(line, style="yellow", markup=False)
    for row in record.rows():
        for failure in row.failures:
            console.print(f"{row.model} FAILED {failure}", style="red", markup=False)
    print(f"\nreport: {page}")
