"""Results as plain data, and the folder that keeps them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nflows_iresnet.compare.config import slug
from nflows_iresnet.compare.evaluation import Array, Metrics
from nflows_iresnet.compare.files import write_atomically as write_atomically
from nflows_iresnet.compare.training import CurvePoint, TrainingLog

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

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DatasetSummary:
        """Rebuild a summary from plain JSON data."""
        shape = data.get("shape")
        rebuilt = {"notes": tuple(data["notes"]), "shape": None if shape is None else tuple(shape)}
        return cls(**{**data, **rebuilt})

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
    """

    dataset: str
    model: str
    repeat: int
    seed: int
    hyperparameters: dict[str, Any]
    num_parameters: int
    failures: tuple[str, ...]
    training: TrainingLog | None
    metrics: Metrics
    model_class: str | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """Data set, model and repeat."""
        return self.dataset, self.model, self.repeat

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """Rebuild a result from `as_json`."""
        log = data["training"]
        if log is not None:
            log = TrainingLog(**{**log, "curve": tuple(CurvePoint(**p) for p in log["curve"])})
        rebuilt = {
            "failures": tuple(data["failures"]),
            "training": log,
            "metrics": Metrics(**data["metrics"]),
        }
        return cls(**{**data, **rebuilt})


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
    """

    arguments: dict[str, Any]
    environment: dict[str, Any]
    started: str
    datasets: tuple[DatasetSummary, ...]
    results: tuple[Result, ...] = ()
    command: str = "compare"
    published: dict[str, dict[str, str]] = field(default_factory=dict)

    def of(self, dataset: str) -> list[Result]:
        """Return the results on one data set."""
        return [result for result in self.results if result.dataset == dataset]

    def as_json(self) -> str:
        """Serialise; numbers that are not finite become null."""
        return json.dumps(finite({"format": FORMAT, **asdict(self)}), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Rebuild a record from `as_json`.

        Raises:
            ValueError: not a record of this format.
        """
        data = parse(text, FORMAT)
        data["datasets"] = tuple(DatasetSummary.from_json(item) for item in data["datasets"])
        data["results"] = tuple(Result.from_json(item) for item in data["results"])
        return cls(**data)


def parse(text: str, version: int | str) -> dict[str, Any]:
    """Return the content of a file of results without its format.

    Raises:
        ValueError: not results of this format.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or data.pop("format", None) != version:
        raise ValueError(f"not results of format {version}")
    return data


def finite(value: object) -> object:
    """Return plain data with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class Folder:
    """The output folder: results.json, runs/*.npz, runs/*.pt under way, *.png and report.html."""

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
        try:
            (self.path / "runs").mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "runs" / ".probe", b"")
            (self.path / "runs" / ".probe").unlink()
        except OSError as error:
            raise ValueError(
                f"cannot write to the output folder {str(self.path)!r} ({error.strerror}): "
                "choose another one with --out"
            ) from error

    def refuse_results(self) -> None:
        """Make sure that no results are overwritten.

        Raises:
            ValueError: the folder holds some.
        """
        if self.results.exists():
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
        try:
            return from_json(self.results.read_text())
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"cannot resume from {str(self.results)!r}: {error}; start anew without --resume"
            ) from error

    def save_arrays(self, key: tuple[str | int, ...], arrays: dict[str, Array]) -> None:
        """Write the arrays of one run, or of one data set."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomically(self._arrays(key), buffer.getvalue())

    def load_arrays(self, key: tuple[str | int, ...]) -> dict[str, Array]:
        """Read what `save_arrays` wrote; empty if there is nothing."""
        if not self._arrays(key).exists():
            return {}
        with np.load(self._arrays(key), allow_pickle=False) as arrays:
            return dict(arrays)

    def picture(self, *parts: str) -> Path:
        """Return the path of a picture: of a data set, or of a model on it."""
        return self.path / f"{'--'.join(map(slug, parts))}.png"

    def checkpoint(self, key: tuple[str | int, ...]) -> Path:
        """Return the path of the checkpoint of a run under way."""
        return self._arrays(key).with_suffix(".pt")

    def _arrays(self, key: tuple[str | int, ...]) -> Path:
        return self.path / "runs" / ("--".join(slug(str(part)) for part in key) + ".npz")


def flags(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by the names that they have on the command line."""
    return {f"--{name.replace('_', '-')}": value for name, value in arguments.items()}


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
