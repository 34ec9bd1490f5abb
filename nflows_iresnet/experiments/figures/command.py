"""`nflows-iresnet figures`: check everything, then train, draw, and write the page."""

from __future__ import annotations

import json
import sys
import time
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from nflows_iresnet.experiments.config import UsageError
from nflows_iresnet.experiments.environment import check_extra, describe_environment
from nflows_iresnet.experiments.figures.catalogue import chosen_figures
from nflows_iresnet.experiments.figures.drawing import Drawing, Figure, Settings
from nflows_iresnet.experiments.files import WriteError, prepare_folder, write_atomically
from nflows_iresnet.experiments.options import FiguresOptions
from nflows_iresnet.experiments.plain import finite
from nflows_iresnet.training import TrainingDivergedError

RESULTS = "figures.json"


def run(parsed: FiguresOptions) -> int:
    """Run the subcommand and return the exit status.

    Raises:
        UsageError: arguments cannot work; nothing was written.
    """
    try:
        figures = chosen_figures(parsed.only)
        folder = open_folder(parsed.out)
    except ValueError as error:
        raise UsageError(str(error)) from error
    settings = Settings(parsed.steps, parsed.seed, parsed.quick)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"nflows\.")
            return _work(figures, settings, folder, quiet=parsed.quiet)
    except KeyboardInterrupt:
        print(f"interrupted: the figures that were done are in {folder}", file=sys.stderr)
        return 130
    except WriteError as error:
        raise WriteError(f"{error}; the figures that were done are in {folder}") from error


def open_folder(out: str | None) -> Path:
    """Create the output folder, after checking that there is something to draw with.

    Raises:
        ValueError: it cannot be written, or holds figures already.
    """
    check_extra()
    folder = Path(out or f"results/figures-{datetime.now():%Y%m%d-%H%M%S}")
    if (folder / RESULTS).exists():
        raise ValueError(f"{str(folder)!r} already holds figures: choose another --out")
    prepare_folder(folder)
    return folder


def _work(figures: dict[str, Figure], settings: Settings, folder: Path, *, quiet: bool) -> int:
    """Draw what can be drawn, and return the exit status."""
    from nflows_iresnet.experiments.bench.progress import CaseProgress
    from nflows_iresnet.experiments.figures.report import render

    content = _fresh_content(figures, settings)
    drawings: dict[str, Drawing] = {}
    with CaseProgress(sum(f.stages(settings) for f in figures.values()), quiet=quiet) as progress:
        for name, figure in figures.items():
            started = time.perf_counter()
            try:
                drawings[name] = figure.draw(settings, progress.stage)
            except TrainingDivergedError as error:
                content["figures"][name] = {"failure": str(error)}
                print(f"{name} FAILED: {error}", file=sys.stderr)
                continue
            seconds = time.perf_counter() - started
            content["figures"][name] = _entry(name, drawings[name], seconds)
            write_atomically(folder / f"{name}.png", drawings[name].picture)
    text = json.dumps(finite(content), indent=1, allow_nan=False)
    write_atomically(folder / RESULTS, text.encode())
    path = folder / "report.html"
    write_atomically(path, render(content, drawings).encode())
    print(path if quiet else f"\nreport: {path}")
    return 0 if len(drawings) == len(figures) else 1


def _fresh_content(figures: dict[str, Figure], settings: Settings) -> dict[str, Any]:
    return {
        "arguments": {
            "only": list(figures),
            "steps": settings.steps,
            "seed": settings.seed,
            "quick": settings.quick,
        },
        "environment": describe_environment("cpu"),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "figures": {},
    }


def _entry(name: str, drawing: Drawing, seconds: float) -> dict[str, Any]:
    return {
        "picture": f"{name}.png",
        "title": drawing.title,
        "caption": drawing.caption,
        "seconds": seconds,
        **drawing.numbers,
    }
