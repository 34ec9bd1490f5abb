"""`nflows-iresnet compare` and `table2`: check everything, run, save after each model, report."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nflows_iresnet.compare import interruption, runner
from nflows_iresnet.compare.arguments import to_config
from nflows_iresnet.compare.checkpoints import CheckpointError, Keeper
from nflows_iresnet.compare.config import RunConfig, UsageError
from nflows_iresnet.compare.environment import check_extra, describe_environment
from nflows_iresnet.compare.files import WriteError, describe_os_error, write_atomically
from nflows_iresnet.compare.imagemodels import IMAGE_MODELS
from nflows_iresnet.compare.models import MODELS, ModelSpec
from nflows_iresnet.compare.presets import Preset
from nflows_iresnet.compare.results import DatasetSummary, Folder, Record, Result, flags

if TYPE_CHECKING:
    from nflows_iresnet.compare.progress import LiveProgress


@dataclass
class Session:
    """A comparison under way."""

    config: RunConfig
    runs: list[runner.Run]
    folder: Folder
    record: Record
    quiet: bool
    seconds_between_checkpoints: float

    @property
    def pending(self) -> list[runner.Run]:
        """The runs without a result yet."""
        finished = {result.key for result in self.record.results}
        return [run for run in self.runs if run.key not in finished]

    def keeper(self, item: runner.Run) -> Keeper:
        """Return what keeps the checkpoints of a run."""
        identity = [self.config.as_arguments(), item.key]
        path = self.folder.checkpoint(item.key)
        return Keeper(path, identity, self.seconds_between_checkpoints)

    def summary(self, name: str) -> DatasetSummary:
        """Return the description of a data set."""
        return next(item for item in self.record.datasets if item.name == name)


def run(parsed: argparse.Namespace) -> int:
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


def open_session(parsed: argparse.Namespace) -> Session:
    """Check everything that can be checked, then create the output folder.

    Raises:
        ValueError: something cannot work; the message names it and nothing was written.
    """
    check_extra()
    if parsed.resume and parsed.out is None:
        raise ValueError("--resume needs the --out folder of the run to go on with")
    config = to_config(parsed)
    runs = runner.prepare(config)
    preset: Preset = parsed.preset
    record = _fresh_record(config, runs, preset)
    folder = Folder(Path(parsed.out or f"results/{preset.command}-{datetime.now():%Y%m%d-%H%M%S}"))
    if parsed.resume:
        record = _resumed(folder, record)
    else:
        folder.refuse_results(Record.from_json)
    session = Session(config, runs, folder, record, parsed.quiet, 60.0 * parsed.checkpoint_minutes)
    keepers = [session.keeper(item) for item in session.pending]
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
    from nflows_iresnet.compare.progress import LiveProgress

    pending = session.pending
    total = len(session.runs)
    with LiveProgress(total, total - len(pending), quiet=session.quiet) as progress:
        for dataset in session.record.datasets:
            for item in (run for run in pending if run.task.name == dataset.name):
                _finish(session, item, progress)
            with progress.paused():
                _show(session, dataset.name)
    _write_report(session)


def _finish(session: Session, item: runner.Run, progress: LiveProgress) -> None:
    dataset, keeper = session.summary(item.task.name), session.keeper(item)
    progress.begin(_label(item.key), partial(_loss, dataset))
    result, arrays = runner.execute(item, session.config, progress.step, keeper)
    session.folder.save_arrays(item.key, arrays)
    record = replace(session.record, results=(*session.record.results, result))
    session.folder.save_record(record)
    session.record = record
    keeper.discard()
    progress.finish(_line(result, dataset))


def _label(key: tuple[str, str, int]) -> str:
    dataset, model, repeat = key
    return f"{dataset} · {model}" + (f" · repeat {repeat + 1}" if repeat else "")


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
    if result.training is not None and result.training.capture_reason is not None:
        parts.append(f"steps not captured: {result.training.capture_reason}")
    return f"{result.dataset} · {result.model} · repeat {result.repeat + 1}: {'; '.join(parts)}"


def _show(session: Session, name: str) -> None:
    from nflows_iresnet.compare import bars, imageplots, plots, tables

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
    from nflows_iresnet.compare.report import render

    path = session.folder.path / "report.html"
    write_atomically(path, render(session.record, session.folder).encode())
    print(path if session.quiet else f"\nreport: {path}")


def _kept(session: Session) -> str:
    pending = (item.key for item in session.pending)
    return session.folder.kept(len(session.record.results), len(session.runs), pending)


def _resume(session: Session) -> str:
    from nflows_iresnet.compare.report import command_line

    return session.folder.resume(command_line(session.record))
