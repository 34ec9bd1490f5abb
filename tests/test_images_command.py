"""`nflows-iresnet compare --images`: everything is written, and nothing is lost."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.session import LiveProgress

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

TINY = ["--steps", "4", "--num-layers", "1", "--num-blocks-per-layer", "1"]
TINY += ["--hidden-features", "16", "--batch-size", "16", "--num-train", "64"]
DIGITS = ["compare", "digits", "--images", *TINY]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images") / "out"
    arguments = [*DIGITS, "--models", "residual-flow", "realnvp", "--out", str(out), "--quiet"]
    assert main(arguments) == 0
    return out


def results(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["results"]
    return found


def test_everything_is_written(finished: Path) -> None:
    pictures = ["digits.png"]
    for model in ("residual-flow", "realnvp"):
        pictures += [f"digits--{model}--{kind}.png" for kind in ("samples", "reconstructions")]
    written = {path.name for path in finished.iterdir()} - {"tensorboard"}
    numbers = {"results.json", "results.csv", "weights", "runs"}
    assert written == {*pictures, *numbers, "report.html"}
    assert not list((finished / "runs").glob("*.pt"))
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    for text in ("images of 1x8x8, 17 levels", "moving average", "--images --num-train 64"):
        assert text in page
    assert "--amp" not in page


def test_results_are_complete(finished: Path) -> None:
    for result in results(finished):
        metrics = result["metrics"]
        assert not result["failures"]
        assert metrics["test_nll_exact"]
        assert metrics["test_nll_se"] > 0
        assert metrics["bits_per_dim"] == pytest.approx(metrics["test_nll"] / (64 * math.log(2)))
        assert metrics["bits_per_dim_se"] > 0
        assert metrics["round_trip_max"] < 1e-3
        assert result["training"]["steps"] == 4
        assert (metrics["exact_gap"] is None) == (result["model"] == "realnvp")
    data = json.loads((finished / "results.json").read_text())["datasets"][0]
    assert (data["shape"], data["levels"], data["num_train"]) == ([1, 8, 8], 17, 64)
    assert "torch.randperm with seed 0" in data["notes"][0]


def test_an_interrupted_run_goes_on_in_the_middle(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*DIGITS, "--models", "residual-flow", "realnvp", "--out", str(tmp_path / "out")]
    arguments += ["--quiet", "--checkpoint-minutes", "1e-9"]
    steps: list[float] = []

    def cut(self: LiveProgress, done: float, loss: float) -> None:
        steps.append(done)
        if len(steps) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LiveProgress, "step", cut)
        assert main(arguments) == 130
    assert "the one under way up to its last checkpoint" in capsys.readouterr().err
    (checkpoint,) = (tmp_path / "out" / "runs").glob("*.pt")
    assert checkpoint.name == "digits--realnvp--0.pt"
    monkeypatch.setattr(LiveProgress, "step", lambda self, done, loss: steps.append(done))
    assert main([*arguments, "--resume"]) == 0
    assert steps[7:] == [0.75, 1.0]
    assert not checkpoint.exists()
    for name in ("training", "metrics"):
        pairs = zip(results(finished), results(tmp_path / "out"), strict=True)
        assert all(same(first[name], second[name]) for first, second in pairs)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Compare results but for times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, list):
            return [timeless(item) for item in value]
        if isinstance(value, dict):
            kept = (name for name in value if "seconds" not in name and "ms_" not in name)
            return {name: timeless(value[name]) for name in kept if name != "peak_memory_mb"}
        return value

    return bool(timeless(first) == timeless(second))


def test_a_damaged_checkpoint_stops_before_anything_is_trained(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*DIGITS, "--models", "residual-flow", "realnvp", "--out", str(finished)]
    record = json.loads((finished / "results.json").read_text())
    kept, damaged = dict(record), finished / "runs" / "digits--realnvp--0.pt"
    record["results"] = record["results"][:1]
    damaged.write_bytes(b"half a checkpoint")
    try:
        (finished / "results.json").write_text(json.dumps(record))
        assert main([*arguments, "--resume"]) == 2
        assert "is damaged, of another version, or none: delete it" in capsys.readouterr().err
    finally:
        damaged.unlink()
        (finished / "results.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnist"], "'mnist' is a set of images: add --images"),
        (["moons", "--amp"], "add --images"),
        (["moons", "--num-train", "9"], "add --images"),
        (["moons", "--images"], "'moons' is not a set of images: leave out --images"),
        (["mnist", "--images", "--data-dir", "/nowhere"], "no train-images-idx3-ubyte"),
        (["digits", "--images", "--num-train", "9999"], "1 to 1439 training images"),
        (["digits", "--images", "--num-scales", "4"], "cannot have 4 scales"),
        (["digits", "--images", "--models", "normflows-residual"], "choose from ffjord, glow"),
        (["digits", "--images", "--checkpoint-minutes", "0"], "'0' is not a positive number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_list_names_sets_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("cifar100", "fashion-mnist", "glow-normflows"))


def test_mosaic_keeps_colours_in_place() -> None:
    from nflows_iresnet.experiments.pictures import tile

    pixels = np.arange(3 * 3 * 2 * 2.0).reshape(3, 3, 2, 2)
    mosaic = tile(pixels, columns=2)
    assert mosaic.shape == (5, 5, 3)
    for index, (top, left) in enumerate([(0, 0), (0, 3), (3, 0)]):
        part = mosaic[top : top + 2, left : left + 2]
        assert np.array_equal(part.transpose(2, 0, 1), pixels[index])


@pytest.mark.slow
def test_a_killed_command_goes_on_in_the_middle(tmp_path: Path) -> None:
    """The process is killed from outside, whenever its first checkpoints appear."""
    arguments = [*DIGITS, "--steps", "200", "--models", "realnvp", "--quiet", "--out"]
    flags = [*arguments, str(tmp_path / "killed")]
    command = [sys.executable, "-m", "nflows_iresnet.experiments", *flags]
    command += ["--checkpoint-minutes", "1e-9"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    checkpoint = tmp_path / "killed" / "runs" / "digits--realnvp--0.pt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    state = torch.load(checkpoint, weights_only=True)["state"]
    assert 0 < len(state["progress"]["seconds"]) < 200
    assert main([*arguments, str(tmp_path / "killed"), "--resume"]) == 0
    assert main([*arguments, str(tmp_path / "straight")]) == 0
    for name in ("training", "metrics"):
        (killed,), (straight,) = (results(tmp_path / folder) for folder in ("killed", "straight"))
        assert same(killed[name], straight[name])
