"""Repeats of several pieces of work, interleaved in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from nflows_iresnet.experiments.bench.clock import Clock, Reading, Work
from nflows_iresnet.experiments.config import describe


@dataclass(frozen=True)
class Rounds:
    """How often a race is repeated.

    Args:
        least: rounds in any case.
        most: rounds at most.
        seconds: no further round begins once the timed work has taken this long.
        warm_ups: calls of each contestant before the first round, untimed.
    """

    least: int = 5
    most: int = 40
    seconds: float = 8.0
    warm_ups: int = 2

    def are_over(self, count: int, seconds: float) -> bool:
        """Whether no further round begins after `count` rounds that took some time."""
        return count >= self.most or (count >= self.least and seconds >= self.seconds)


@dataclass
class RaceResult:
    """What a race brought.

    Args:
        readings: one per round, for each contestant that finished.
        failures: what went wrong, for each that did not.
    """

    readings: dict[str, list[Reading]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def race(works: Mapping[str, Work], clock: Clock, rounds: Rounds) -> RaceResult:
    """Time each work once per round, starting each round with another one.

    What slows the machine for a while slows one round of all contestants, not all rounds of one.
    One that raises leaves the race; the others go on.

    Args:
        works: what is timed, by contestant.
        clock: how it is timed.
        rounds: how often.
    """
    result = RaceResult({name: [] for name in works})
    for name in list(works):
        for _ in range(rounds.warm_ups):
            _attempt(result, name, works[name])
    count, seconds = 0, 0.0
    while result.readings and not rounds.are_over(count, seconds):
        for name in rotated(list(result.readings), count):
            reading = _attempt(result, name, partial(clock.time, works[name]))
            if isinstance(reading, Reading):
                result.readings[name].append(reading)
                seconds += reading.seconds
        count += 1
    return result


def _attempt(result: RaceResult, name: str, work: Work) -> object:
    if name in result.failures:
        return None
    try:
        return work()
    except Exception as error:
        result.readings.pop(name, None)
        result.failures[name] = describe(error)
        return None


def rotated(names: list[str], offset: int) -> list[str]:
    """Return the names in order, starting with the one at `offset`, modulo their number."""
    start = offset % len(names)
    return names[start:] + names[:start]
