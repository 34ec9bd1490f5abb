"""Results as plain data, and the folder that keeps them."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from nflows_iresnet.experiments.config import check_environment, describe_environment, slug
from nflows_iresnet.experiments.evaluation import Array, Metrics
from nflows_iresnet.experiments.files import prepare_folder
from nflows_iresnet.files import WriteError, moved_away, write_atomically
from nflows_iresnet.training import History
from nflows_iresnet.training.progress import finite

if TYPE_CHECKING:
    from typing_extensions import Self

Loaded = TypeVar("Loaded")
Key = tuple[str | int, ...]
"""Data set, model and repeat of a run, and what else tells it apart; or a data set alone."""

# --- plain data: pydantic and its like would word what is wrong with a file in many lines ---------


def parse(text: str, version: int | str) -> dict[str, Any]:
    """Return the content of a file of results without its format.

    Raises:
        ValueError: not results of this format.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    found = data.pop("format", None) if isinstance(data, dict) else None
    if str(found).startswith("table1-") and found != version:
        raise ValueError("it holds results of nflows-iresnet table1")
    if not isinstance(data, dict) or found != version:
        raise ValueError(f"it holds no results of this command (format {version})")
    return data


def rebuild(kind: Any, data: Any, name: str = "the content") -> Any:
    """Rebuild a value of an annotated type from plain JSON data.

    Args:
        kind: a dataclass, or the type of one of its fields: Any, int, float, bool, str, a dict, a
            tuple of any length, or one of these that may be None.
        data: what JSON made of it; null stands for a float that was not finite.
        name: what it is called in messages.

    Raises:
        ValueError: the data are of another type; the message names the field.

    Example:
        >>> rebuild(tuple[int, ...], [1, 2])
        (1, 2)
        >>> rebuild(dict[str, float], {"a": "b"}, "loss")
        Traceback (most recent call last):
        ValueError: loss.a is no float
    """
    if kind is Any:
        return data
    if is_dataclass(kind):
        return _rebuild_dataclass(kind, data, name)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        known = next(each for each in arguments if each is not NoneType)
        return None if data is None else rebuild(known, data, name)
    if origin is tuple:
        items = enumerate(_checked(list, data, name))
        return tuple(rebuild(arguments[0], item, f"{name}[{index}]") for index, item in items)
    if origin is dict:
        pairs = _checked(dict, data, name).items()
        return {key: rebuild(arguments[1], item, f"{name}.{key}") for key, item in pairs}
    if kind is float:
        return math.nan if data is None else _checked(float, data, name)
    return _checked(kind, data, name)


def _rebuild_dataclass(kind: Any, data: Any, name: str) -> Any:
    types, prefix = get_type_hints(kind), f"{name}." if name != "the content" else ""
    given, known = _checked(dict, data, name), {each.name for each in fields(kind)}
    for key in given:
        if key not in known:
            raise ValueError(f"{prefix}{key} is unknown")
    values = {key: rebuild(types[key], item, f"{prefix}{key}") for key, item in given.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{name} is not complete ({error})") from error


def _checked(kind: type, data: Any, name: str) -> Any:
    accepted = (int, float) if kind is float else kind
    if not isinstance(data, accepted) or (isinstance(data, bool) and kind is not bool):
        raise ValueError(f"{name} is no {kind.__name__}")
    return data


# --- what is kept ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunRecord:
    """What the file of results of every command begins with; a subclass adds what was found.

    The fields are the file. Names in `DERIVED` are properties that follow from them: they are
    written for those who read the file, and not read again.

    Args:
        arguments: every choice that was made.
        environment: versions, device and machine.
        started: ISO date and time.
    """

    FORMAT: ClassVar[int | str] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ()

    arguments: dict[str, Any]
    environment: dict[str, Any]
    started: str

    @property
    def command(self) -> str:
        """The subcommand."""
        raise NotImplementedError

    @property
    def described_data(self) -> Any:
        """What is known of the data, by which others are told from them."""
        raise NotImplementedError

    @classmethod
    def begin(cls, arguments: dict[str, Any], device: str, **content: Any) -> Self:
        """Return the record of a run that starts here and now."""
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(arguments, describe_environment(device), started, **content)

    def content(self) -> dict[str, Any]:
        """Return what is written, beside the format."""
        return asdict(self) | {name: getattr(self, name) for name in self.DERIVED}

    def as_json(self) -> str:
        """Serialise; numbers that are not finite become null."""
        plain = finite({"format": self.FORMAT, **self.content()})
        return json.dumps(plain, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Rebuild a record from `as_json`.

        Raises:
            ValueError: not a record of this format.
        """
        data = parse(text, cls.FORMAT)
        for name in cls.DERIVED:
            data.pop(name, None)
        record: Self = rebuild(cls, data)
        check_environment(record.environment)
        return record


@dataclass(frozen=True)
class DatasetSummary:
    """What a reader of the results needs to know about a data set.

    Args:
        name: unique within a run.
        source: where the rows come from.
        features: dimensions.
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
        repeat: 0, 1, ...
        seed: seed of the weights, the batches and the samples.
        hyperparameters: the size of the model.
        failures: what went wrong, in words; empty if nothing did.
        training: the log, or None if training failed.
        model_class: the class of what was trained.
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

    def as_row(self) -> dict[str, Any]:
        """Return what a table of runs says; None where there is nothing."""
        training = {name: getattr(self.training, name, None) for name in _TRAINING}
        whole = ("training", "metrics", "failures", "hyperparameters")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in whole}
        failures = "; ".join(self.failures) or None
        found = asdict(self.metrics) | training | {"failures": failures}
        return own | found | self.hyperparameters


_TRAINING = tuple(each.name for each in fields(History) if each.name != "curve")


@dataclass(frozen=True)
class Trial:
    """A learning rate tried: trained with the first seed and validated, never tested.

    Args:
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
class Record(RunRecord):
    """The content of results.json.

    Args:
        datasets: the data sets, in the order of the arguments.
        results: what is finished, in the order of its end.
        command: the subcommand.
        published: by model and data set, numbers to be shown beside those measured.
        trials: the learning rates tried, of which each model got the best.
    """

    datasets: tuple[DatasetSummary, ...]
    results: tuple[Result, ...] = ()
    command: str = "compare"
    published: dict[str, dict[str, str]] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()

    @property
    def described_data(self) -> tuple[DatasetSummary, ...]:
        """What is known of the data."""
        return self.datasets

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

    def as_csv(self) -> str:
        """Return one line for each run, with its size, measurements, training and failures."""
        rows = [result.as_row() for result in self.results]
        names = [*_COLUMNS, *dict.fromkeys(name for row in rows for name in row)]
        text = io.StringIO()
        # pandas would write the same in as many lines, and be half a second later
        table = csv.DictWriter(text, dict.fromkeys(names), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        return text.getvalue()


_COLUMNS = tuple(Result("", "", 0, 0, {}, 0, (), None, Metrics()).as_row())
"""Those that every table has, whatever was trained."""


@dataclass(frozen=True)
class Folder:
    """The output folder of a run.

    results.json and results.csv, runs/*.npz and runs/*.pt under way, weights/*.pt, tensorboard/,
    *.png and report.html. A race adds race.md.
    """

    path: Path

    @property
    def results(self) -> Path:
        """The file that everything else can be rendered from."""
        return self.path / "results.json"

    def refuse_obstacles(self) -> None:
        """Make sure that nothing is in the way of what is written at the end.

        Raises:
            ValueError: a folder lies where a file is to be, or a file where a folder is.
        """
        for path in (self.path / "results.csv", self.path / "report.html"):
            if path.is_dir():
                raise ValueError(
                    f"{str(path)!r} is a folder, and a file of that name is to be written: move it "
                    f"away ({moved_away(path)}), or choose another --out"
                )
        weights = self.path / "weights"
        if weights.is_file():
            raise ValueError(
                f"{str(weights)!r} is a file, and a folder of that name is to be made: move it "
                f"away ({moved_away(weights)}), or choose another --out"
            )

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

    def save_record(self, record: RunRecord) -> None:
        """Write results.json, and of a comparison results.csv."""
        write_atomically(self.results, record.as_json().encode())
        if isinstance(record, Record):
            write_atomically(self.path / "results.csv", record.as_csv().encode())

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
            raise ValueError(
                f"{complaint}: {reason}; choose another --out, or move it away "
                f"({moved_away(self.results, '.damaged')}) and start anew without --resume"
            ) from error

    def arrays(self, key: Key) -> Path:
        """Return the path of the arrays of a run, or of a data set."""
        return self.path / "runs" / f"{_name(key)}.npz"

    def save_arrays(self, key: Key, arrays: dict[str, Array]) -> None:
        """Write the arrays of one run, or of one data set."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomically(self.arrays(key), buffer.getvalue())

    def load_arrays(self, key: Key) -> dict[str, Array]:
        """Read what `save_arrays` wrote; empty if there is nothing.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.arrays(key)
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

    def save_weights(self, key: Key, content: bytes) -> None:
        """Write the trained weights of one run, as `saved.pack` returns them."""
        path = self.weights(key)
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"cannot make {str(path.parent)!r}: {error.strerror}") from error
        write_atomically(path, content)

    def weights(self, key: Key) -> Path:
        """Return the path of the trained weights of a run."""
        return self.path / "weights" / f"{_name(key)}.pt"

    def write_scalars(self, result: Result) -> None:
        """Write the learning curve of a finished run for TensorBoard, where that is installed.

        It is a convenience: whatever is wrong with TensorBoard, the run is kept without it.
        """
        log = self.path / "tensorboard" / _name(result.key)
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(log, ignore_errors=True)
            with SummaryWriter(str(log)) as writer:
                for point in result.training.curve if result.training else ():
                    for name in ("train", "validation"):
                        value = getattr(point, name)
                        writer.add_scalar(f"nll/{name}", value, point.step)

    def picture(self, *parts: str) -> Path:
        """Return the path of a picture: of a data set, or of a model on it."""
        return self.path / f"{_name(parts)}.png"

    def checkpoint(self, key: Key) -> Path:
        """Return the path of the checkpoint of a run under way."""
        return self.arrays(key).with_suffix(".pt")

    def kept(self, done: int, total: int, pending: Iterable[Key]) -> str:
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


def flags(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by the names that they have on the command line."""
    return {f"--{name.replace('_', '-')}": value for name, value in arguments.items()}


def _name(key: Key) -> str:
    return "--".join(slug(str(part)) for part in key)


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
