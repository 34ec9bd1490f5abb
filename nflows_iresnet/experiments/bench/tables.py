"""The tables of a benchmark in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from nflows_iresnet.experiments.bench.items import BASELINE, CaseResult, Cell, Figure, Item
from nflows_iresnet.experiments.bench.statistics import Spread
from nflows_iresnet.experiments.bench.verdicts import Fit, Verdict, fits, verdicts

TIME_COLUMNS = ("ms", "q1 q3", "wall\nratio", "q1 q3", "cpu\nratio")
_WIDE = 160


def make_console() -> Console:
    """Return a console on stdout; without a terminal it is wide enough for every table."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)


def print_item(console: Console, name: str, item: Item, results: Sequence[CaseResult]) -> None:
    """Print one item: a row per case and contestant, the fits, the targets."""
    console.print(f"\n[bold]{name}[/]: {item.description}", highlight=False)
    console.print(_table(item, results))
    for fit in fits(item, results):
        console.print(f"  {_fit(fit)}", highlight=False)
    found = verdicts(item, results)
    if found:
        console.print(verdict_table(found))


def _table(item: Item, results: Sequence[CaseResult]) -> Table:
    table = _empty()
    for title in ("case", "contestant"):
        table.add_column(title, vertical="bottom", no_wrap=True)
    has_times = any(cell.seconds for result in results for cell in result.cells)
    for title in TIME_COLUMNS if has_times else ():
        table.add_column(title, justify="right", vertical="bottom", no_wrap=True)
    for figure in item.figures:
        table.add_column(figure.title, justify="right", vertical="bottom", no_wrap=True)
        if figure.baseline is not None:
            table.add_column("x", justify="right", vertical="bottom", no_wrap=True)
    table.add_column("", vertical="bottom")
    for result in results:
        _add_case(table, item, result, has_times)
    return table


def _empty() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _add_case(table: Table, item: Item, result: CaseResult, has_times: bool) -> None:
    for index, cell in enumerate(result.cells):
        times = _times(result, cell) if has_times else []
        figures = [text for figure in item.figures for text in _figure(result, cell, figure)]
        label = result.case if index == 0 else ""
        last = index == len(result.cells) - 1
        note = cell.note or ""
        table.add_row(label, cell.contestant, *times, *figures, note, end_section=last)


def _times(result: CaseResult, cell: Cell) -> list[str]:
    name = cell.contestant
    wall = result.time_ratio(BASELINE, name, cpu=False)
    processor = result.time_ratio(BASELINE, name, cpu=True)
    time = result.milliseconds(name)
    return [
        _median(time),
        _quartiles(time),
        _median(wall),
        _quartiles(wall),
        _median(processor) if result.on_cpu_time else "-",
    ]


def _median(value: Spread | None) -> str:
    return "-" if value is None else _number(value.median)


def _quartiles(value: Spread | None) -> str:
    return "-" if value is None else f"{_number(value.low)} {_number(value.high)}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _figure(result: CaseResult, cell: Cell, figure: Figure) -> list[str]:
    value = result.value_of(cell.contestant, figure)
    texts = ["-" if value is None else format(value, figure.style)]
    if figure.baseline is not None:
        ratio = result.ratio_of(cell.contestant, figure)
        texts.append("-" if ratio is None else _number(ratio))
    return texts


def _fit(fit: Fit) -> str:
    error = "" if fit.law.standard_error is None else f" ± {fit.law.standard_error:.2f}"
    return (
        f"{fit.contestant}: {fit.quantity} ~ {fit.variable}^{fit.law.exponent:.2f}{error} "
        f"({len(fit.points)} points)"
    )


def verdict_table(found: Sequence[Verdict]) -> Table:
    """Return the table of targets beside what was measured."""
    table = _empty()
    for title in ("target", "case"):
        table.add_column(title, vertical="bottom")
    for title in ("promised", "measured"):
        table.add_column(title, justify="right", vertical="bottom")
    table.add_column("", vertical="bottom", no_wrap=True)
    for verdict in found:
        table.add_row(
            verdict.target,
            verdict.case,
            f"{'≥' if verdict.at_least else '≤'} {verdict.bound:g}",
            "-" if verdict.measured is None else _number(verdict.measured),
            "[green]met[/]" if verdict.is_met else "[red]not met[/]",
        )
    return table
