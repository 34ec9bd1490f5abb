"""Results as plain data."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import datetime
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_origin, get_type_hints

from nflows_iresnet.experiments.config import check_environment, describe_environment
from nflows_iresnet.experiments.evaluation import Metrics
from nflows_iresnet.training import History
from nflows_iresnet.training.progress import finite

if TYPE_CHECKING:
    from typing_extensions import Self


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
        checksum: of the rows of a table or a file.
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
    checksum: str | None = None

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
        """Return one line for each run: what it is about, its measurements, training and failures.

        `test_nll` + `log_scale` is in nats of the units of the source.
        """
        about = {each.name: {k: getattr(each, k) for k in _OF_DATA} for each in self.datasets}
        rows = [result.as_row() | about[result.dataset] for result in self.results]
        names = [*_COLUMNS, *_OF_DATA, *dict.fromkeys(name for row in rows for name in row)]
        text = io.StringIO()
        # pandas would write the same in as many lines, and be half a second later
        table = csv.DictWriter(text, dict.fromkeys(names), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        return text.getvalue()


_OF_DATA = ("features", "levels", "log_scale", "num_train", "num_validation", "num_test")
_COLUMNS = tuple(Result("", "", 0, 0, {}, 0, (), None, Metrics()).as_row())
"""Those that every table has, whatever was trained."""
