"""Commands at work: the folder, early ends, how those that train are gone on with, progress."""

from __future__ import annotations

import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nflows_iresnet import interruption
from nflows_iresnet.experiments import parallel
from nflows_iresnet.experiments.config import UsageError, resolve_device
from nflows_iresnet.experiments.folder import Folder, flags, prepare_folder
from nflows_iresnet.experiments.options import OnDevice, Options, TrainingOptions
from nflows_iresnet.experiments.parallel import Job, Order, Watch
from nflows_iresnet.experiments.record import RunRecord
from nflows_iresnet.files import WriteError, describe_os_error
from nflows_iresnet.training.checkpoints import CheckpointError, Keeper

Kept = TypeVar("Kept", bound=RunRecord)
Bar = TypeVar("Bar", bound="TerminalBar")
_NOT_IN_RECORDS = ("jobs", "dask", "checkpoint_minutes")
"""Options that change nothing that is found."""
_RESOLUTION = 0.02
"""Updates are this fraction of a run apart, so that the time left is estimated over many runs."""


@dataclass
class Session(ABC, Generic[Kept]):
    """A command under way.

    Args:
        parsed: what it was told.
        record: what is found so far; it is in the folder, too.
        folder: keeps everything.
    """

    parsed: TrainingOptions
    record: Kept
    folder: Folder
    cluster: Any = None

    # what each command says of itself

    @property
    @abstractmethod
    def runs(self) -> tuple[int, int]:
        """How many runs are finished, and how many there are."""

    @property
    @abstractmethod
    def files(self) -> Sequence[str]:
        """What is written at the end, as far as its names are known before."""

    @property
    def folders(self) -> Sequence[str]:
        """Likewise of folders."""
        return ()

    @property
    def trials(self) -> tuple[int, int]:
        """Likewise of what is tried before."""
        return 0, 0

    @abstractmethod
    def to_do(self) -> Sequence[Job]:
        """Return what can be done next in any order, nothing at the end."""

    @property
    def may_be_under_way(self) -> Sequence[Job]:
        """Every job of the unfinished runs that may have a checkpoint."""
        return self.to_do()

    @abstractmethod
    def take_in(self, job: Any, found: Any) -> str:
        """Keep what a job found, and return a line about it."""

    def show_finished(self, progress: LiveProgress) -> None:
        """Show what became complete before the report."""
        return

    @abstractmethod
    def report(self) -> Path:
        """Write the report, and return its path."""

    def describe_loss(self, job: Any, loss: float) -> str:
        """Describe the loss of a training under way."""
        return f"loss {loss:.3f}"

    # what all commands do

    def begin(self) -> None:
        """Begin the folder, or look at what it holds; nothing is written if that cannot work.

        Raises:
            ValueError: it cannot; the message says why.
        """
        self.folder.refuse_obstacles(self.files, self.folders)
        if self.parsed.resume:
            self.go_on()
        else:
            self.folder.refuse_results(type(self.record).from_json)
        keepers = [self.keeper(job) for job in self.may_be_under_way]
        for keeper in keepers if self.parsed.resume else ():
            keeper.load()
        if self.parsed.dask is not None:
            self.cluster = parallel.connect(self.parsed.dask)
        self.folder.create()
        self.save(self.record)
        for keeper in () if self.parsed.resume else keepers:
            keeper.discard()

    def go_on(self) -> None:
        """Take up the record of the folder.

        Raises:
            ValueError: it is of something else.
        """
        now, then = self.record, self.folder.load(type(self.record).from_json)
        same = self.folder.check_same
        same({"the command": then.command}, {"the command": now.command})
        same(flags(then.arguments), flags(now.arguments))
        same(then.environment["versions"], now.environment["versions"])
        if then.described_data != now.described_data:
            raise ValueError(
                f"cannot resume {str(self.folder.path)!r}: the data have changed since, or an "
                "earlier version began it; choose another --out"
            )
        machines = [each.environment["device_name"] for each in (then, now)]
        is_timed = any(then.arguments.get(name) is not None for name in ("race", "budget"))
        if is_timed and machines[0] != machines[1]:
            print(
                f"warning: begun on {machines[0]}, goes on on {machines[1]}: equal seconds of "
                "different machines are not equal, and the results name the first alone",
                file=sys.stderr,
            )
        self.record = then

    def save(self, record: Kept) -> None:
        """Write a record, which is that of the session from now on."""
        self.folder.save_record(record)
        self.record = record

    def keeper(self, job: Job) -> Keeper:
        """Return what keeps the checkpoints of a job."""
        path = self.folder.checkpoint(job.key)
        settings = {**flags(self.record.arguments), "job": job.key}
        every = 60.0 * self.parsed.checkpoint_minutes
        remedy = "and go on with --resume: that run alone is trained from its start"
        return Keeper(path, settings, every, remedy)

    @property
    def left(self) -> tuple[str, ...]:
        """What a later command need not do again, and how it goes on."""
        if not self.folder.results.exists():
            return (_gone(self.folder.path),)
        keys = (job.key for job in self.may_be_under_way)
        return self.folder.kept(*self.runs, keys), self.resume

    @property
    def resume(self) -> str:
        """The command that goes on."""
        from nflows_iresnet.experiments.report import command_of

        arguments = dict(self.record.arguments)
        words = arguments.pop("datasets", None) or [arguments.pop("dataset")]
        for each in fields(TrainingOptions):
            value = getattr(self.parsed, each.name)
            if each.name in _NOT_IN_RECORDS and value != each.default:
                arguments[each.name] = value
        line = command_of(self.record.command, words, arguments)
        return f"go on with: {self.folder.resume(line)}"

    def work(self) -> None:
        """Do what is not done yet, keep each result at once, and report."""
        done, total = map(sum, zip(self.runs, self.trials, strict=True))
        places = parallel.processes_ended() if self.parsed.jobs > 1 else nullcontext()
        with LiveProgress(total, done, quiet=self.parsed.quiet) as progress, places:
            self.show_finished(progress)
            while jobs := self.to_do():
                self._do(jobs, progress)
        path = self.report()
        print(path if self.parsed.quiet else f"\nreport: {path}")

    def _do(self, jobs: Sequence[Job], progress: LiveProgress) -> None:
        """Do jobs here, in processes or on a cluster."""

        def take_in(index: int, found: Any) -> None:
            progress.finish(self.take_in(jobs[index], found))
            self.show_finished(progress)

        if self.parsed.jobs == 1 and self.cluster is None:
            for index, job in enumerate(jobs):
                progress.begin(job.label, partial(self.describe_loss, job))
                take_in(index, job.do(Watch(progress.step, self.keeper(job))))
            return
        orders = [Order.of(job, self.keeper(job)) for job in jobs]
        if self.cluster is None:
            parallel.side_by_side(orders, self.parsed.jobs, progress, take_in)
        else:
            parallel.on_cluster(orders, self.cluster, self.record.started, progress, take_in)


def run(open_session: Callable[[Any], Session[Any]], parsed: TrainingOptions) -> int:
    """Run a command, and return its exit status.

    Args:
        open_session: checks everything that can be checked, then begins the session.
        parsed: what it is told.

    Raises:
        UsageError: arguments or data cannot work; nothing was written.
    """
    with _value_errors_are_the_users():
        session = open_session(parsed)
    torch.set_num_threads(session.parsed.threads)
    try:
        with _warnings_of_others_ignored(), session.cluster or nullcontext():
            session.work()
    except KeyboardInterrupt:
        print("interrupted: " + "\n".join(session.left), file=sys.stderr)
        return interruption.exit_status()
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    except (WriteError, ChildProcessError, ConnectionError) as error:
        raise type(error)("; ".join([str(error), *session.left])) from error
    return 0


def run_at_once(
    work: Callable[[Any, Path], int],
    parsed: OnDevice,
    *,
    results: str,
    files: Iterable[str],
    kept: str,
) -> int:
    """Run a command that is not gone on with after its end, and return its exit status.

    Args:
        work: is given the options, with a device that is there, and an empty folder.
        parsed: what the command is told.
        results: the file of its results, COMMAND.json.
        files: what else it writes at its end.
        kept: what the folder has after an early end, and a verb.

    Raises:
        UsageError: arguments cannot work; nothing was written.
    """
    with _value_errors_are_the_users():
        options = replace(parsed, device=resolve_device(parsed.device))
        place = folder_of(parsed, Path(results).stem)
        place.refuse_obstacles(files)
        folder = place.path
        if (folder / results).exists():
            raise ValueError(f"{str(folder)!r} already holds results: choose another --out")
        prepare_folder(folder)
    torch.set_num_threads(options.threads)
    try:
        with _warnings_of_others_ignored():
            return work(options, folder)
    except KeyboardInterrupt:
        print(f"interrupted: {_left(kept, folder)}", file=sys.stderr)
        return interruption.exit_status()
    except WriteError as error:
        raise WriteError(f"{error}; {_left(kept, folder)}") from error


def _left(kept: str, folder: Path) -> str:
    return f"{kept} in {folder}" if folder.exists() else _gone(folder)


def _gone(folder: Path) -> str:
    return f"nothing is kept, for {str(folder)!r} is gone: start anew"


def folder_of(parsed: Options, command: str) -> Folder:
    """Return the output folder that was asked for, or is named for the command and the time."""
    named = parsed.out or f"results/{command}-{datetime.now():%Y%m%d-%H%M%S}"
    return Folder(Path(named).expanduser())


def check_places(parsed: TrainingOptions, device: str) -> None:
    """Check that jobs can be done where they are to be done.

    Raises:
        ValueError: they cannot; the message says what to leave out.
    """
    if parsed.jobs > 1 and parsed.dask is not None:
        raise ValueError(
            f"--jobs {parsed.jobs} is for this machine and --dask {parsed.dask} for others, which "
            "do as many runs at a time as there are workers: leave one of them out"
        )
    if parsed.jobs > 1 and device != "cpu":
        raise ValueError(
            f"--jobs {parsed.jobs} would share one GPU, and every time would be wrong: leave it "
            "out, or add --device cpu"
        )
    cores = os.cpu_count() or 1
    if parsed.jobs * parsed.threads > cores:
        print(
            f"warning: {_counted(parsed.jobs, 'job')} of {_counted(parsed.threads, 'thread')} "
            f"share{'s' * (parsed.jobs == 1)} {_counted(cores, 'core')}: times, and what is "
            "trained for seconds of the clock, depend on who runs beside whom",
            file=sys.stderr,
        )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@contextmanager
def _warnings_of_others_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(nflows|normflows|joblib)\.")
        yield


@contextmanager
def _value_errors_are_the_users() -> Iterator[None]:
    try:
        yield
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(describe_os_error(error)) from error


# --- progress on stderr: where the command is, the loss, and the time left ------------------------


class TerminalBar:
    """A bar that is shown on a terminal for the duration of a block."""

    def __init__(
        self, total: int, done: int, *columns: ProgressColumn, quiet: bool, refresh: bool = True
    ) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            BarColumn(bar_width=24),
            *columns,
            console=self._console,
            transient=True,
            auto_refresh=refresh,
            speed_estimate_period=600.0,
        )
        self._task = self._bar.add_task("preparing", total=total, completed=done, loss="-")

    def __enter__(self: Bar) -> Bar:
        """Show the bar."""
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        self._bar.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bar away, so that something else can be printed."""
        self._bar.stop()
        yield
        self.__enter__()

    def _print_without_terminal(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class LiveProgress(TerminalBar):
    """A bar over all runs; without a terminal, one line per finished run."""

    def __init__(self, total: int, done: int, *, quiet: bool) -> None:
        """Start at `done` of `total` runs."""
        columns = (
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        super().__init__(total, done, *columns, quiet=quiet)
        self._done = done
        self._shown = 0.0
        self._describe: Callable[[float], str] = str

    def begin(self, label: str, describe: Callable[[float], str]) -> None:
        """Show what is under way, and how its loss in nats is to be described."""
        self._describe = describe
        self._bar.update(self._task, description=label, loss="-")

    def step(self, done: float, loss: float) -> None:
        """Show how far what is under way is, in runs, and the loss, given in nats."""
        if 0 <= done - self._shown < _RESOLUTION:
            return
        self._shown = done
        self._bar.update(self._task, completed=self._done + done, loss=self._describe(loss))

    def finish(self, line: str) -> None:
        """Count a run as finished; without a terminal, print a line about it."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        self._print_without_terminal(line)


class CaseProgress(TerminalBar):
    """A bar over all cases. It has no thread of its own, which would be timed with the work."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        """Start at no case of `total`."""
        label = TextColumn("{task.completed}/{task.total} {task.description}", markup=False)
        super().__init__(total, 0, label, TimeElapsedColumn(), quiet=quiet, refresh=False)

    @contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """Show a case for the duration of a block, and count it; without a terminal, print it."""
        refresh = self._console.is_terminal
        self._bar.update(self._task, description=label, refresh=refresh)
        self._print_without_terminal(label)
        yield
        self._bar.update(self._task, advance=1, refresh=refresh)
