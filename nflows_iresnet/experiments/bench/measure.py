"""How `bench` measures: runs in rounds, medians with quartiles, ratios in pairs, and targets."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch.utils import benchmark

from nflows_iresnet.experiments.bench import BASELINE, ITEMS, Column, Item
from nflows_iresnet.experiments.config import describe
from nflows_iresnet.experiments.options import BenchOptions
from nflows_iresnet.experiments.record import RunRecord

Work = Callable[[], object]

# --- time -----------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """The time of one piece of work: by the clock, and that all threads of this process ran.

    With one thread the latter leaves out what other processes took, so that ratios of it hold on a
    busy machine too; with several threads it counts those that wait.
    """

    seconds: float
    cpu_seconds: float


Timer = Callable[[Work], Timing]


def time_once(work: Work) -> Timing:
    """Run the work once, on a GPU that is idle before and done after, and return its time."""
    # benchmark.Timer has one clock, and calls the work twice before each time that it takes.
    wall, processor = benchmark.timer(), time.process_time()
    work()
    return Timing(benchmark.timer() - wall, time.process_time() - processor)


class Rounds(NamedTuple):
    """How often runs are repeated: warmed up by untimed calls, then `least` rounds in any case.

    No further round begins after `most`, or once the timed work has taken so many seconds.
    """

    least: int = 5
    most: int = 40
    seconds: float = 8.0
    warm_ups: int = 2

    def are_over(self, count: int, seconds: float) -> bool:
        """Whether no further round begins after `count` rounds that took some time."""
        return count >= self.most or (count >= self.least and seconds >= self.seconds)


def rounds_of(options: BenchOptions) -> Rounds:
    """Return how often each case is repeated."""
    if options.repeats is not None:
        return Rounds(least=options.repeats, most=options.repeats)
    return Rounds(least=3, most=15, seconds=1.0) if options.quick else Rounds()


def trusts_cpu_time(options: BenchOptions) -> bool:
    """Whether processor time is the better clock: on the CPU, with a single thread."""
    return options.device == "cpu" and options.threads == 1


@dataclass
class Timings:
    """The times of each model, one per round; and what went wrong with those that failed."""

    times: dict[str, list[Timing]]
    failures: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str, work: Work) -> Any:
        """Do some work of a model; one that fails is left out from then on."""
        if name in self.failures:
            return None
        try:
            return work()
        except Exception as error:
            self.times.pop(name, None)
            self.failures[name] = describe(error)
            return None


def time_in_rounds(works: Mapping[str, Work], timer: Timer, rounds: Rounds) -> Timings:
    """Time each model's work once per round, starting each round with another one.

    What slows the machine for a while slows one round of all models, not all rounds of one. A model
    that raises is left out; the others go on.
    """
    result = Timings({name: [] for name in works})
    for name, work in works.items():
        for _ in range(rounds.warm_ups):
            result.attempt(name, work)
    count, seconds = 0, 0.0
    while result.times and not rounds.are_over(count, seconds):
        names = list(result.times)
        first = count % len(names)
        for name in names[first:] + names[:first]:
            timing = result.attempt(name, partial(timer, works[name]))
            if timing is not None:
                result.times[name].append(timing)
                seconds += timing.seconds
        count += 1
    return result


# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one model does in one case.

    Args:
        work: what is timed; None for one that cannot do it, as its note says.
        numbers: other numbers about it, untimed, asked for once after the rounds.
        raw: samples that those numbers come from, kept in the file of results.
        note: a remark for the table.
    """

    model: str
    work: Work | None
    numbers: Callable[[], dict[str, float]] = dict
    raw: dict[str, tuple[float, ...]] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model in one case: both times of each round, and other numbers.

    Args:
        numbers: by the key of their column.
        raw: samples behind the numbers.
        note: a remark, or what went wrong.
    """

    model: str
    seconds: tuple[float, ...] = ()
    cpu_seconds: tuple[float, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    raw: dict[str, tuple[float, ...]] = field(default_factory=dict)
    note: str | None = None


Prepare = Callable[[BenchOptions], list[Run]]


@dataclass(frozen=True)
class Case:
    """The same task for all models: its name, the numbers that describe it, and what does it."""

    label: str
    parameters: dict[str, float]
    measure: Callable[[BenchOptions], tuple[Measurement, ...]]

    @classmethod
    def timed(cls, prepare: Prepare, label: str | None = None, **parameters: float) -> Case:
        """Return a case whose runs are timed in rounds, labelled by its parameters by default."""
        usual = " ".join(f"{name}={value}" for name, value in parameters.items())
        return cls(label or usual, parameters, partial(measure_runs, prepare))


def measure_runs(
    prepare: Prepare, options: BenchOptions, timer: Timer = time_once
) -> tuple[Measurement, ...]:
    """Time runs in rounds, then ask for their other numbers."""
    runs = prepare(options)
    gc.collect()
    works = {run.model: run.work for run in runs if run.work is not None}
    timings = time_in_rounds(works, timer, rounds_of(options))
    return tuple(_measurement(run, timings) for run in runs)


def _measurement(run: Run, timings: Timings) -> Measurement:
    times = timings.times.get(run.model, [])
    numbers = timings.attempt(run.model, run.numbers) or {}
    seconds, cpu_seconds = (tuple(each[clock] for each in times) for clock in range(2))
    note = timings.failures.get(run.model, run.note)
    return Measurement(run.model, seconds, cpu_seconds, numbers, run.raw, note)


# --- what it says ---------------------------------------------------------------------------------


class Spread(NamedTuple):
    """The median of some values and their quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread | None:
    """Return median and quartiles, interpolated linearly; None without values.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0)
    """
    return Spread(*np.quantile(values, [0.5, 0.25, 0.75]).tolist()) if len(values) else None


@dataclass(frozen=True)
class CaseResult:
    """What was measured in one case of an item; on the processor's time, where ratios are of it."""

    item: str
    case: str
    parameters: dict[str, float]
    measurements: tuple[Measurement, ...]
    on_cpu_time: bool

    def of(self, model: str) -> Measurement:
        """Return what was measured of a model; nothing if it took no part."""
        found = (each for each in self.measurements if each.model == model)
        return next(found, Measurement(model))

    def speed(self, model: str, against: str = BASELINE) -> float | None:
        """Return how many times less time it took than another: the median over rounds."""
        ratio = self.time_ratio(against, model, cpu=self.on_cpu_time)
        return None if ratio is None else ratio.median

    def time_ratio(self, above: str, below: str, *, cpu: bool) -> Spread | None:
        """Return the spread over rounds of the ratio of two models' times, if both have them.

        The two of a pair come from the same round, so that a slow moment of the machine, which
        makes both longer, leaves their ratio as it is.
        """
        times = [self._times(name, cpu) for name in (above, below)]
        return spread([a / b for a, b in zip(*times, strict=True)]) if all(times) else None

    def _times(self, model: str, cpu: bool) -> tuple[float, ...]:
        return self.of(model).cpu_seconds if cpu else self.of(model).seconds

    def milliseconds(self, model: str) -> Spread | None:
        """Return the spread of the time by the clock that ratios use, in milliseconds."""
        return spread([1e3 * seconds for seconds in self._times(model, self.on_cpu_time)])

    def value_of(self, model: str, column: Column) -> float | None:
        """Return what a column of a table shows, or None."""
        value, time = self.of(model).numbers.get(column.key), self.milliseconds(model)
        if value is None or not column.times_milliseconds:
            return value
        return None if time is None else value * time.median

    def ratio_of(self, model: str, column: Column) -> float | None:
        """Return how many times smaller a column is than for its baseline."""
        if column.baseline is None:
            return None
        own, other = (self.value_of(name, column) for name in (model, column.baseline))
        return other / own if own and other is not None else None

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each model with what follows from its samples, as plain data."""
        return [
            {
                **{"item": self.item, "case": self.case, "model": each.model},
                "milliseconds": _plain(self.milliseconds(each.model)),
                "wall_ratio": _plain(self.time_ratio(BASELINE, each.model, cpu=False)),
                "cpu_ratio": _plain(self.time_ratio(BASELINE, each.model, cpu=True)),
                "number_ratios": {
                    column.quantity: self.ratio_of(each.model, column)
                    for column in ITEMS[self.item].columns
                    if column.baseline is not None and column.key in each.numbers
                },
            }
            for each in self.measurements
        ]


def _plain(value: Spread | None) -> dict[str, float] | None:
    return None if value is None else value._asdict()


@dataclass(frozen=True)
class CheckedTarget:
    """A target of a case beside what was measured: None, and not met, where nothing could be."""

    item: str
    case: str
    target: str
    bound: float
    at_least: bool
    measured: float | None
    is_met: bool


def check_targets(item: Item, results: Sequence[CaseResult]) -> list[CheckedTarget]:
    """Hold the results of an item against its targets."""
    return [
        CheckedTarget(
            *(result.item, result.case, target.text, target.bound, target.at_least),
            measured=(measured := target.measure(result)),
            is_met=measured is not None and target.is_met(measured),
        )
        for target in item.targets
        for result in results
        if target.applies(result.parameters)
    ]


@dataclass(frozen=True)
class Series:
    """What was measured of a model in cases that differ in nothing but one parameter.

    Args:
        fixed: the other parameters.
        points: pairs of the parameter and the quantity.
    """

    model: str
    fixed: dict[str, float]
    points: tuple[tuple[float, float], ...]


def series(item: Item, results: Sequence[CaseResult]) -> list[Series]:
    """Return what may be joined by a line, of each model; nothing of an item without a variable."""
    if item.variable is None:
        return []
    groups: dict[tuple[tuple[str, float], ...], list[CaseResult]] = {}
    for each in results:
        fixed = tuple(pair for pair in each.parameters.items() if pair[0] != item.variable)
        groups.setdefault(fixed, []).append(each)
    names = dict.fromkeys(each.model for result in results for each in result.measurements)
    found = (
        Series(name, dict(fixed), _points(item, item.variable, group, name))
        for name in names
        for fixed, group in groups.items()
    )
    return [each for each in found if each.points]


def _points(
    item: Item, variable: str, results: Sequence[CaseResult], model: str
) -> tuple[tuple[float, float], ...]:
    measured = [(each.parameters[variable], _quantity(item, each, model)) for each in results]
    return tuple((x, y) for x, y in measured if y is not None and y > 0)


@dataclass(frozen=True)
class Fit:
    """How the cost of a model grows: as factor * variable^exponent, by least squares of logarithms.

    Args:
        quantity: what grows: "ms" or the key of a number.
        fixed: what else describes the cases, which differ in the variable alone.
        points: pairs of the variable and the quantity.
        standard_error: of the exponent, from the residuals; None for two points, which say nothing.
    """

    item: str
    model: str
    variable: str
    quantity: str
    fixed: dict[str, float]
    points: tuple[tuple[float, float], ...]
    exponent: float
    standard_error: float | None
    factor: float


def fits(item: Item, results: Sequence[CaseResult]) -> list[Fit]:
    """Fit a power law to each series that has at least two points."""
    found = (_fit(results[0].item, item, each) for each in series(item, results))
    return [fit for fit in found if fit is not None]


def _fit(name: str, item: Item, found: Series) -> Fit | None:
    from scipy.stats import linregress

    if item.variable is None or len({x for x, _ in found.points}) < 2:
        return None
    line = linregress(*np.log(found.points).T)
    return Fit(
        *(name, found.model, item.variable, item.fitted or "ms", found.fixed, found.points),
        exponent=float(line.slope),
        standard_error=float(line.stderr) if len(found.points) > 2 else None,
        factor=float(np.exp(line.intercept)),
    )


def _quantity(item: Item, result: CaseResult, model: str) -> float | None:
    if item.fitted is not None:
        return result.of(model).numbers.get(item.fitted)
    time = result.milliseconds(model)
    return None if time is None else time.median


@dataclass(frozen=True)
class Benchmark(RunRecord):
    """The content of bench.json: the samples of what is finished, and what follows from them."""

    FORMAT = 2
    DERIVED = ("table", "fits", "targets")

    results: tuple[CaseResult, ...] = ()

    def of(self, item: str) -> list[CaseResult]:
        """Return the results of an item."""
        return [result for result in self.results if result.item == item]

    def by_item(self) -> dict[str, list[CaseResult]]:
        """Return the results of each item."""
        return {name: self.of(name) for name in dict.fromkeys(each.item for each in self.results)}

    def content(self) -> dict[str, Any]:
        """Return what is written, beside the format."""
        groups = [(ITEMS[name], results) for name, results in self.by_item().items()]
        return asdict(self) | {
            "table": [row for result in self.results for row in result.table()],
            "fits": [asdict(fit) for group in groups for fit in fits(*group)],
            "targets": [asdict(target) for group in groups for target in check_targets(*group)],
        }
