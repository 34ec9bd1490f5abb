"""Ctrl-C: never a traceback, and what was trained is not lost."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nflows_iresnet.experiments.cli import main

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
IMPORTS = """
import signal, sys

class Interrupting:
    def find_spec(self, name, *rest):
        if name == sys.argv[1]:
            signal.raise_signal(int(sys.argv[2]))

sys.meta_path.insert(0, Interrupting())
from nflows_iresnet.experiments.cli import main
sys.exit(main(["compare", "moons", "--steps", "1"]))
"""
ENDINGS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
SCRIPT = """
import re, sys
print("up", flush=True)
from nflows_iresnet.experiments.cli import main
sys.exit(main())
"""

# --- while the command starts ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "numpy", "nflows", "nflows_iresnet.experiments.compare"])
@pytest.mark.parametrize(("number", "status"), ENDINGS)
def test_an_interrupted_import_is_one_line(name: str, number: int, status: int) -> None:
    command = [sys.executable, "-c", IMPORTS, name, str(int(number))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stderr == "nflows-iresnet: interrupted before training began\n"


@pytest.mark.parametrize("seconds", [0.2, 0.5, 1.0, 2.0])
def test_a_command_can_be_interrupted_at_any_moment(seconds: float, tmp_path: Path) -> None:
    """From the first line of our code on; before it, the interpreter answers for itself."""
    arguments = ["moons", "--models", "nice", "--steps", "99999", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "compare", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    assert "interrupted" in printed


def test_what_is_imported_before_ctrl_c_is_taken_over_is_next_to_nothing() -> None:
    script = (
        "import re, sys; before = set(sys.modules); import nflows_iresnet.experiments.cli\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ours = {"nflows_iresnet", *(f"nflows_iresnet.experiments{name}" for name in (".cli", ""))}
    allowed = {"__future__", "signal", "nflows_iresnet.interruption", *ours}
    assert set(done.stdout.split()) <= allowed


# --- while a model is trained ---------------------------------------------------------------------

SMALL = ["--steps", "6", "--num-layers", "1", "--hidden-features", "16"]
IMAGES = [*SMALL, "--num-blocks-per-layer", "1", "--batch-size", "16", "--num-train", "64"]
CLASSIFIERS = ["--steps", "6", "--num-blocks", "1", "--hidden-channels", "8", "--repeats", "1"]
RUNS = {
    "compare": ["compare", "moons", "--models", "residual-flow", "normflows-residual", *SMALL],
    "images": ["compare", "digits", "--images", "--models", "residual-flow", "realnvp", *IMAGES],
    "table1": ["table1", "--coeffs", "0.9", *CLASSIFIERS, "--num-train", "64"],
    "table2": ["table2", "--models", "made", "residual-flow", *SMALL],
}
PRESSED_IN = 9
"""A step in the middle of the second model."""


class Steps:
    """Counts the optimiser steps, and presses Ctrl-C in the middle of one of them."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, times: int = 1, number: int = signal.SIGINT
    ) -> None:
        self.count, self.finished = 0, 0
        step: Callable[..., Any] = torch.optim.Adam.step

        def interrupted(optimizer: torch.optim.Adam, *rest: Any) -> Any:
            self.count += 1
            if self.count == PRESSED_IN:
                for _ in range(times):
                    signal.raise_signal(number)
            value = step(optimizer, *rest)
            self.finished += 1
            return value

        monkeypatch.setattr(torch.optim.Adam, "step", interrupted)


def lasting(value: Any) -> Any:
    """Leave out what differs from run to run: times, memory and the date."""
    if isinstance(value, list):
        return [lasting(item) for item in value]
    if isinstance(value, dict):
        changing = ("seconds", "ms_", "memory", "started", "table")
        kept = (name for name in value if not any(word in name for word in changing))
        return {name: lasting(value[name]) for name in kept}
    return value


@pytest.mark.parametrize("name", RUNS)
def test_the_step_under_way_is_finished_and_saved(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut off"
    assert main([*RUNS[name], "--quiet", "--out", str(straight)]) == 0
    steps = Steps(monkeypatch)
    assert main([*RUNS[name], "--quiet", "--out", str(cut)]) == 130
    assert steps.finished == PRESSED_IN
    (checkpoint,) = (cut / "runs").glob("*.pt")
    interrupted, resume = capsys.readouterr().err.splitlines()
    assert interrupted.startswith("interrupted: 1 of ")
    assert str(checkpoint) in interrupted
    command = shlex.split(resume.removeprefix("go on with: nflows-iresnet "))
    assert main([*command, "--quiet"]) == 0
    first, second = (json.loads((out / "results.json").read_text()) for out in (straight, cut))
    assert lasting(first) == lasting(second)
    assert steps.finished == 6 * len(first.get("outcomes") or first["results"]), "none taken twice"
    assert not list((cut / "runs").glob("*.pt"))
    for path in (straight / "runs").iterdir():
        with np.load(path) as one, np.load(cut / "runs" / path.name) as other:
            assert all(np.array_equal(one[key], other[key], equal_nan=True) for key in one)


def test_a_second_ctrl_c_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Steps(monkeypatch, times=2)
    assert main([*RUNS["compare"], "--quiet", "--out", str(tmp_path / "out")]) == 130
    assert steps.finished == PRESSED_IN - 1
    assert not list((tmp_path / "out" / "runs").glob("*.pt"))
    assert "1 of 2 runs are kept" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_is_ctrl_c_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second one stops nothing: `timeout` tells a process, then the group that it is in."""
    steps = Steps(monkeypatch, times=2, number=signal.SIGTERM)
    assert main([*RUNS["compare"], "--quiet", "--out", str(tmp_path / "out")]) == 143
    assert steps.finished == PRESSED_IN
    assert list((tmp_path / "out" / "runs").glob("*.pt"))
    assert "interrupted: 1 of 2 runs are kept" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    assert main([*RUNS["compare"], "--quiet", "--out", str(tmp_path / "out"), "--resume"]) == 0


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a command in the background of a shell script."""
    steps, previous = Steps(monkeypatch), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main([*RUNS["compare"], "--quiet", "--out", str(tmp_path / "out")]) == 0
    finally:
        signal.signal(signal.SIGINT, previous)
    assert steps.finished == 12
