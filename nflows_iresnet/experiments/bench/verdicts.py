"""What the measured numbers say: fitted exponents, and which targets are met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nflows_iresnet.experiments.bench.items import CaseResult, Item
from nflows_iresnet.experiments.bench.statistics import PowerLaw, fit_power_law


@dataclass(frozen=True)
class Verdict:
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


def verdicts(item: Item, results: Sequence[CaseResult]) -> list[Verdict]:
    """Hold the results of an item against its targets."""
    return list(_verdicts(item, results))


def _verdicts(item: Item, results: Sequence[CaseResult]) -> Iterator[Verdict]:
    for target in item.targets:
        for result in results:
            if target.applies(result.parameters):
                measured = target.measure(result)
                is_met = measured is not None and target.is_met(measured)
                yield Verdict(
                    result.item,
                    result.case,
                    target.text,
                    target.bound,
                    target.at_least,
                    measured,
                    is_met,
                )


@dataclass(frozen=True)
class Fit:
    """How the cost of a contestant grows.

    Args:
        item: name of the item.
        contestant: its name.
        variable: what is varied.
        quantity: what grows: "ms" or the key of a figure.
        points: pairs of the variable and the quantity.
        law: the fitted power law.
    """

    item: str
    contestant: str
    variable: str
    quantity: str
    points: tuple[tuple[float, float], ...]
    law: PowerLaw


def fits(item: Item, results: Sequence[CaseResult]) -> list[Fit]:
    """Fit the exponent of each contestant that has at least two points."""
    if item.variable is None:
        return []
    names = dict.fromkeys(cell.contestant for result in results for cell in result.cells)
    return [fit for name in names if (fit := _fit(item, item.variable, name, results)) is not None]


def _fit(item: Item, variable: str, name: str, results: Sequence[CaseResult]) -> Fit | None:
    measured = [(result.parameters[variable], _quantity(item, result, name)) for result in results]
    points = tuple((x, y) for x, y in measured if y is not None and y > 0)
    if len({x for x, _ in points}) < 2:
        return None
    law = fit_power_law([x for x, _ in points], [y for _, y in points])
    return Fit(results[0].item, name, variable, item.fitted or "ms", points, law)


def _quantity(item: Item, result: CaseResult, name: str) -> float | None:
    if item.fitted is not None:
        return result.figure(name, item.fitted)
    time = result.milliseconds(name)
    return None if time is None else time.median
