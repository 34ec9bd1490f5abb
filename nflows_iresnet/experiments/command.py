"""`nflows-iresnet compare` and `table2`: check everything, run, save after each model, report."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nflows_iresnet.experiments import interruption, race, runner
from nflows_iresnet.experiments.checkpoints import CheckpointError, Keeper
from nflows_iresnet.experiments.config import RunConfig, UsageError
from nflows_iresnet.experiments.environment import check_extra, describe_environment
from nflows_iresnet.experiments.evaluation import Array
from nflows_iresnet.experiments.files import WriteError, describe_os_error, write_atomically
from nflows_iresnet.experiments.imagemodels import IMAGE_MODELS
from nflows_iresnet.experiments.jobs import Here, Order, SideBySide, Workplace
from nflows_iresnet.experiments.models import MODELS, ModelSpec
from nflows_iresnet.experiments.options import CompareOptions, to_config
from nflows_iresnet.experiments.presets import Preset
from nflows_iresnet.experiments.results import DatasetSummary, Folder, Record, Result, Trial, flags
from nflows_iresnet.training import History

if TYPE_CHECKING:
    from nflows_iresnet.experiments.progress import LiveProgress


@dataclass
class Session:
    """A comparison under way."""

    config: RunConfig
    runs: list[runner.Run]
    folder: Folder
    record: Record
    quiet: bool
    seconds_between_checkpoints: float
    jobs: int = 1
    shown: set[str] = field(default_factory=set)

    @property
    def pending(self) -> list[runner.Run]:
        """The runs without a result yet."""
        finished = {result.key for result in self.record.results}
        return [run for run in self.runs if run.key not in finished]

    @property
    def untried(self) -> list[runner.Job]:
        """The trials without an outcome yet."""
        tried = {(each.dataset, each.model, each.learning_rate) for each in self.record.trials}
        jobs = runner.every_job(self.pending, self.config)
        return [
            job
            for job in jobs
            if job.is_trial and (*job.run.key[:2], job.learning_rate) not in tried
        ]

    def keeper(self, job: runner.Job) -> Keeper:
        """Return what keeps the checkpoints of a job."""
        identity = [self.config.as_arguments(), job.key]
        path = self.folder.checkpoint(job.key)
        return Keeper(path, identity, self.seconds_between_checkpoints)

    def order(self, job: runner.Job) -> Order:
        """Return a job with all that it takes to do it."""
        tasks = list(dict.fromkeys(run.task.name for run in self.runs))
        source = self.config.datasets[tasks.index(job.run.task.name)]
        return Order(job, self.config, source, self.keeper(job))

    def summary(self, name: str) -> DatasetSummary:
        """Return the description of a data set."""
        return next(item for item in self.record.datasets if item.name == name)


def run(parsed: CompareOptions) -> int:
    """Run the subcommand and return the exit status.

    Raises:
        UsageError: arguments or data cannot work; nothing was written.
    """
    if parsed.list:
        print(catalogue())
        return 0
    with _value_errors_are_the_users():
        session = open_session(parsed)
    torch.set_num_threads(session.config.threads)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(nflows|normflows)\.")
            _work(session)
    except KeyboardInterrupt:
        print(f"interrupted: {_kept(session)}\ngo on with: {_resume(session)}", file=sys.stderr)
        return interruption.STATUS
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    except WriteError as error:
        raise WriteError(f"{error}; {_kept(session)}; go on with: {_resume(session)}") from error
    return 0


def catalogue() -> str:
    """List data sets and models with one line each."""
    from nflows_iresnet import datasets

    sections = {
        "datasets:": datasets.available(),
        "images (with --images):": datasets.available_images(),
        "models:": _described(MODELS),
        "models with --images:": _described(IMAGE_MODELS),
    }
    return "\n\n".join("\n".join([title, *_lines(text)]) for title, text in sections.items())


def _described(models: dict[str, ModelSpec]) -> dict[str, str]:
    return {name: spec.description for name, spec in models.items()}


def _lines(described: dict[str, str]) -> Iterator[str]:
    return (f"  {name:27}{description}" for name, description in described.items())


@contextmanager
def _value_errors_are_the_users() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(describe_os_error(error)) from error


def open_session(parsed: CompareOptions) -> Session:
    """Check everything that can be checked, then create the output folder.

    Raises:
        ValueError: something cannot work; the message names it and nothing was written.
    """
    check_extra()
    if parsed.resume and parsed.out is None:
        raise ValueError("--resume needs the --out folder of the run to go on with")
    config = to_config(parsed)
    if parsed.jobs > 1 and config.device != "cpu":
        raise ValueError(
            f"--jobs {parsed.jobs} would share one GPU, and every time would be wrong: leave it "
            "out, or add --device cpu"
        )
    runs = runner.prepare(config)
    preset: Preset = parsed.preset
    record = _fresh_record(config, runs, preset)
    folder = Folder(Path(parsed.out or f"results/{preset.command}-{datetime.now():%Y%m%d-%H%M%S}"))
    if parsed.resume:
        record = _resumed(folder, record)
    else:
        folder.refuse_results(Record.from_json)
    seconds = 60.0 * parsed.checkpoint_minutes
    session = Session(config, runs, folder, record, parsed.quiet, seconds, parsed.jobs)
    keepers = [session.keeper(job) for job in runner.every_job(session.pending, config)]
    if parsed.resume:
        for keeper in keepers:
            keeper.load()
    folder.create()
    folder.save_record(record)
    if not parsed.resume:
        for keeper in keepers:
            keeper.discard()
    return session


def _fresh_record(config: RunConfig, runs: list[runner.Run], preset: Preset) -> Record:
    tasks = {run.task.name: run.task for run in runs}
    return Record(
        arguments=config.as_arguments(),
        environment=describe_environment(config.device),
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
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


def _work(session: Session) -> None:
    from nflows_iresnet.experiments.progress import LiveProgress

    left, done = len(session.pending) + len(session.untried), len(session.record.results)
    total = left + done + len(session.record.trials)
    with (
        LiveProgress(total, total - left, quiet=session.quiet) as progress,
        _workplace(session, progress) as workplace,
    ):
        _show_finished(session, progress)
        while True:
            _begin(session, workplace, progress)
            if not workplace.running:
                break
            order, (outcome, arrays) = workplace.finished()
            _take_in(session, order, outcome, arrays, progress)
            _show_finished(session, progress)
    _write_report(session)


def _workplace(
    session: Session, progress: LiveProgress
) -> AbstractContextManager[Here | SideBySide]:
    if session.jobs == 1:
        return nullcontext(Here(progress.step))
    return SideBySide(session.jobs, session.config.threads)


def _begin(session: Session, workplace: Workplace, progress: LiveProgress) -> None:
    """Begin what can be begun, and show it."""
    running = {job.key for job in workplace.running}
    for job in runner.to_do(session.runs, session.config, session.record):
        if workplace.has_room and job.key not in running:
            workplace.begin(session.order(job))
    jobs = workplace.running
    if len(jobs) == 1:
        dataset = session.summary(jobs[0].run.task.name)
        progress.begin(jobs[0].label, partial(_loss, dataset))
    elif jobs:
        progress.begin(f"{len(jobs)} side by side, the first {jobs[0].label}")


def _take_in(
    session: Session,
    order: Order,
    outcome: Result | Trial,
    arrays: dict[str, Array],
    progress: LiveProgress,
) -> None:
    """Write what is finished to the folder at once."""
    run, record = order.job.run, session.record
    dataset = session.summary(run.task.name)
    if isinstance(outcome, Trial):
        record = replace(record, trials=(*record.trials, outcome))
        line = _trial_line(outcome)
    else:
        session.folder.save_arrays(run.key, arrays)
        record = replace(record, results=(*record.results, outcome))
        line = _line(outcome, dataset)
    session.folder.save_record(record)
    session.record = record
    if isinstance(outcome, Result):
        for job in runner.every_job([run], session.config):
            session.keeper(job).discard()
    if record.is_race:
        race.write(record, session.folder, dataset)
    progress.finish(line)


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
    if result.training is not None and result.training.capture_reason is not None:
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
    from nflows_iresnet.experiments import bars, imageplots, plots, tables

    task = next(run.task for run in session.runs if run.task.name == name)
    summary = session.summary(name)
    session.folder.save_arrays((name,), task.arrays())
    draw = plots.draw if summary.shape is None else imageplots.draw
    pictures = draw(session.record, session.folder, summary)
    if session.record.published:
        pictures |= bars.draw(session.record, session.folder, summary)
    for path, picture in pictures.items():
        write_atomically(path, picture)
    if not session.quiet:
        tables.print_table(tables.make_console(), session.record, session.folder, summary)


def _write_report(session: Session) -> None:
    from nflows_iresnet.experiments.report import render

    path = session.folder.path / "report.html"
    write_atomically(path, render(session.record, session.folder).encode())
    print(path if session.quiet else f"\nreport: {path}")


def _kept(session: Session) -> str:
    pending = (job.key for job in runner.every_job(session.pending, session.config))
    return session.folder.kept(len(session.record.results), len(session.runs), pending)


def _resume(session: Session) -> str:
    from nflows_iresnet.experiments.report import command_line

    return session.folder.resume(command_line(session.record))
