"""The words of a benchmark: an item has cases, a case has entrants, an entrant leaves a cell."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from nflows_iresnet.experiments.bench.clock import Clock, Work
from nflows_iresnet.experiments.bench.race import RaceResult, Rounds, race
from nflows_iresnet.experiments.bench.statistics import Spread, paired_ratio, spread
from nflows_iresnet.experiments.config import describe

OURS = "ours"
BASELINE = "normflows"
FLOOR = "plain"
Parameters = Mapping[str, float]


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


@dataclass(frozen=True)
class Entrant:
    """One contestant in one case.

    Args:
        name: of the contestant.
        work: what is timed; None for one that cannot do the task, as its note says.
        figures: other numbers about it, untimed, asked for once after the race.
        raw: samples that those numbers come from, kept in the file of results.
        note: a remark for the table.
    """

    name: str
    work: Work | None
    figures: Callable[[], dict[str, float]] = dict
    raw: dict[str, list[float]] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class Case:
    """One row group of a table: the same task for all contestants.

    Args:
        label: its name in the table.
        parameters: the numbers that describe it.
        enter: prepares the contestants.
    """

    label: str
    parameters: dict[str, float]
    enter: Callable[[Settings], list[Entrant]]

    @classmethod
    def of(cls, enter: Callable[[Settings], list[Entrant]], **parameters: int) -> Case:
        """Return a case that is labelled by its parameters."""
        label = " ".join(f"{name}={value}" for name, value in parameters.items())
        return cls(label, dict(parameters), enter)


@dataclass(frozen=True)
class Cell:
    """What one contestant did in one case, raw.

    Args:
        contestant: its name.
        seconds: wall time of each round.
        cpu_seconds: processor time of each round.
        figures: other numbers, by key.
        raw: samples behind the figures.
        note: a remark, or what went wrong.
    """

    contestant: str
    seconds: tuple[float, ...] = ()
    cpu_seconds: tuple[float, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)
    raw: dict[str, list[float]] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class Figure:
    """A column of an item's table beside the time.

    Args:
        key: under which entrants return it.
        title: head of the column.
        style: format specification.
        baseline: contestant whose value is divided by it, or None for no ratio.
        times_milliseconds: multiply by the median time, for what repeats could buy.
    """

    key: str
    title: str
    style: str = ".3g"
    baseline: str | None = BASELINE
    times_milliseconds: bool = False


@dataclass(frozen=True)
class CaseResult:
    """What all contestants did in one case.

    Args:
        item: name of the item.
        case: label of the case.
        parameters: the numbers that describe the case.
        cells: one per contestant.
        on_cpu_time: whether ratios are those of processor time.
    """

    item: str
    case: str
    parameters: dict[str, float]
    cells: tuple[Cell, ...]
    on_cpu_time: bool

    def cell(self, contestant: str) -> Cell | None:
        """Return the cell of a contestant, or None."""
        return next((cell for cell in self.cells if cell.contestant == contestant), None)

    def speed(self, contestant: str, against: str = BASELINE) -> Spread | None:
        """Return how many times less time it took than another, round by round."""
        return self.time_ratio(against, contestant, cpu=self.on_cpu_time)

    def time_ratio(self, above: str, below: str, *, cpu: bool) -> Spread | None:
        """Return the spread of the ratio of two contestants' times over the rounds."""
        times = [self._times(name, cpu) for name in (above, below)]
        return paired_ratio(*times) if all(times) else None

    def _times(self, contestant: str, cpu: bool) -> tuple[float, ...]:
        cell = self.cell(contestant)
        return () if cell is None else cell.cpu_seconds if cpu else cell.seconds

    def milliseconds(self, contestant: str) -> Spread | None:
        """Return the spread of the time by the clock that ratios use, in milliseconds."""
        times = self._times(contestant, self.on_cpu_time)
        return spread([1e3 * seconds for seconds in times]) if times else None

    def figure(self, contestant: str, key: str) -> float | None:
        """Return a figure of a contestant, or None."""
        cell = self.cell(contestant)
        return None if cell is None else cell.figures.get(key)

    def figure_ratio(self, contestant: str, key: str, against: str = BASELINE) -> float | None:
        """Return how many times smaller a figure is than that of another contestant."""
        own, other = self.figure(contestant, key), self.figure(against, key)
        return other / own if own and other is not None else None

    def value_of(self, contestant: str, figure: Figure) -> float | None:
        """Return what a column of a table shows, or None."""
        value, time = self.figure(contestant, figure.key), self.milliseconds(contestant)
        if value is None or not figure.times_milliseconds:
            return value
        return None if time is None else value * time.median

    def ratio_of(self, contestant: str, figure: Figure) -> float | None:
        """Return how many times smaller a column is than for the figure's baseline."""
        if figure.baseline is None:
            return None
        own, other = self.value_of(contestant, figure), self.value_of(figure.baseline, figure)
        return other / own if own and other is not None else None


@dataclass(frozen=True)
class Target:
    """What this project promises itself, decided by a measured number.

    Args:
        text: the quantity in words.
        bound: the number.
        measure: returns the quantity from the result of a case, None where it cannot be had.
        applies: for which parameters of a case.
        at_least: whether the quantity must reach the bound or stay below it.
    """

    text: str
    bound: float
    measure: Callable[[CaseResult], float | None]
    applies: Callable[[Parameters], bool] = lambda parameters: True
    at_least: bool = True

    def is_met(self, value: float) -> bool:
        """Whether a measured value meets the target."""
        return value >= self.bound if self.at_least else value <= self.bound


def run_race(case: Case, settings: Settings, clock: Clock) -> tuple[Cell, ...]:
    """Race the entrants of a case, then ask for their figures."""
    entrants = case.enter(settings)
    gc.collect()
    works = {entrant.name: entrant.work for entrant in entrants if entrant.work is not None}
    result = race(works, clock, settings.rounds)
    return tuple(_cell(entrant, result) for entrant in entrants)


def _cell(entrant: Entrant, result: RaceResult) -> Cell:
    note, figures = result.failures.get(entrant.name, entrant.note), {}
    if entrant.name not in result.failures:
        try:
            figures = entrant.figures()
        except Exception as error:
            note = describe(error)
    readings = result.readings.get(entrant.name, [])
    return Cell(
        contestant=entrant.name,
        seconds=tuple(reading.seconds for reading in readings),
        cpu_seconds=tuple(reading.cpu_seconds for reading in readings),
        figures=figures,
        raw=entrant.raw,
        note=note,
    )


@dataclass(frozen=True)
class Item:
    """One measurement of the benchmark.

    Args:
        description: one line.
        cases: what is measured with given settings.
        figures: columns beside the time.
        targets: what is promised.
        variable: the parameter in which a power law is fitted, or None.
        fitted: the figure that is fitted; the time if None.
        measure: how a case becomes cells.
        is_optional: runs only when asked for.
    """

    description: str
    cases: Callable[[Settings], list[Case]]
    figures: tuple[Figure, ...] = ()
    targets: tuple[Target, ...] = ()
    variable: str | None = None
    fitted: str | None = None
    measure: Callable[[Case, Settings, Clock], tuple[Cell, ...]] = run_race
    is_optional: bool = False
