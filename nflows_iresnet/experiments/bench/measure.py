"""How `bench` measures: runs in rounds, medians with quartiles, ratios in pairs, and targets."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from nflows_iresnet.experiments.bench.items import BASELINE, Column, Item
from nflows_iresnet.experiments.config import describe

Work = Callable[[], object]

# --- time -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """The time of one piece of work.

    Args:
        seconds: by the wall clock; on a GPU between two events of its stream.
        cpu_seconds: that all threads of this process were running. With one thread it leaves out
            what other processes took, so that ratios of it hold on a busy machine too; with several
            threads it counts those that wait.
    """

    seconds: float
    cpu_seconds: float


Timer = Callable[[Work], Timing]


def time_on_cpu(work: Work) -> Timing:
    """Run the work once and return its time."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Timing(time.perf_counter() - wall, time.process_time() - processor)


def time_on_cuda(work: Work) -> Timing:
    """Run the work once on a GPU that is idle before and done after, and return its time."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    processor = time.process_time()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return Timing(begin.elapsed_time(end) / 1e3, time.process_time() - processor)


@dataclass(frozen=True)
class Rounds:
    """How often runs are repeated.

    Args:
        least: rounds in any case.
        most: rounds at most.
        seconds: no further round begins once the timed work has taken this long.
        warm_ups: calls of each run before the first round, untimed.
    """

    least: int = 5
    most: int = 40
    seconds: float = 8.0
    warm_ups: int = 2

    def are_over(self, count: int, seconds: float) -> bool:
        """Whether no further round begins after `count` rounds that took some time."""
        return count >= self.most or (count >= self.least and seconds >= self.seconds)


@dataclass
class Timings:
    """The times of each model, one per round; and what went wrong with those that failed."""

    times: dict[str, list[Timing]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str, work: Work) -> object:
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
        for name in _rotated(list(result.times), count):
            timing = result.attempt(name, partial(timer, works[name]))
            if isinstance(timing, Timing):
                result.times[name].append(timing)
                seconds += timing.seconds
        count += 1
    return result


def _rotated(names: list[str], offset: int) -> list[str]:
    start = offset % len(names)
    return names[start:] + names[:start]


# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Every choice that a measurement depends on.

    Args:
        device: where the work runs.
        threads: CPU threads that torch uses.
        quick: a subset of the cases, fewer rounds.
        repeats: rounds per case; None for as many as fit into the time of a case.
        seed: seed of weights, inputs and probes.
        seconds: training time per model in the quality item; None for its default.
        learning_rate: of Adam in the quality item, for every model.
    """

    device: torch.device = torch.device("cpu")
    threads: int = 1
    quick: bool = False
    repeats: int | None = None
    seed: int = 0
    seconds: float | None = None
    learning_rate: float = 5e-3

    @property
    def rounds(self) -> Rounds:
        """How often each case is repeated."""
        if self.repeats is not None:
            return Rounds(least=self.repeats, most=self.repeats)
        return Rounds(least=3, most=15, seconds=1.0) if self.quick else Rounds()

    @property
    def trusts_cpu_time(self) -> bool:
        """Whether processor time is the better clock: on the CPU, with a single thread."""
        return self.device.type == "cpu" and self.threads == 1

    @property
    def timer(self) -> Timer:
        """What tells the time on the device."""
        return time_on_cuda if self.device.type == "cuda" else time_on_cpu


@dataclass(frozen=True)
class Run:
    """What one model does in one case.

    Args:
        model: its name.
        work: what is timed; None for one that cannot do it, as its note says.
        numbers: other numbers about it, untimed, asked for once after the rounds.
        raw: samples that those numbers come from, kept in the file of results.
        note: a remark for the table.
    """

    model: str
    work: Work | None
    numbers: Callable[[], dict[str, float]] = dict
    raw: dict[str, list[float]] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model in one case.

    Args:
        model: its name.
        seconds: wall time of each round.
        cpu_seconds: processor time of each round.
        numbers: other numbers, by the key of their column.
        raw: samples behind the numbers.
        note: a remark, or what went wrong.
    """

    model: str
    seconds: tuple[float, ...] = ()
    cpu_seconds: tuple[float, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    raw: dict[str, list[float]] = field(default_factory=dict)
    note: str | None = None


Prepare = Callable[[Settings], list[Run]]


@dataclass(frozen=True)
class Case:
    """One row group of a table: the same task for all models.

    Args:
        label: its name in the table.
        parameters: the numbers that describe it.
        measure: does the work.
    """

    label: str
    parameters: dict[str, float]
    measure: Callable[[Settings], tuple[Measurement, ...]]

    @classmethod
    def timed(cls, prepare: Prepare, **parameters: float) -> Case:
        """Return a case that is labelled by its parameters, and whose runs are timed in rounds."""
        label = " ".join(f"{name}={value}" for name, value in parameters.items())
        return cls(label, dict(parameters), partial(measure_runs, prepare))


def measure_runs(
    prepare: Prepare, settings: Settings, timer: Timer | None = None
) -> tuple[Measurement, ...]:
    """Time runs in rounds, then ask for their other numbers."""
    runs = prepare(settings)
    gc.collect()
    works = {run.model: run.work for run in runs if run.work is not None}
    timings = time_in_rounds(works, timer or settings.timer, settings.rounds)
    return tuple(_measurement(run, timings) for run in runs)


def _measurement(run: Run, timings: Timings) -> Measurement:
    times = timings.times.get(run.model, [])
    numbers = timings.attempt(run.model, run.numbers)
    return Measurement(
        run.model,
        tuple(each.seconds for each in times),
        tuple(each.cpu_seconds for each in times),
        numbers if isinstance(numbers, dict) else {},
        run.raw,
        timings.failures.get(run.model, run.note),
    )


# --- what it says ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The median of some values and their quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles, interpolated linearly.

    Raises:
        ValueError: there are no values.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0)
    """
    if not len(values):
        raise ValueError("no values to summarise: at least one is needed")
    low, median, high = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return Spread(median, low, high)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the spread of numerator / denominator over rounds.

    The two of a pair come from the same round, so that a slow moment of the machine, which makes
    both longer, leaves their ratio as it is.

    Raises:
        ValueError: the rounds are not the same, or there are none.

    Example:
        >>> paired_ratio([2.0, 40.0, 6.0], [1.0, 20.0, 3.0]).median
        2.0
    """
    if len(numerators) != len(denominators):
        raise ValueError(
            f"{len(numerators)} and {len(denominators)} rounds cannot be paired: "
            "take both from the same rounds"
        )
    return spread([above / below for above, below in zip(numerators, denominators, strict=True)])


@dataclass(frozen=True)
class CaseResult:
    """What was measured in one case.

    Args:
        item: name of the item.
        case: label of the case.
        parameters: the numbers that describe the case.
        measurements: one per model.
        on_cpu_time: whether ratios are those of processor time.
    """

    item: str
    case: str
    parameters: dict[str, float]
    measurements: tuple[Measurement, ...]
    on_cpu_time: bool

    def of(self, model: str) -> Measurement:
        """Return what was measured of a model; nothing if it took no part."""
        found = (each for each in self.measurements if each.model == model)
        return next(found, Measurement(model))

    def speed(self, model: str, against: str = BASELINE) -> Spread | None:
        """Return how many times less time it took than another, round by round."""
        return self.time_ratio(against, model, cpu=self.on_cpu_time)

    def time_ratio(self, above: str, below: str, *, cpu: bool) -> Spread | None:
        """Return the spread of the ratio of two models' times over the rounds."""
        times = [self._times(name, cpu) for name in (above, below)]
        return paired_ratio(*times) if all(times) else None

    def _times(self, model: str, cpu: bool) -> tuple[float, ...]:
        return self.of(model).cpu_seconds if cpu else self.of(model).seconds

    def milliseconds(self, model: str) -> Spread | None:
        """Return the spread of the time by the clock that ratios use, in milliseconds."""
        times = self._times(model, self.on_cpu_time)
        return spread([1e3 * seconds for seconds in times]) if times else None

    def number(self, model: str, key: str) -> float | None:
        """Return a number of a model, or None."""
        return self.of(model).numbers.get(key)

    def number_ratio(self, model: str, key: str) -> float | None:
        """Return how many times smaller a number is than that of normflows."""
        return _times_smaller(self.number(model, key), self.number(BASELINE, key))

    def value_of(self, model: str, column: Column) -> float | None:
        """Return what a column of a table shows, or None."""
        value, time = self.number(model, column.key), self.milliseconds(model)
        if value is None or not column.times_milliseconds:
            return value
        return None if time is None else value * time.median

    def ratio_of(self, model: str, column: Column) -> float | None:
        """Return how many times smaller a column is than for its baseline."""
        if column.baseline is None:
            return None
        return _times_smaller(self.value_of(model, column), self.value_of(column.baseline, column))


def _times_smaller(own: float | None, other: float | None) -> float | None:
    return other / own if own and other is not None else None


@dataclass(frozen=True)
class CheckedTarget:
    """A target beside what was measured.

    Args:
        item: name of the item.
        case: label of the case.
        target: the quantity in words.
        bound: what was promised.
        at_least: whether the quantity must reach the bound or stay below it.
        measured: the quantity, None where it could not be measured.
        is_met: whether the bound is kept; False where nothing was measured.
    """

    item: str
    case: str
    target: str
    bound: float
    at_least: bool
    measured: float | None
    is_met: bool


def check_targets(item: Item, results: Sequence[CaseResult]) -> list[CheckedTarget]:
    """Hold the results of an item against its targets."""
    return list(_checked(item, results))


def _checked(item: Item, results: Sequence[CaseResult]) -> Iterator[CheckedTarget]:
    for target in item.targets:
        for result in results:
            if target.applies(result.parameters):
                measured = target.measure(result)
                is_met = measured is not None and target.is_met(measured)
                what = (target.text, target.bound, target.at_least)
                yield CheckedTarget(result.item, result.case, *what, measured, is_met)


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * x^exponent.

    Args:
        exponent: fitted by least squares in log y and log x.
        standard_error: of the exponent, from the residuals; None for two points, which say nothing.
        factor: y at x = 1.
    """

    exponent: float
    standard_error: float | None
    factor: float


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fit a straight line to log y over log x.

    Raises:
        ValueError: fewer than two different x, or a value that has no logarithm.

    Example:
        >>> round(fit_power_law([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]).exponent, 6)
        2.0
    """
    if len(set(x)) < 2 or len(x) != len(y):
        raise ValueError(f"a power law needs two different x and a y for each, got {x} and {y}")
    if min(*x, *y) <= 0:
        raise ValueError(f"a power law needs positive values, got {x} and {y}")
    from scipy.stats import linregress

    line = linregress(np.log(x), np.log(y))
    error = float(line.stderr) if len(x) > 2 else None
    return PowerLaw(float(line.slope), error, float(np.exp(line.intercept)))


@dataclass(frozen=True)
class Fit:
    """How the cost of a model grows.

    Args:
        item: name of the item.
        model: its name.
        variable: what is varied.
        quantity: what grows: "ms" or the key of a number.
        points: pairs of the variable and the quantity.
        law: the fitted power law.
    """

    item: str
    model: str
    variable: str
    quantity: str
    points: tuple[tuple[float, float], ...]
    law: PowerLaw


def fits(item: Item, results: Sequence[CaseResult]) -> list[Fit]:
    """Fit the exponent of each model that has at least two points."""
    if item.variable is None:
        return []
    names = dict.fromkeys(each.model for result in results for each in result.measurements)
    found = (_fit(item, item.variable, name, results) for name in names)
    return [fit for fit in found if fit is not None]


def _fit(item: Item, variable: str, model: str, results: Sequence[CaseResult]) -> Fit | None:
    measured = [(result.parameters[variable], _quantity(item, result, model)) for result in results]
    points = tuple((x, y) for x, y in measured if y is not None and y > 0)
    if len({x for x, _ in points}) < 2:
        return None
    law = fit_power_law([x for x, _ in points], [y for _, y in points])
    return Fit(results[0].item, model, variable, item.fitted or "ms", points, law)


def _quantity(item: Item, result: CaseResult, model: str) -> float | None:
    if item.fitted is not None:
        return result.number(model, item.fitted)
    time = result.milliseconds(model)
    return None if time is None else time.median
