"""`nflows-iresnet bench`: check everything, measure, save after each case, print tables, draw."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from nflows_iresnet.experiments import session
from nflows_iresnet.experiments.bench import (
    BASELINE,
    FLOOR,
    ITEMS,
    OURS,
    STEP_MODELS,
    Column,
    Item,
    chosen_items,
)
from nflows_iresnet.experiments.bench.measure import (
    Benchmark,
    CaseResult,
    CheckedTarget,
    Fit,
    Spread,
    check_targets,
    fits,
    series,
    trusts_cpu_time,
)
from nflows_iresnet.experiments.options import BenchOptions
from nflows_iresnet.experiments.pictures import STYLE, as_png, label_plainly
from nflows_iresnet.experiments.session import CaseProgress
from nflows_iresnet.experiments.tables import make_console, number
from nflows_iresnet.files import write_atomically

RESULTS = "bench.json"
TIME_COLUMNS = ("ms", "q1 q3", "wall\nratio", "q1 q3", "cpu\nratio")
WIDTH = 160
"""Of the tables without a terminal."""


def _work(options: BenchOptions, folder: Path) -> int:
    """Measure what was asked for, and return the exit status."""
    items = chosen_items(options.only, quality=options.quality)
    chosen = ("device", "threads", "quick", "repeats", "seed", "seconds")
    arguments = {name: getattr(options, name) for name in chosen}
    arguments |= {"learning_rate": options.rate, "items": list(items)}
    record = Benchmark.begin(arguments, options.device)
    record.environment["load"] = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    write_atomically(folder / RESULTS, record.as_json().encode())
    cases = {name: item.cases(options) for name, item in items.items()}
    with CaseProgress(sum(map(len, cases.values())), quiet=options.quiet) as progress:
        for name, item in items.items():
            for case in cases[name]:
                with progress.stage(f"{name} · {case.label}"):
                    measured = case.measure(options)
                    identity = name, case.label, case.parameters
                    result = CaseResult(*identity, measured, trusts_cpu_time(options))
                    record = replace(record, results=(*record.results, result))
                    write_atomically(folder / RESULTS, record.as_json().encode())
            if not options.quiet:
                with progress.paused():
                    print_item(make_console(WIDTH), name, item, record.of(name))
    for name, picture in draw(record).items():
        write_atomically(folder / name, picture)
    path = folder / RESULTS
    print(path if options.quiet else f"\nresults: {path}")
    return 0


run = partial(
    session.run_at_once,
    _work,
    results=RESULTS,
    files=("bench.png", "quality.png"),
    kept="what is measured is kept",
)
"""Run the subcommand and return the exit status."""

# --- tables ---------------------------------------------------------------------------------------


def print_item(console: Console, name: str, item: Item, results: Sequence[CaseResult]) -> None:
    """Print one item: a row per case and model, the fits, the targets."""
    console.print(f"\n[bold]{name}[/]: {item.description}", highlight=False)
    console.print(_item_table(item, results))
    for fit in fits(item, results):
        console.print(f"  {_in_words(fit)}", highlight=False)
    checked = check_targets(item, results)
    if checked:
        console.print(_target_table(checked))


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    """Return an empty table with a last column for remarks."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in left:
        table.add_column(title, vertical="bottom", no_wrap=left[0] == "case")
    for title in right:
        table.add_column(title, justify="right", vertical="bottom", no_wrap=True)
    table.add_column("", vertical="bottom")
    return table


def _item_table(item: Item, results: Sequence[CaseResult]) -> Table:
    has_times = any(each.seconds for result in results for each in result.measurements)
    titles = [*TIME_COLUMNS] if has_times else []
    for column in item.columns:
        base = "x" if column.baseline == BASELINE else f"x of\n{column.baseline}"
        titles += [column.title] if column.baseline is None else [column.title, base]
    table = _table(("case", "model"), titles)
    for result in results:
        names = [each.model for each in result.measurements]
        for name in names:
            times = _times(result, name) if has_times else []
            numbers = [text for column in item.columns for text in _number(result, name, column)]
            label = result.case if name == names[0] else ""
            row = (label, name, *times, *numbers, result.of(name).note or "")
            table.add_row(*row, end_section=name == names[-1])
    return table


def _times(result: CaseResult, model: str) -> list[str]:
    wall = result.time_ratio(BASELINE, model, cpu=False)
    processor = result.time_ratio(BASELINE, model, cpu=True) if result.on_cpu_time else None
    return [*_spread(result.milliseconds(model)), *_spread(wall), _spread(processor)[0]]


def _spread(value: Spread | None) -> list[str]:
    if value is None:
        return ["-", "-"]
    return [_rounded(value.median), f"{_rounded(value.low)} {_rounded(value.high)}"]


def _rounded(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _number(result: CaseResult, model: str, column: Column) -> list[str]:
    value, ratio = result.value_of(model, column), result.ratio_of(model, column)
    text = number(value, column.style)
    return [text] if column.baseline is None else [text, _rounded(ratio)]


def _in_words(fit: Fit) -> str:
    error = "" if fit.standard_error is None else f" ± {fit.standard_error:.2f}"
    power = f"{fit.quantity} ~ {fit.variable}^{fit.exponent:.2f}{error}"
    fixed = "".join(f", {name}={value:g}" for name, value in fit.fixed.items())
    return f"{fit.model}: {power} ({len(fit.points)} points{fixed})"


def _target_table(checked: Sequence[CheckedTarget]) -> Table:
    table = _table(("target", "case"), ("promised", "measured"))
    for target in checked:
        table.add_row(
            target.target,
            target.case,
            f"{'≥' if target.at_least else '≤'} {target.bound:g}",
            _rounded(target.measured),
            "[green]met[/]" if target.is_met else "[red]not met[/]",
        )
    return table


# --- pictures -------------------------------------------------------------------------------------

COLOURS = ("#1b1b3a", "#c8385a", "#7b8299", "#2a9d8f", "#e9a03b", "#8e5fb5", "#4c8bd6")
_PANELS_PER_ROW = 3


def draw(record: Benchmark) -> dict[str, bytes]:
    """Return the pictures that the results allow, as PNG files by name."""
    groups = record.by_item().items()
    panels = [group for name, group in groups if fits(ITEMS[name], group)]
    trained = [each for each in record.results if any("nll" in m.raw for m in each.measurements)]
    with mpl.rc_context(STYLE):
        pictures = {"bench.png": _scaling(panels), "quality.png": _quality(trained)}
        return {name: as_png(figure) for name, figure in pictures.items() if figure is not None}


def _scaling(panels: Sequence[Sequence[CaseResult]]) -> Figure | None:
    if not panels:
        return None
    columns = min(len(panels), _PANELS_PER_ROW)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax, results in zip(axes, panels, strict=False):
        _panel(ax, ITEMS[results[0].item], results)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    return figure


def _panel(ax: Axes, item: Item, results: Sequence[CaseResult]) -> None:
    """Join what differs in the variable alone; points of other cases stand apart."""
    found = fits(item, results)
    labels = {
        (fit.model, fit.points): f"{fit.model}  ~ {fit.variable}^{fit.exponent:.2f}"
        for fit in found
    }
    every = series(item, results)
    for each in every:
        x, y = zip(*each.points, strict=True)
        label, colour = labels.get((each.model, each.points)), _colour(each.model)
        ax.plot(x, y, "o-", markersize=3, color=colour, label=label)
    other = {k: None for each in every for k in each.fixed if each.fixed[k] != every[0].fixed[k]}
    apart = f" (apart: other {', '.join(other)})" if other else ""
    ax.set(title=found[0].item, xlabel=f"{item.variable}{apart}", ylabel=found[0].quantity)
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        label_plainly(axis)
    ax.legend(fontsize=7, frameon=False)


def _colour(model: str) -> str:
    """Return the same colour for the same model in every panel."""
    first = [BASELINE, OURS, FLOOR]
    names = [*first, *sorted({*STEP_MODELS, "ours-picard"} - set(first))]
    return COLOURS[names.index(model) % len(COLOURS)] if model in names else "#000000"


def _quality(results: Sequence[CaseResult]) -> Figure | None:
    names = list(dict.fromkeys(result.case.split()[0] for result in results))
    if not names:
        return None
    figure = Figure(figsize=(3.6 * len(names), 3.4), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        _curves(ax, name, [result for result in results if result.case.split()[0] == name])
    return figure


def _curves(ax: Axes, name: str, results: Sequence[CaseResult]) -> None:
    for first, result in enumerate(results):
        for each in result.measurements:
            label, colour = None if first else each.model, _colour(each.model)
            ax.semilogx(each.raw["seconds"], each.raw["nll"], color=colour, label=label)
    ax.set(title=name, xlabel="seconds of training", ylabel="exact test NLL (nats)")
    label_plainly(ax.xaxis)
    ax.legend(fontsize=7, frameon=False)
