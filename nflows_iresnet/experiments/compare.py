"""`nflows-iresnet compare` and `table2`: check everything, run, save after each model, report."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nflows_iresnet import interruption
from nflows_iresnet.experiments import checkpoints, parallel, runs
from nflows_iresnet.experiments.checkpoints import CheckpointError, Keeper
from nflows_iresnet.experiments.config import RunConfig, UsageError
from nflows_iresnet.experiments.environment import check_extra
from nflows_iresnet.experiments.files import WriteError, describe_os_error, write_atomically
from nflows_iresnet.experiments.options import CompareOptions, to_config
from nflows_iresnet.experiments.presets import Preset
from nflows_iresnet.experiments.record import DatasetSummary, Folder, Record, Result, Trial, flags
from nflows_iresnet.experiments.runs import Job, Outcome, Run
from nflows_iresnet.training import History

if TYPE_CHECKING:
    from nflows_iresnet.experiments.progress import LiveProgress


@dataclass
class Session:
    """A comparison under way."""

    config: RunConfig
    runs: list[Run]
    folder: Folder
    record: Record
    quiet: bool
    seconds_between_checkpoints: float
    jobs: int = 1
    cluster: Any = None
    shown: set[str] = field(default_factory=set)

    @property
    def pending(self) -> list[Run]:
        """The runs without a result yet."""
        return runs.pending(self.runs, self.record)

    def keeper(self, job: Job) -> Keeper:
        """Return what keeps the checkpoints of a job."""
        identity = [self.config.as_arguments(), job.key]
        path = self.folder.checkpoint(job.key)
        return Keeper(path, identity, self.seconds_between_checkpoints)

    def keepers(self, of: Sequence[Run]) -> list[Keeper]:
        """Return what keeps the checkpoints of runs."""
        return [self.keeper(job) for job in runs.every_job(of, self.config)]

    def summary(self, name: str) -> DatasetSummary:
        """Return the description of a data set."""
        return next(item for item in self.record.datasets if item.name == name)

    @property
    def kept(self) -> str:
        """What a later command need not do again."""
        keys = (job.key for job in runs.every_job(self.pending, self.config))
        return self.folder.kept(len(self.record.results), len(self.runs), keys)

    @property
    def resume(self) -> str:
        """The command that goes on."""
        from nflows_iresnet.experiments.report import command_line

        return f"go on with: {self.folder.resume(command_line(self.record))}"


def run(parsed: CompareOptions) -> int:
    """Run the subcommand and return the exit status.

    Raises:
        UsageError: arguments or data cannot work; nothing was written.
    """
    with _value_errors_are_the_users():
        session = open_session(parsed)
    torch.set_num_threads(session.config.threads)
    try:
        with warnings.catch_warnings(), session.cluster or nullcontext():
            warnings.filterwarnings("ignore", module=r"(nflows|normflows|joblib)\.")
            _work(session)
    except KeyboardInterrupt:
        print(f"interrupted: {session.kept}\n{session.resume}", file=sys.stderr)
        return interruption.STATUS
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    except (WriteError, ChildProcessError, ConnectionError) as error:
        raise type(error)(f"{error}; {session.kept}; {session.resume}") from error
    return 0


@contextmanager
def _value_errors_are_the_users() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(describe_os_error(error)) from error


# --- before anything is trained -------------------------------------------------------------------


def open_session(parsed: CompareOptions) -> Session:
    """Check everything that can be checked, then create the output folder.

    Raises:
        ValueError: something cannot work; the message names it and nothing was written.
    """
    check_extra()
    config = to_config(parsed)
    _check_places(parsed, config)
    prepared = runs.prepare(config)
    preset: Preset = parsed.preset
    record = _fresh_record(config, prepared, preset)
    folder = Folder(Path(parsed.out or f"results/{preset.command}-{datetime.now():%Y%m%d-%H%M%S}"))
    if parsed.resume:
        record = _resumed(folder, record)
    else:
        folder.refuse_results(Record.from_json)
    seconds = 60.0 * parsed.checkpoint_minutes
    session = Session(config, prepared, folder, record, parsed.quiet, seconds, parsed.jobs)

    def write() -> None:
        if parsed.dask is not None:
            session.cluster = parallel.connect(parsed.dask)
        folder.create()
        folder.save_record(record)

    checkpoints.begin(session.keepers(session.pending), write, resume=parsed.resume)
    return session


def _check_places(parsed: CompareOptions, config: RunConfig) -> None:
    if parsed.jobs > 1 and parsed.dask is not None:
        raise ValueError(
            f"--jobs {parsed.jobs} is for this machine and --dask {parsed.dask} for others, which "
            "do as many runs at a time as there are workers: leave one of them out"
        )
    if parsed.jobs > 1 and config.device != "cpu":
        raise ValueError(
            f"--jobs {parsed.jobs} would share one GPU, and every time would be wrong: leave it "
            "out, or add --device cpu"
        )


def _fresh_record(config: RunConfig, prepared: list[Run], preset: Preset) -> Record:
    tasks = {run.task.name: run.task for run in prepared}
    return Record.begin(
        config.as_arguments(),
        config.device,
        datasets=tuple(task.summarise() for task in tasks.values()),
        command=preset.command,
        published=preset.published_beside(images=config.images),
    )


def _resumed(folder: Folder, now: Record) -> Record:
    then = folder.load_record()
    folder.check_same({"the command": then.command}, {"the command": now.command})
    folder.check_same(flags(then.arguments), flags(now.arguments))
    folder.check_same(then.environment["versions"], now.environment["versions"])
    if then.datasets != now.datasets:
        raise ValueError(
            f"cannot resume {str(folder.path)!r}: the data have changed since; choose another --out"
        )
    for result in then.results:
        folder.load_arrays(result.key)
    return then


# --- the work -------------------------------------------------------------------------------------


def _work(session: Session) -> None:
    from nflows_iresnet.experiments.progress import LiveProgress

    for task in {run.task.name: run.task for run in session.runs}.values():
        session.folder.save_arrays((task.name,), task.arrays())
    done = len(session.record.results) + len(session.record.trials)
    settings = (session.runs, session.config)
    trials = runs.trials_to_do(*settings, session.record)
    places = parallel.processes_ended() if session.jobs > 1 else nullcontext()
    total = done + len(trials) + len(session.pending)
    with LiveProgress(total, done, quiet=session.quiet) as progress, places:
        _show_finished(session, progress)
        _do(session, trials, progress)
        _do(session, runs.runs_to_do(*settings, session.record), progress)
    _write_report(session)


def _do(session: Session, jobs: list[Job], progress: LiveProgress) -> None:
    """Do jobs here, in processes or on a cluster, and take in each when it is finished."""

    def take_in(index: int, outcome: Outcome) -> None:
        _take_in(session, jobs[index].run, outcome, progress)

    if session.jobs == 1 and session.cluster is None:
        for index, job in enumerate(jobs):
            progress.begin(job.label, partial(_loss, session.summary(job.run.task.name)))
            take_in(index, job.do(progress.step, session.keeper(job)))
    elif jobs:
        names = list(dict.fromkeys(run.task.name for run in session.runs))
        wanted = dict(zip(names, session.config.datasets, strict=True))
        orders = [
            parallel.Order.of(job, wanted[job.run.task.name], session.keeper(job)) for job in jobs
        ]
        if session.cluster is None:
            parallel.side_by_side(orders, session.jobs, progress, take_in)
        else:
            started = session.record.started
            parallel.on_cluster(orders, session.cluster, started, progress, take_in)


def _take_in(session: Session, run: Run, outcome: Outcome, progress: LiveProgress) -> None:
    """Write what is finished to the folder at once."""
    (found, arrays, weights), folder = outcome, session.folder
    dataset = session.summary(run.task.name)
    if isinstance(found, Trial):
        record = replace(session.record, trials=(*session.record.trials, found))
    else:
        folder.save_arrays(run.key, arrays)
        if weights is not None:
            folder.save_weights(run.key, weights)
        folder.write_scalars(found)
        record = replace(session.record, results=(*session.record.results, found))
    folder.save_record(record)
    session.record = record
    if isinstance(found, Result):
        for keeper in session.keepers([run]):
            keeper.discard()
    if record.is_race:
        from nflows_iresnet.experiments.report import write_race

        write_race(record, folder, dataset)
    progress.finish(_trial_line(found) if isinstance(found, Trial) else _line(found, dataset))
    _show_finished(session, progress)


# --- what is said ---------------------------------------------------------------------------------


def _trial_line(trial: Trial) -> str:
    found = trial.failure or f"validation NLL {trial.validation:.3f} nats"
    return f"{trial.dataset} · {trial.model} · learning rate {trial.learning_rate:g}: {found}"


def _loss(data: DatasetSummary, nats: float) -> str:
    """Return the loss of a training under way, of images in bits per dimension."""
    bits = None if data.shape is None else data.bits_per_dim(nats)
    return f"loss {nats:.3f}" if bits is None else f"{bits:.3f} bits/dim"


def _line(result: Result, data: DatasetSummary) -> str:
    nll, bits = result.metrics.test_nll, result.metrics.bits_per_dim
    parts = [f"FAILED {failure}" for failure in result.failures]
    if nll is not None:
        score = f"{nll:.3f} nats" if bits is None else f"{bits:.3f} bits/dim"
        parts.insert(0, f"test NLL {score}")
    if result.training is not None:
        parts.append(_end(result.training))
        if result.training.capture_reason is not None:
            parts.append(f"steps not captured: {result.training.capture_reason}")
    return f"{result.dataset} · {result.model} · repeat {result.repeat + 1}: {'; '.join(parts)}"


def _end(training: History) -> str:
    """Say when a training stopped, and where it was best."""
    early = "stopped early at" if training.stopped == "patience" else "of"
    return f"best at step {training.best_step} {early} {training.steps}"


def _show_finished(session: Session, progress: LiveProgress) -> None:
    """Draw and print the data sets of which everything is finished, each once."""
    pending = {run.task.name for run in session.pending}
    for dataset in session.record.datasets:
        if dataset.name not in pending | session.shown:
            session.shown.add(dataset.name)
            with progress.paused():
                _show(session, dataset.name)


def _show(session: Session, name: str) -> None:
    from nflows_iresnet.experiments import pictures, tables

    summary = session.summary(name)
    drawn = pictures.draw(session.record, session.folder, summary)
    for path, picture in drawn.items():
        write_atomically(path, picture)
    if not session.quiet:
        tables.print_table(tables.make_console(), session.record, session.folder, summary)


def _write_report(session: Session) -> None:
    from nflows_iresnet.experiments.report import render

    path = session.folder.path / "report.html"
    write_atomically(path, render(session.record, session.folder).encode())
    print(path if session.quiet else f"\nreport: {path}")
