"""`nflows-iresnet figures`: check everything, then train, draw, and write the page."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from nflows_iresnet import interruption
from nflows_iresnet.experiments.config import (
    UsageError,
    check_extra,
    describe_environment,
    resolve_device,
)
from nflows_iresnet.experiments.figures import DESCRIPTIONS, Drawing, Settings, Stage
from nflows_iresnet.experiments.files import WriteError, prepare_folder, write_atomically
from nflows_iresnet.experiments.options import FiguresOptions
from nflows_iresnet.training import TrainingDivergedError, finite

RESULTS = "figures.json"


class Figure(Protocol):
    """A module of this package that draws one figure."""

    def count_models(self, settings: Settings) -> int:
        """Return how many models are trained."""

    def draw(self, settings: Settings, stage: Stage) -> Drawing:
        """Train, measure and draw; `with stage(label):` is around each model."""


def run(parsed: FiguresOptions) -> int:
    """Run the subcommand and return the exit status.

    Raises:
        UsageError: arguments cannot work; nothing was written.
    """
    try:
        names = chosen_names(parsed.only)
        settings = to_settings(parsed)
        folder = open_folder(parsed.out)
    except ValueError as error:
        raise UsageError(str(error)) from error
    torch.set_num_threads(settings.threads)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"nflows\.")
            return _work(names, settings, folder, quiet=parsed.quiet)
    except KeyboardInterrupt:
        print(f"interrupted: the figures that were done are in {folder}", file=sys.stderr)
        return interruption.STATUS
    except WriteError as error:
        raise WriteError(f"{error}; the figures that were done are in {folder}") from error


def chosen_names(only: Sequence[str] | None) -> list[str]:
    """Return the figures that were asked for, all by default."""
    return [name for name in DESCRIPTIONS if not only or name in only]


def to_settings(parsed: FiguresOptions) -> Settings:
    """Turn parsed arguments into settings.

    Raises:
        ValueError: there is no such device.
    """
    device = resolve_device(parsed.device)
    return Settings(parsed.steps, parsed.seed, parsed.quick, device, parsed.threads)


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


def _work(names: list[str], settings: Settings, folder: Path, *, quiet: bool) -> int:
    """Draw what can be drawn, and return the exit status."""
    from nflows_iresnet.experiments.progress import CaseProgress

    figures: dict[str, Figure] = {name: import_module(f"{__package__}.{name}") for name in names}
    content: dict[str, Any] = {
        "arguments": {"only": names, **asdict(settings)},
        "environment": describe_environment(settings.device),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "figures": {},
    }
    drawings: dict[str, Drawing] = {}
    total = sum(figure.count_models(settings) for figure in figures.values())
    with CaseProgress(total, quiet=quiet) as progress:
        for name, figure in figures.items():
            started = time.perf_counter()
            try:
                drawing = figure.draw(settings, progress.stage)
            except TrainingDivergedError as error:
                content["figures"][name] = {"failure": str(error)}
                print(f"{name} FAILED: {error}", file=sys.stderr)
                continue
            drawings[name] = drawing
            content["figures"][name] = {
                "picture": f"{name}.png",
                "title": drawing.title,
                "caption": drawing.caption,
                "seconds": time.perf_counter() - started,
                **drawing.numbers,
            }
            write_atomically(folder / f"{name}.png", drawing.picture)
    text = json.dumps(finite(content), indent=1, allow_nan=False)
    write_atomically(folder / RESULTS, text.encode())
    path = folder / "report.html"
    write_atomically(path, _render(content, drawings).encode())
    print(path if quiet else f"\nreport: {path}")
    return 0 if len(drawings) == len(figures) else 1


def _render(content: dict[str, Any], drawings: dict[str, Drawing]) -> str:
    """Render the page of what figures.json holds."""
    from nflows_iresnet.experiments.report import Page, Section, command_of

    usual = {**asdict(Settings()), "seed": None}
    given = {
        name: value for name, value in content["arguments"].items() if value != usual.get(name)
    }
    return Page(
        "nflows-iresnet figures",
        "Invertible residual networks in pictures",
        [
            Section(each.title, pictures=[(name, each.picture, each.caption)])
            for name, each in drawings.items()
        ],
        content,
        command_of("figures", [], given),
        meta=[f"seed {content['arguments']['seed']}"],
        numbers="figures.json",
    ).render()
