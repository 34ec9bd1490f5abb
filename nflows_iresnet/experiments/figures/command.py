"""`nflows-iresnet figures`: check everything, then train, draw, and write the page."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Protocol

from nflows_iresnet.experiments import session
from nflows_iresnet.experiments.figures import DESCRIPTIONS, Drawing
from nflows_iresnet.experiments.options import FiguresOptions
from nflows_iresnet.experiments.record import RunRecord
from nflows_iresnet.files import write_atomically
from nflows_iresnet.training import TrainingDivergedError

RESULTS = "figures.json"
FIGURES = {
    "densities": "flows:Densities",
    "dynamics": "dynamics:Dynamics",
    "digits": "flows:Digits",
}
"""The class of each figure, which is made from the options."""
Stage = Callable[[str], AbstractContextManager[None]]


class Figure(Protocol):
    """A figure before it is drawn; `num_models` are trained for it."""

    num_models: int

    def draw(self, stage: Stage) -> Drawing:
        """Train, measure and draw; `with stage(label):` is around each model."""


@dataclass(frozen=True)
class FiguresRecord(RunRecord):
    """The content of figures.json: what is known of each figure, by its name."""

    figures: dict[str, dict[str, Any]]


def _work(options: FiguresOptions, folder: Path) -> int:
    """Draw what can be drawn, and return the exit status."""
    names = [name for name in DESCRIPTIONS if not options.only or name in options.only]
    figures: dict[str, Figure] = {
        name: resolve_name(f"{__package__}.{FIGURES[name]}")(options) for name in names
    }
    chosen = {name: getattr(options, name) for name in _USUAL}
    record = FiguresRecord.begin({"only": names, **chosen}, options.device, figures={})
    drawings: dict[str, Drawing] = {}
    total = sum(figure.num_models for figure in figures.values())
    with session.CaseProgress(total, quiet=options.quiet) as progress:
        for name, figure in figures.items():
            started = time.perf_counter()
            try:
                drawing = figure.draw(progress.stage)
            except TrainingDivergedError as error:
                record.figures[name] = {"failure": str(error)}
                print(f"{name} FAILED: {error}", file=sys.stderr)
                continue
            drawings[name] = drawing
            record.figures[name] = {
                "picture": f"{name}.png",
                "title": drawing.title,
                "caption": drawing.caption,
                "seconds": time.perf_counter() - started,
                **drawing.numbers,
            }
            write_atomically(folder / f"{name}.png", drawing.picture)
    write_atomically(folder / RESULTS, record.as_json().encode())
    path = folder / "report.html"
    write_atomically(path, _render(record, drawings).encode())
    print(path if options.quiet else f"\nreport: {path}")
    return 0 if len(drawings) == len(figures) else 1


run = partial(
    session.run_at_once,
    _work,
    results=RESULTS,
    files=("report.html", *(f"{name}.png" for name in DESCRIPTIONS)),
    kept="the figures that were done are",
)
"""Run the subcommand and return the exit status."""
_USUAL = {"steps": None, "seed": None, "quick": False, "device": "cpu", "threads": 1}
"""What need not be said to repeat it; the seed always is."""


def _render(record: FiguresRecord, drawings: dict[str, Drawing]) -> str:
    """Render the page of what figures.json holds."""
    from nflows_iresnet.experiments.report import Page, Section, command_of

    given = {name: value for name, value in record.arguments.items() if value != _USUAL.get(name)}
    return Page(
        "nflows-iresnet figures",
        "Invertible residual networks in pictures",
        [
            Section(each.title, pictures=[(name, each.picture, each.caption)])
            for name, each in drawings.items()
        ],
        record,
        command_of("figures", [], given),
        meta=[f"seed {record.arguments['seed']}"],
        numbers=RESULTS,
    ).render()
