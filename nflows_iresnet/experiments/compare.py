"""`nflows-iresnet compare` and `table2`: flows on the same data, and which wins."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from nflows_iresnet.experiments import runs, saved, session
from nflows_iresnet.experiments.config import RunConfig
from nflows_iresnet.experiments.evaluation import Array
from nflows_iresnet.experiments.options import CompareOptions, to_config
from nflows_iresnet.experiments.record import DatasetSummary, Record, Result, Trial
from nflows_iresnet.experiments.runs import Job, Outcome, Run
from nflows_iresnet.experiments.session import LiveProgress, Session
from nflows_iresnet.files import write_atomically
from nflows_iresnet.training import History


def open_session(parsed: CompareOptions) -> Comparison:
    """Check everything that can be checked, then create the output folder.

    Raises:
        ValueError: something cannot work; the message names it and nothing was written.
    """
    from nflows_iresnet.experiments.tables import check_columns

    config = to_config(parsed)
    session.check_places(parsed, config.device)
    prepared = runs.prepare(config)
    tasks = {run.task.name: run.task for run in prepared}
    record = Record.begin(
        config.as_arguments(),
        config.device,
        datasets=tuple(task.summarise() for task in tasks.values()),
        command=parsed.preset.command,
        published=parsed.preset.published_beside(images=config.images),
    )
    check_columns(record)
    folder = session.folder_of(parsed, parsed.preset.command)
    comparison = Comparison(parsed, record, folder, config=config, prepared=prepared)
    comparison.begin()
    return comparison


run = partial(session.run, open_session)
"""Run the subcommand and return the exit status."""


@dataclass(kw_only=True)
class Comparison(Session[Record]):
    """A comparison under way.

    Args:
        config: every choice.
        prepared: every run, finished or not.
        shown: the data sets that were drawn and printed.
    """

    config: RunConfig
    prepared: Sequence[Run]
    shown: set[str] = field(default_factory=set)

    @property
    def files(self) -> Sequence[str]:
        """The rows, the page, a picture of each data set, and what else a race has."""
        names = [dataset.name for dataset in self.record.datasets]
        files = ["results.csv", "report.html", *(self.folder.picture(name).name for name in names)]
        if self.record.is_race:
            files += ["race.md", *(self.folder.picture(name, "race").name for name in names)]
        return files

    @property
    def folders(self) -> Sequence[str]:
        """That of the weights."""
        return ("weights",)

    @property
    def runs(self) -> tuple[int, int]:
        """How many runs are finished, and how many there are."""
        return len(self.record.results), len(self.prepared)

    @property
    def trials(self) -> tuple[int, int]:
        """How many learning rates are tried, and how many are to be."""
        done = len(self.record.trials)
        return done, done + len(runs.trials_to_do(self.prepared, self.config, self.record))

    @property
    def may_be_under_way(self) -> Sequence[Job]:
        """Every job of the unfinished runs that may have a checkpoint."""
        return runs.every_job(runs.pending(self.prepared, self.record), self.config)

    def to_do(self) -> Sequence[Job]:
        """Return the learning rates to be tried, then the runs."""
        settings = self.prepared, self.config, self.record
        return runs.trials_to_do(*settings) or runs.runs_to_do(*settings)

    def work(self) -> None:
        """Keep what pictures and loaded flows need of the data, then do the rest."""
        for task in {run.task.name: run.task for run in self.prepared}.values():
            self.folder.save_arrays((task.name,), task.arrays())
        super().work()

    def go_on(self) -> None:
        """Take up the record of the folder, but for the runs whose weights are lost."""
        super().go_on()
        kept = []
        for result in self.record.results:
            self.folder.load_arrays(result.key)
            if result.training is not None:
                try:
                    saved.read(self.folder.weights(result.key), result.model)
                except ValueError as error:
                    print(f"{error}: that run is done again", file=sys.stderr)
                    continue
            kept.append(result)
        self.record = replace(self.record, results=tuple(kept))

    def take_in(self, job: Job, found: Outcome) -> str:
        """Keep what a job found at once, and return a line about it."""
        what, arrays, weights = found
        dataset = self.summary(job.run.task.name)
        if isinstance(what, Trial):
            self.save(replace(self.record, trials=(*self.record.trials, what)))
            line = _trial_line(what)
        else:
            self._keep(what, arrays, weights)
            for each in runs.every_job([job.run], self.config):
                self.keeper(each).discard()
            line = _line(what, dataset)
        if self.record.is_race:
            from nflows_iresnet.experiments.report import write_race

            write_race(self.record, self.folder, dataset)
        return line

    def _keep(self, result: Result, arrays: dict[str, Array], weights: bytes | None) -> None:
        self.folder.save_arrays(result.key, arrays)
        if weights is not None:
            self.folder.save_weights(result.key, weights)
        self.folder.write_scalars(result)
        self.save(replace(self.record, results=(*self.record.results, result)))

    def summary(self, name: str) -> DatasetSummary:
        """Return the description of a data set."""
        return next(item for item in self.record.datasets if item.name == name)

    def describe_loss(self, job: Job, loss: float) -> str:
        """Describe a loss in nats, of images in bits per dimension."""
        data = self.summary(job.run.task.name)
        bits = None if data.shape is None else data.bits_per_dim(loss)
        return super().describe_loss(job, loss) if bits is None else f"{bits:.3f} bits/dim"

    def show_finished(self, progress: LiveProgress) -> None:
        """Draw and print the data sets of which everything is finished, each once."""
        pending = {run.task.name for run in runs.pending(self.prepared, self.record)}
        for dataset in self.record.datasets:
            if dataset.name not in pending | self.shown:
                self.shown.add(dataset.name)
                with progress.paused():
                    self._show(dataset)

    def _show(self, dataset: DatasetSummary) -> None:
        from nflows_iresnet.experiments import pictures, tables

        for path, picture in pictures.draw(self.record, self.folder, dataset).items():
            write_atomically(path, picture)
        if not self.parsed.quiet:
            tables.print_table(tables.make_console(), self.record, self.folder, dataset)

    def report(self) -> Path:
        """Write the report, and return its path."""
        from nflows_iresnet.experiments.report import render

        path = self.folder.path / "report.html"
        write_atomically(path, render(self.record, self.folder).encode())
        return path


def _trial_line(trial: Trial) -> str:
    from nflows_iresnet.experiments.tables import number

    found = trial.failure or f"validation NLL {number(trial.validation)} nats"
    return f"{trial.dataset} · {trial.model} · learning rate {trial.learning_rate:g}: {found}"


def _line(result: Result, data: DatasetSummary) -> str:
    from nflows_iresnet.experiments.tables import number

    nll, bits = result.metrics.test_nll, result.metrics.bits_per_dim
    parts = [f"FAILED {failure}" for failure in result.failures]
    if nll is not None:
        score = f"{number(nll)} nats" if bits is None else f"{number(bits)} bits/dim"
        parts.insert(0, f"test NLL {score}")
    if result.training is not None:
        parts.append(_end(result.training))
        if result.training.capture_reason is not None:
            parts.append(f"steps not captured: {result.training.capture_reason}")
    return f"{result.dataset} · {result.model} · repeat {result.repeat}: {'; '.join(parts)}"


def _end(training: History) -> str:
    """Say when a training stopped, and where it was best."""
    early = "stopped early at" if training.stopped == "patience" else "of"
    return f"best at step {training.best_step} {early} {training.steps}"
