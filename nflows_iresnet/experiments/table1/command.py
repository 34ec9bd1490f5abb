"""`nflows-iresnet table1`: its arguments, and the run."""

from __future__ import annotations

import sys
from dataclasses import fields
from datetime import datetime
from pathlib import Path

import torch

from nflows_iresnet import datasets
from nflows_iresnet.datasets import ImageDataset
from nflows_iresnet.experiments import interruption, published
from nflows_iresnet.experiments.checkpoints import CheckpointError, Keeper
from nflows_iresnet.experiments.config import UsageError, resolve_device
from nflows_iresnet.experiments.environment import check_extra, describe_environment
from nflows_iresnet.experiments.files import WriteError, describe_os_error, write_atomically
from nflows_iresnet.experiments.options import Table1Options
from nflows_iresnet.experiments.results import Folder, flags
from nflows_iresnet.experiments.table1.models import Contestant, contestants
from nflows_iresnet.experiments.table1.record import DataSummary, Outcome, Record
from nflows_iresnet.experiments.table1.settings import DEFAULT_COEFFS, QUICK, TUNED, Settings
from nflows_iresnet.experiments.table1.work import execute


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
        session = _Session(parsed)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(describe_os_error(error)) from error
    torch.set_num_threads(session.settings.threads)
    try:
        session.work()
    except KeyboardInterrupt:
        print(f"interrupted: {session.kept()}\ngo on with: {session.resume()}", file=sys.stderr)
        return interruption.STATUS
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    except WriteError as error:
        raise WriteError(f"{error}; {session.kept()}; go on with: {session.resume()}") from error
    return 0


class _Session:
    """A table under way."""

    def __init__(self, parsed: Table1Options) -> None:
        check_extra()
        if parsed.resume and parsed.out is None:
            raise ValueError("--resume needs the --out folder of the run to go on with")
        self.quiet: bool = parsed.quiet
        self.settings = to_settings(parsed)
        self.data = [_load(self.settings, repeat) for repeat in range(self.settings.repeats)]
        self.contestants = contestants(self.settings.coeffs)
        self.folder = Folder(Path(parsed.out or f"results/table1-{datetime.now():%Y%m%d-%H%M%S}"))
        self.record = self._fresh()
        if parsed.resume:
            self.record = _resumed(self.folder, self.record)
        else:
            self.folder.refuse_results(Record.from_json)
        _check_sizes(self.contestants, self.data[0], self.settings)
        keepers = [self._keeper(*run) for run in self._pending]
        if parsed.resume:
            for keeper in keepers:
                keeper.load()
        self.folder.create()
        self._save(self.record)
        if not parsed.resume:
            for keeper in keepers:
                keeper.discard()

    def _fresh(self) -> Record:
        return Record(
            arguments=self.settings.as_json(),
            environment=describe_environment(self.settings.device),
            started=datetime.now().astimezone().isoformat(timespec="seconds"),
            data=_summarise(self.data),
            published=published.CLASSIFICATION_ERROR,
        )

    @property
    def _runs(self) -> list[tuple[Contestant, int]]:
        return [
            (each, repeat) for each in self.contestants for repeat in range(self.settings.repeats)
        ]

    @property
    def _pending(self) -> list[tuple[Contestant, int]]:
        finished = {outcome.key for outcome in self.record.outcomes}
        return [run for run in self._runs if (run[0].name, run[1]) not in finished]

    def kept(self) -> str:
        """Say what a later run need not do again."""
        pending = ((contestant.name, repeat) for contestant, repeat in self._pending)
        return self.folder.kept(len(self.record.outcomes), len(self._runs), pending)

    def resume(self) -> str:
        """Return the command that goes on."""
        from nflows_iresnet.experiments.table1.report import command_line

        return self.folder.resume(command_line(self.record))

    def work(self) -> None:
        """Do what is not done yet, save after each classifier, and show the table."""
        from nflows_iresnet.experiments.progress import LiveProgress

        pending, total = self._pending, len(self._runs)
        with LiveProgress(total, total - len(pending), quiet=self.quiet) as progress:
            for contestant, repeat in pending:
                progress.begin(f"{contestant.name} · repeat {repeat + 1}")
                keeper = self._keeper(contestant, repeat)
                data = self.data[repeat]
                outcome = execute(contestant, repeat, data, self.settings, progress.step, keeper)
                self._save(self.record.adding(outcome))
                keeper.discard()
                progress.finish(_line(outcome))
        self._show()

    def _keeper(self, contestant: Contestant, repeat: int) -> Keeper:
        key = (contestant.name, repeat)
        return Keeper(self.folder.checkpoint(key), [self.settings.as_json(), *key])

    def _save(self, record: Record) -> None:
        write_atomically(self.folder.results, record.as_json().encode())
        self.record = record

    def _show(self) -> None:
        from nflows_iresnet.experiments.table1 import picture, report, table
        from nflows_iresnet.experiments.tables import make_console, print_grid

        image = picture.draw(self.record)
        write_atomically(self.folder.path / "table1.png", image)
        page = self.folder.path / "report.html"
        write_atomically(page, report.render(self.record, image).encode())
        if self.quiet:
            print(page)
            return
        console = make_console(width=140)
        console.print(f"\n[bold]{self.record.data.name}[/]: {report.caption(self.record)}")
        print_grid(console, table.columns_for(self.record), self.record.rows())
        for line in self.record.captures():
            console.print(line, style="yellow", markup=False)
        for row in self.record.rows():
            for failure in row.failures:
                console.print(f"{row.model} FAILED {failure}", style="red", markup=False)
        print(f"\nreport: {page}")


def _load(settings: Settings, repeat: int) -> ImageDataset:
    return datasets.load_images(
        settings.dataset, settings.data_dir, settings.seed + repeat, settings.num_train
    )


def _check_sizes(rows: list[Contestant], data: ImageDataset, settings: Settings) -> None:
    """Build every classifier once, so that impossible sizes are said before anything is trained."""
    from nflows_iresnet.experiments.table1.models import Size

    for row in rows:
        row.build(Size(data.shape, data.num_classes, data.levels, settings))


def _summarise(data: list[ImageDataset]) -> DataSummary:
    first = data[0]
    tests = torch.cat([each.test for each in data]).flatten(start_dim=1)
    return DataSummary(
        name=first.name,
        source=first.source,
        split=first.split,
        shape=first.shape,
        levels=first.levels,
        num_classes=first.num_classes,
        num_train=len(first.train),
        num_test=len(first.test),
        num_distinct=len(torch.unique(tests, dim=0)),
    )


def _resumed(folder: Folder, now: Record) -> Record:
    then = folder.load(Record.from_json)
    folder.check_same(flags(then.arguments), flags(now.arguments))
    return then


def _line(outcome: Outcome) -> str:
    label = f"{outcome.model} · repeat {outcome.repeat + 1}: "
    if outcome.failure is not None:
        return f"{label}FAILED {outcome.failure}"
    reason = outcome.capture_reason
    eager = "" if reason is None else f"; steps not captured: {reason}"
    return f"{label}{outcome.num_wrong} of {outcome.num_test} test images wrong{eager}"
