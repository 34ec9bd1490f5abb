"""What tables are made of: columns, and numbers as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Named(Protocol):
    """A row of a table."""

    @property
    def model(self) -> str:
        """What the row is about."""


R = TypeVar("R", bound=Named)


@dataclass(frozen=True)
class Column(Generic[R]):
    """One column of the table.

    Args:
        title: its heading, in one or two lines.
        help: one sentence on how to read it, with the unit.
        text: the cell of a row.
        rank: the number of which the smallest is best, or None for no ranking.
    """

    title: str
    help: str
    text: Callable[[R], str]
    rank: Callable[[R], float | None] = lambda row: None


def best(rows: Sequence[R], column: Column[R]) -> set[str]:
    """Return the models whose cell is the best of its column, as far as it can be read."""
    ranks = {row.model: column.rank(row) for row in rows}
    known = [rank for rank in ranks.values() if rank is not None]
    if len(known) < 2:
        return set()
    winners = {row.model for row in rows if ranks[row.model] == min(known)}
    texts = {column.text(row) for row in rows if row.model in winners}
    return {row.model for row in rows if column.text(row) in texts}


def with_error(value: float | None, error: float | None) -> str:
    """Return value ± error, or a dash."""
    if value is None:
        return "-"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def number(value: float | None, style: str) -> str:
    """Return a number in a format, or a dash."""
    return "-" if value is None else format(value, style)


def power(value: float | None) -> str:
    """Return the order of magnitude, or a dash."""
    return number(value, ".0e").replace("e-0", "e-").replace("e+0", "e+")
