"""`nflows-iresnet figures`: what is counted is right, and what is written is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from nflows_iresnet.experiments import runs
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.config import UsageError
from nflows_iresnet.experiments.figures import DESCRIPTIONS, command, dynamics, flows
from nflows_iresnet.experiments.figures.dynamics import (
    count_crossings,
    find_crossings,
    smallest_gap,
)
from nflows_iresnet.experiments.options import FiguresOptions
from nflows_iresnet.training import TrainingDivergedError
from nflows_iresnet.training.progress import check_finite

PNG = b"\x89PNG"

# --- crossings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], 0),
        ([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], 3),
        ([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], 2),
        ([[0.0, 1.0, 2.0], [0.0, 2.0, 1.0], [0.0, 2.0, 1.0]], 1),
        ([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]], 1),
        ([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]], 1),
        ([[0.0, 1.0], [0.5, 0.5], [0.0, 1.0]], 0),
        ([[1.0, 0.0], [0.0, 1.0]], 1),
        ([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 1),
        ([[0.0], [5.0]], 0),
    ],
    ids=[
        "parallel",
        "reversal of three",
        "there and back",
        "neighbours once",
        "through a meeting",
        "through a long meeting",
        "touching",
        "unsorted start",
        "a common start",
        "one path",
    ],
)
def test_crossings_of_known_paths(paths: list[list[float]], expected: int) -> None:
    assert count_crossings(np.array(paths)) == expected


def test_a_reversal_has_every_pair_once() -> None:
    points = np.random.default_rng(0).normal(size=20)
    assert count_crossings(np.stack([points, -points])) == 20 * 19 // 2


def test_crossings_are_where_the_lines_meet() -> None:
    paths = np.array([[0.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    assert find_crossings(paths) == pytest.approx(np.array([[0.75, 1.25]]))
    assert find_crossings(np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])).shape == (1, 2)


def test_the_smallest_gap() -> None:
    assert smallest_gap(np.array([[0.0, 1.0, 3.0], [5.0, 0.0, 0.5]])) == 0.5


# --- dynamics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", dynamics.TARGETS)
@pytest.mark.parametrize("coeff", [0.5, 0.9])
def test_paths_of_an_invertible_net_never_cross(name: str, coeff: float) -> None:
    """In training, with weights thrown far, its gaps are above those that the certificate gives."""
    torch.manual_seed(0)
    chain = dynamics.invertible_chain(4, coeff)
    dynamics.fit(chain, dynamics.TARGETS[name], steps=15, learning_rate=0.1)
    numbers = dynamics.trace(chain, dynamics.TARGETS[name]).numbers
    assert numbers["crossings"] == 0
    assert numbers["largest_lipschitz_bound"] <= coeff
    assert numbers["smallest_gap"] >= numbers["guaranteed_gap"] > 0


def test_paths_of_a_plain_net_may_cross() -> None:
    torch.manual_seed(0)
    chain = dynamics.plain_chain(1)
    dynamics.fit(chain, dynamics.TARGETS["reflection"], steps=150)
    fitted = dynamics.trace(chain, dynamics.TARGETS["reflection"], num_paths=9)
    assert fitted.numbers["crossings"] == 9 * 8 // 2
    assert fitted.numbers["rms_error"] < fitted.numbers["least_monotone_error"] / 3
    assert "guaranteed_gap" not in fitted.numbers


def test_the_least_error_of_a_monotone_map() -> None:
    points = torch.linspace(-2, 2, 33, dtype=torch.float64)[:, None]
    least = dynamics.least_monotone_error
    assert least({1.0: points}) == 0
    assert least({1.0: -points}) == pytest.approx(float(points.std(correction=0)))
    assert least({0.5: -points, 1.0: -points}) == pytest.approx(2**0.5 * least({1.0: -points}))


# --- digits ---------------------------------------------------------------------------------------


def test_interpolations_start_and_end_at_the_images_and_keep_norms() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 400, dtype=torch.float64)
    between = flows.interpolate(first, second, 5)
    assert between.shape == (3, 5, 400)
    torch.testing.assert_close(between[:, 0], first)
    torch.testing.assert_close(between[:, -1], second)
    assert bool(((between.norm(dim=2) / 20 - 1).abs() < 0.2).all())


# --- command --------------------------------------------------------------------------------------


def run(out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["figures", "--quick", "--out", str(out), *arguments]) == 0
    content: dict[str, Any] = json.loads((out / "figures.json").read_text())
    return content


def test_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = run(tmp_path, "--steps", "3", "--seed", "5", "--quiet")
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    chosen = {"steps": 3, "seed": 5, "quick": True, "device": "cpu", "threads": 1}
    assert content["arguments"] == {"only": list(DESCRIPTIONS), **chosen}
    assert list(content["figures"]) == list(DESCRIPTIONS)
    for name, entry in content["figures"].items():
        picture = (tmp_path / entry["picture"]).read_bytes()
        assert picture.startswith(PNG)
        assert len(picture) > 10_000
        assert f'<img alt="{name}"' in page
    assert page.count("<figcaption>") == len(DESCRIPTIONS)
    assert "--steps 3 --seed 5 --quick" in page
    networks = content["figures"]["dynamics"]["networks"]
    assert networks["reflection/invertible"]["crossings"] == 0
    densities = content["figures"]["densities"]
    assert densities["configuration"]["seed"] == 5
    assert [each["failures"] for each in densities["results"]] == [[]] * 4
    assert content["figures"]["digits"]["pixels_changed"] == 0


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    arguments = ("--only", "dynamics", "--steps", "4", "--quiet")
    first, second = (run(tmp_path / name, *arguments)["figures"]["dynamics"] for name in "ab")
    other = run(tmp_path / "c", *arguments, "--seed", "1")["figures"]["dynamics"]
    assert first["networks"] == second["networks"] != other["networks"]


def test_a_training_that_diverges_leaves_the_other_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "train_run", diverge)
    arguments = ["--quick", "--steps", "3", "--only", "digits", "dynamics", "--out", str(tmp_path)]
    assert main(["figures", *arguments]) == 1
    assert "digits FAILED: the training loss was inf at step 7; lower" in capsys.readouterr().err
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert "loss was inf" in figures["digits"]["failure"]
    assert (tmp_path / figures["dynamics"]["picture"]).read_bytes().startswith(PNG)
    assert "Paths through" in (tmp_path / "report.html").read_text()


def options(out: Path, **more: Any) -> FiguresOptions:
    """Return what the command line hands to the command."""
    chosen: dict[str, Any] = {
        "only": ("dynamics",),
        "steps": 2,
        "seed": 0,
        "quick": True,
        "quiet": True,
    }
    return FiguresOptions(**chosen | {"out": str(out)} | more)


def test_threads_and_device_are_heard_and_stand_in_the_command_that_repeats_it(
    tmp_path: Path,
) -> None:
    threads = torch.get_num_threads()
    try:
        assert command.run(options(tmp_path, threads=2, device="cpu")) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    arguments = json.loads((tmp_path / "figures.json").read_text())["arguments"]
    assert (arguments["device"], arguments["threads"]) == ("cpu", 2)
    assert "--quick --threads 2<" in (tmp_path / "report.html").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device 'cuda' is not available"):
        command.run(options(tmp_path / "out", device="cuda"))
    assert not (tmp_path / "out").exists()


def test_the_figures_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figures", "--list", "--out", str(tmp_path / "out")]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[1:]] == list(DESCRIPTIONS)
    assert not (tmp_path / "out").exists()


def diverge(*_: object) -> None:
    check_finite(float("inf"), 7)


def test_a_loss_that_is_not_finite_is_noticed() -> None:
    chain = dynamics.plain_chain(1)
    with torch.no_grad():
        next(chain.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match="loss was nan at step 1"):
        dynamics.fit(chain, dynamics.TARGETS["reflection"], steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "dynamic"], "did you mean 'dynamics'"),
        (["--steps", "0"], "'0' is not a positive integer"),
        (["--seed", "-1"], "'-1' is not an integer from 0"),
    ],
    ids=["figure", "steps", "seed"],
)
def test_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["figures", *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_with_figures_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "figures.json").write_text("{}")
    assert main(["figures", "--out", str(tmp_path)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["figures", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write" in capsys.readouterr().err
