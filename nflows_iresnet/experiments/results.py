"""Results as plain data, and the folder that keeps them."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nflows_iresnet.experiments.config import slug
from nflows_iresnet.experiments.environment import check_environment
from nflows_iresnet.experiments.evaluation import Array, Metrics
from nflows_iresnet.experiments.files import prepare_folder, write_atomically
from nflows_iresnet.experiments.plain import finite, parse, rebuild
from nflows_iresnet.training import History

FORMAT = 1
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class DatasetSummary:
    """What a reader of the results needs to know about a data set.

    Args:
        name: unique within a run.
        source: where the rows come from.
        features: dimensions.
        num_train: training rows.
        num_validation: validation rows.
        num_test: test rows.
        optimum: mean negative true log-density of the test rows in nats, None if not known.
        optimum_se: its standard error.
        log_scale: what to add to an NLL for nats in the data's original units.
        levels: how many values a quantised feature took before its noise, None if not quantised.
        notes: what was changed or deserves care.
        shape: channels, height and width of images, None for rows of a table.
    """

    name: str
    source: str
    features: int
    num_train: int
    num_validation: int
    num_test: int
    optimum: float | None
    optimum_se: float | None
    log_scale: float
    levels: int | None
    notes: tuple[str, ...]
    shape: tuple[int, ...] | None = None

    def bits_per_dim(self, nats: float) -> float | None:
        """Convert nats per row to bits per dimension of quantised data; None for other data."""
        if self.levels is None:
            return None
        return ((nats + self.log_scale) / self.features + math.log(self.levels)) / math.log(2)


@dataclass(frozen=True)
class Result:
    """One model trained once on one data set.

    Args:
        dataset: name of the data set.
        model: name of the model.
        repeat: 0, 1, ...
        seed: seed of the weights, the batches and the samples.
        hyperparameters: the size of the model.
        num_parameters: trained parameters.
        failures: what went wrong, in words; empty if nothing did.
        training: the log, or None if training failed.
        metrics: the measurements.
        model_class: the class of what was trained.
        learning_rate: with which it was trained.
    """

    dataset: str
    model: str
    repeat: int
    seed: int
    hyperparameters: dict[str, Any]
    num_parameters: int
    failures: tuple[str, ...]
    training: History | None
    metrics: Metrics
    model_class: str | None = None
    learning_rate: float | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """Data set, model and repeat."""
        return self.dataset, self.model, self.repeat


@dataclass(frozen=True)
class Trial:
    """A learning rate tried: trained with the first seed and validated, never tested.

    Args:
        dataset: name of the data set.
        model: name of the model.
        learning_rate: what is tried.
        validation: the best NLL of the validation rows in nats, None if there is none.
        steps: optimiser steps that it took.
        seconds: their time, which no result counts.
        failure: what went wrong, None if nothing did.
    """

    dataset: str
    model: str
    learning_rate: float
    validation: float | None = None
    steps: int = 0
    seconds: float = 0.0
    failure: str | None = None


@dataclass(frozen=True)
class Record:
    """The content of results.json.

    Args:
        arguments: the arguments of the run.
        environment: versions, device and machine.
        started: ISO date and time.
        datasets: the data sets, in the order of the arguments.
        results: what is finished, in the order of its end.
        command: the subcommand.
        published: by model and data set, numbers to be shown beside those measured.
        trials: the learning rates tried, of which each model got the best.
    """

    arguments: dict[str, Any]
    environment: dict[str, Any]
    started: str
    datasets: tuple[DatasetSummary, ...]
    results: tuple[Result, ...] = ()
    command: str = "compare"
    published: dict[str, dict[str, str]] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()

    def of(self, dataset: str) -> list[Result]:
        """Return the results on one data set."""
        return [result for result in self.results if result.dataset == dataset]

    def trials_of(self, dataset: str, model: str) -> list[Trial]:
        """Return the learning rates tried for a model, the best first."""
        found = [each for each in self.trials if (each.dataset, each.model) == (dataset, model)]
        return sorted(found, key=lambda t: math.inf if t.validation is None else t.validation)

    @property
    def is_race(self) -> bool:
        """Whether every model had the same time."""
        return self.arguments.get("race") is not None

    def as_json(self) -> str:
        """Serialise; numbers that are not finite become null."""
        return json.dumps(finite({"format": FORMAT, **asdict(self)}), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Rebuild a record from `as_json`.

        Raises:
            ValueError: not a record of this format.
        """
        record: Record = rebuild(cls, parse(text, FORMAT))
        check_environment(record.environment)
        return record


@dataclass(frozen=True)
class Folder:
    """The output folder: results.json, runs/*.npz, runs/*.pt under way, *.png and report.html.

    A race adds race.md.
    """

    path: Path

    @property
    def results(self) -> Path:
        """The file that everything else can be rendered from."""
        return self.path / "results.json"

    def create(self) -> None:
        """Make the folder and prove that it can be written.

        Raises:
            ValueError: it cannot.
        """
        prepare_folder(self.path / "runs")

    def refuse_results(self, from_json: Callable[[str], object]) -> None:
        """Make sure that no results are overwritten.

        Args:
            from_json: rebuilds a record that could be gone on with.

        Raises:
            ValueError: the folder holds some; the message says how to go on.
        """
        if os.path.exists(self.results):
            self._read(from_json, f"{str(self.results)!r} is in the way")
            raise ValueError(
                f"{str(self.path)!r} already holds results: add --resume to go on with them, "
                "or choose another --out"
            )

    def check_same(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        """Make sure that a run goes on as it began.

        Args:
            then: choices by name, as the folder has them.
            now: as they are asked for.

        Raises:
            ValueError: one differs; the message names it.
        """
        for name in {**then, **now}:
            if then.get(name) != now.get(name):
                raise ValueError(
                    f"cannot resume {str(self.path)!r}: {name} was {_shown(then.get(name))} "
                    f"there and is {_shown(now.get(name))} now; use the same, or another --out"
                )

    def save_record(self, record: Record) -> None:
        """Write results.json."""
        write_atomically(self.results, record.as_json().encode())

    def load_record(self) -> Record:
        """Read results.json; see `load`."""
        return self.load(Record.from_json)

    def load(self, from_json: Callable[[str], Loaded]) -> Loaded:
        """Read results.json.

        Args:
            from_json: rebuilds the record that it holds.

        Raises:
            ValueError: it is not there or not readable.
        """
        return self._read(from_json, f"cannot resume from {str(self.results)!r}")

    def _read(self, from_json: Callable[[str], Loaded], complaint: str) -> Loaded:
        try:
            return from_json(self.results.read_bytes().decode())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"{complaint}: there is none; start anew without --resume") from error
        except Exception as error:  # a damaged file may raise anything
            reason = error.strerror if isinstance(error, OSError) else str(error)
            paths = (shlex.quote(f"{self.results}{suffix}") for suffix in ("", ".damaged"))
            raise ValueError(
                f"{complaint}: {reason}; choose another --out, or move it away "
                f"(mv {' '.join(paths)}) and start anew without --resume"
            ) from error

    def save_arrays(self, key: tuple[str | int, ...], arrays: dict[str, Array]) -> None:
        """Write the arrays of one run, or of one data set."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomically(self._arrays(key), buffer.getvalue())

    def load_arrays(self, key: tuple[str | int, ...]) -> dict[str, Array]:
        """Read what `save_arrays` wrote; empty if there is nothing.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._arrays(key)
        if not path.exists():
            return {}
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except Exception as error:  # a damaged file may raise anything
            raise ValueError(
                f"{str(path)!r} is damaged; delete it (rm {shlex.quote(str(path))}) to go on "
                "without the pictures that it is for"
            ) from error

    def save_weights(self, key: tuple[str | int, ...], weights: bytes) -> None:
        """Write the trained weights of one run (stub)."""

    def write_scalars(self, result: Result) -> None:
        """Write the curves of one run for TensorBoard (stub)."""

    def picture(self, *parts: str) -> Path:
        """Return the path of a picture: of a data set, or of a model on it."""
        return self.path / f"{'--'.join(map(slug, parts))}.png"

    def checkpoint(self, key: tuple[str | int, ...]) -> Path:
        """Return the path of the checkpoint of a run under way."""
        return self._arrays(key).with_suffix(".pt")

    def kept(self, done: int, total: int, pending: Iterable[tuple[str | int, ...]]) -> str:
        """Say what a later run need not do again.

        Args:
            done: finished runs.
            total: all runs.
            pending: keys of those without a result, which may have a checkpoint.
        """
        saved = [str(path) for key in pending if (path := self.checkpoint(key)).exists()]
        under_way = f", and {len(saved)} under way up to their last checkpoints (in runs)"
        if len(saved) < 2:
            one = ", and the one under way up to its last checkpoint ({})"
            under_way = one.format(*saved) if saved else ""
        return f"{done} of {total} runs are kept in {self.path}{under_way}"

    def resume(self, command_line: str) -> str:
        """Return the command that goes on with the one that filled the folder."""
        return f"{command_line} --out {shlex.quote(str(self.path))} --resume"

    def _arrays(self, key: tuple[str | int, ...]) -> Path:
        return self.path / "runs" / ("--".join(slug(str(part)) for part in key) + ".npz")


def flags(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by the names that they have on the command line."""
    return {f"--{name.replace('_', '-')}": value for name, value in arguments.items()}


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
