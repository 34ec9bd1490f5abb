"""What is drawn: every best point of every curve, and images where they belong."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nflows_iresnet import datasets
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.data import Window
from nflows_iresnet.experiments.evaluation import Metrics
from nflows_iresnet.experiments.pictures import CELL, draw_curves, draw_race
from nflows_iresnet.experiments.record import DatasetSummary, Record, Result
from nflows_iresnet.training import CurvePoint, History


def run_of(model: str, values: list[float], repeat: int = 0) -> Result:
    """Return a run with these validations, whose seconds are no multiple of its steps."""
    points = tuple(CurvePoint(k + 1, (k + 1) ** 1.5, v, v) for k, v in enumerate(values))
    finite = [point for point in points if math.isfinite(point.validation)]
    best = min(finite, key=lambda point: point.validation)
    log = History(len(values), 1.0, 1.0, best.step, best.validation, points)
    return Result("a", model, repeat, repeat, {}, 5, (), log, Metrics(test_nll=1.0))


def drawn(runs: list[Result], unit: Callable[[float], float] = float) -> list[Axes]:
    axes = list(Figure().subplots(1, 2))
    draw_curves(axes, runs, unit)
    return axes


def dots(axes: Axes) -> list[tuple[float, float]]:
    marked = [line for line in axes.lines if line.get_marker() == "o"]
    points = [np.asarray(line.get_xydata()).tolist() for line in marked]
    return [(x, y) for ((x, y),) in points]


def are_visible(axes: Axes) -> bool:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    return all(left < x < right and bottom < y < top for x, y in dots(axes))


FALLING = list(np.linspace(5.0, 1.0, 20))
CURVES = {
    "best at the first point": [-90.0, 8.0, *np.linspace(20, 40, 18)],
    "best at the second point": [30.0, -90.0, 8.0, *np.linspace(20, 40, 17)],
    "best in the middle": [*FALLING, *np.linspace(1.1, 9.0, 20)],
    "best at the last point": FALLING,
    "diverged": [*FALLING, *10.0 ** np.arange(1, 30)],
    "diverged at once": [1.0, *10.0 ** np.arange(1, 30)],
    "infinite and not a number": [math.nan, 5.0, 0.5, math.inf, math.nan],
    "one point": [3.0],
    "level": [2.0, 2.0, 2.0],
    "steep": [1e6, 3.0, 2.0, 1.5, 1.4, 1.3, 1.2, 1.1],
}


@pytest.mark.parametrize("name", CURVES)
def test_a_dot_marks_the_best_point_of_a_curve_and_lies_in_the_window(name: str) -> None:
    run = run_of("one", CURVES[name])
    assert run.training is not None
    step = run.training.best_step
    by_steps, by_seconds = drawn([run])
    assert dots(by_steps) == [(step, run.training.best_validation)]
    assert dots(by_seconds) == [(step**1.5, run.training.best_validation)]
    assert are_visible(by_steps)
    assert are_visible(by_seconds)


def test_the_best_points_of_all_models_and_seeds_lie_in_one_window() -> None:
    runs = [
        run_of(name, [value + seed for value in values], seed)
        for name, values in CURVES.items()
        for seed in range(3)
    ]
    for axes in drawn(runs):
        assert len(dots(axes)) == len(runs)
        assert are_visible(axes)


def test_what_diverges_does_not_press_the_others_together() -> None:
    """A run whose tail is 1e29 leaves the window at the top, and the rest can be told apart."""
    names = ("best in the middle", "diverged", "diverged at once", "steep")
    for axes in drawn([run_of(name, CURVES[name]) for name in names]):
        low, high = axes.get_ylim()
        assert high - low < 10


def test_overfitting_is_seen_up_to_where_it_began() -> None:
    for axes in drawn([run_of("one", CURVES["best in the middle"])]):
        assert axes.get_ylim()[1] >= 4.0


def test_dots_are_in_the_unit_of_the_axis() -> None:
    for axes in drawn([run_of("one", FALLING)], unit=lambda nats: nats / 2):
        assert [y for _, y in dots(axes)] == [0.5]


def test_the_legend_names_each_model_once_also_if_its_first_seed_failed() -> None:
    failed = Result("a", "two", 0, 0, {}, 5, ("nan",), None, Metrics())
    axes = drawn([run_of("one", FALLING), run_of("one", FALLING, 1), failed, run_of("two", [1], 1)])
    legend = axes[-1].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]


def test_more_models_than_colours_are_told_apart() -> None:
    axes, _ = drawn([run_of(f"model-{k}", FALLING) for k in range(13)])
    curves = [line for line in axes.lines if line.get_marker() != "o"]
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == 13


SMALL = ["--steps", "3", "--num-layers", "1", "--hidden-features", "8", "--models", "realnvp"]
CLASSIFIERS = ["--steps", "3", "--repeats", "1", "--num-blocks", "1", "--hidden-channels", "4"]
COMMANDS = {
    "plane": ["compare", "moons", *SMALL],
    "race": ["compare", "moons", "--race", "0.1", "--learning-rate", "1e-3", *SMALL[2:]],
    "images": ["compare", "digits", "--images", "--num-train", "64", *SMALL],
    "table2": ["table2", *SMALL],
    "table1": ["table1", "--coeffs", "0.9", "--num-train", "64", *CLASSIFIERS],
    "bench": ["bench", "--only", "likelihood", "inverse-scaling", "--quick", "--repeats", "1"],
    "figures": ["figures", "--quick", "--steps", "2"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_tick_of_any_picture_is_raw_markup(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Markup is left alone, for a data set may be called a$b$, and logarithmic axes use it."""
    labels: list[str] = []
    genuine = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **named: Any) -> None:
        genuine(figure, *arguments, **named)
        axes = (axis for each in figure.axes for axis in (each.xaxis, each.yaxis))
        texts = (text for axis in axes for text in axis.get_ticklabels(which="both"))
        labels.extend(text.get_text() for text in texts)

    monkeypatch.setattr(Figure, "savefig", savefig)
    assert main([*COMMANDS[name], "--quiet", "--out", str(tmp_path / "out")]) == 0
    assert not [label for label in labels if "$" in label]


@pytest.mark.parametrize("features", [2, 3])
def test_many_models_are_drawn_in_rows_with_ticks(
    features: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).standard_cauchy((400, features))
    np.savetxt(tmp_path / "rows.csv", rows, delimiter=",")
    seen: list[Figure] = []
    genuine = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **named: Any) -> None:
        genuine(figure, *arguments, **named)
        seen.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    names = ["nice", "realnvp", "maf", "made", "glow", "nice-scaled", "realnvp-scaled"]
    words = [str(tmp_path / "rows.csv"), "--steps", "2", "--models", *names, "--quiet", "--out"]
    assert main(["compare", *words, str(tmp_path / "out")]) == 0
    (figure,) = seen
    assert figure.get_figwidth() < 5 * CELL
    titles = [axes.get_title().split("\n")[0] for axes in figure.axes]
    assert [title for title in titles if title in names] == names
    samples = next(axes for axes in figure.axes if axes.get_xlabel())
    assert len(samples.get_xticks()) > 1
    labels = [axes.get_xlabel() for axes in figure.axes if axes.axison]
    assert labels.count("quantiles (std): data → samples") == (len(names) if features == 3 else 0)
    if features == 2:
        assert "of 320 outside" in samples.get_xlabel()
        assert [axes.get_ylabel() for axes in figure.axes if "brightest: ≥" in axes.get_ylabel()]


def test_a_window_is_of_most_rows_where_tails_are_heavy() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4000, 2, generator=generator)
    assert 3.5 < Window.around(normal).half < 4.2
    heavy = normal / torch.randn(4000, 2, generator=generator)
    assert 10 < Window.around(heavy).half < 20
    for name in ("moons", "8-gaussians", "checkerboard", "pinwheel", "two-spirals", "circles"):
        train = datasets.load(name).train
        assert bool(Window.around(train).contains(train.numpy()).all())
    rare = torch.zeros(100, 2)
    rare[0] = 1
    assert Window.around(rare).half == pytest.approx(0.55)


def test_a_race_without_a_finite_validation_is_drawn() -> None:
    points = (CurvePoint(1, 1.0, math.nan, math.nan),)
    log = History(1, 1.0, 1.0, 1, math.nan, points)
    result = Result("a", "one", 0, 0, {}, 5, (), log, Metrics())
    summary = DatasetSummary("a", "made up", 2, 10, 10, 2, None, None, 0.0, None, ())
    record = Record({"race": 1.0, "models": ["one"]}, {}, "", (summary,), (result,))
    assert draw_race(record, summary).startswith(b"\x89PNG")
