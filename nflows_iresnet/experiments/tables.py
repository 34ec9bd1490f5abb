"""The table of one data set in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nflows_iresnet.experiments.cells import Column, R, best
from nflows_iresnet.experiments.columns import columns_for
from nflows_iresnet.experiments.record import DatasetSummary, Folder, Record
from nflows_iresnet.experiments.summary import caption, captures, early_stops, rows_of, verdict

_WIDE = 124


def make_console(width: int = _WIDE) -> Console:
    """Return a console on stdout; without a terminal it is wide enough for the table."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def print_table(console: Console, record: Record, folder: Folder, dataset: DatasetSummary) -> None:
    """Print one data set: its table, what failed, and who won."""
    console.print(f"\n[bold]{escape(dataset.name)}[/]: {caption(dataset)}", highlight=False)
    rows = rows_of(record, dataset.name)
    print_grid(console, columns_for(record, dataset), rows)
    for row in rows:
        for failure in row.failures:
            console.print(f"{row.model} FAILED {failure}", style="red", markup=False)
    for line in early_stops(record, dataset.name):
        console.print(line, highlight=False, markup=False)
    for line in captures(record, dataset.name):
        console.print(line, style="yellow", markup=False)
    console.print(verdict(record, folder, dataset.name), highlight=False)


def print_grid(console: Console, columns: Sequence[Column[R]], rows: Sequence[R]) -> None:
    """Print rows and columns, the best of each column in bold, folded where they are too wide."""
    wide = _table(columns, rows, folded=False)
    fits = Console(width=1000).measure(wide).maximum <= console.width
    console.print(wide if fits else _table(columns, rows, folded=True))


def _table(columns: Sequence[Column[R]], rows: Sequence[R], *, folded: bool) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 0 if folded else 1),
        leading=int(folded),
    )
    for column in columns:
        _add_column(table, column, folded)
    winners = [best(rows, column) for column in columns]
    for row in rows:
        cells = [_fold(escape(column.text(row)), folded) for column in columns]
        table.add_row(
            *(
                f"[bold green]{cell}[/]" if row.model in models else cell
                for cell, models in zip(cells, winners, strict=True)
            )
        )
    return table


def _add_column(table: Table, column: Column[R], folded: bool) -> None:
    title = column.title.replace(" ", "\n") if folded else column.title
    if column.title == "model":
        table.add_column(title, vertical="bottom", no_wrap=True)
    else:
        table.add_column(title, justify="right", vertical="bottom", overflow="fold")


def _fold(text: str, folded: bool) -> str:
    """Break a cell before its error or its bracket, for narrow terminals."""
    return text.replace(" ± ", "\n± ").replace(" (", "\n(") if folded else text
