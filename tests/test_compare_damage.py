"""Damaged files and full disks: one line that names the file, and advice that works."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.session import LiveProgress

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

SMALL = ["--steps", "3", "--num-layers", "2", "--hidden-features", "16"]
CLASSIFIERS = ["--steps", "3", "--repeats", "1", "--num-blocks", "1", "--hidden-channels", "8"]
COMMANDS = {
    "compare": ["compare", "moons", "--models", "nice", "realnvp", *SMALL],
    "table2": ["table2", "moons", "--models", "nice", "realnvp", *SMALL],
    "table1": ["table1", "--coeffs", "0.9", *CLASSIFIERS, "--num-train", "64"],
}


@dataclass(frozen=True)
class Runs:
    """Finished runs of every command, each to be copied before it is damaged."""

    path: Path

    def copy(self, name: str, out: Path) -> list[str]:
        """Return the command whose results are in `out`."""
        shutil.copytree(self.path / name, out)
        return [*COMMANDS[name], "--quiet", "--out", str(out)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    path = tmp_path_factory.mktemp("runs")
    for name, command in COMMANDS.items():
        assert main([*command, "--quiet", "--out", str(path / name)]) == 0
    return Runs(path)


def complaint(status: int, expected: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Check the status and that one line was printed, and return it."""
    printed = capsys.readouterr()
    assert (status, printed.out) == (expected, "")
    (line,) = printed.err.splitlines()
    assert line.startswith("nflows-iresnet: error: ")
    return line


def follow(line: str) -> None:
    """Do what a message says in brackets: rm or mv."""
    (advice,) = re.findall(r"\(((?:rm|mv) .*?)\)", line)
    verb, *paths = shlex.split(advice)
    os.replace(*paths) if verb == "mv" else os.remove(*paths)


# --- results.json ---------------------------------------------------------------------------------


def with_value(place: str, value: object) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        data = part = json.loads(content)
        *path, last = place.split(".")
        for name in path:
            part = part[int(name) if isinstance(part, list) else name]
        part[last] = value
        return json.dumps(data).encode()

    return change


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "text": lambda content: b"step,loss\n1,2\n",
    "html": lambda content: b"<html></html>",
    "not text": lambda content: b"\xff\xfe\x00\x89PNG",
    "null": lambda content: b"null",
    "number": lambda content: b"12",
    "list": lambda content: b"[1, 2]",
    "another object": lambda content: b'{"a": 1}',
    "nested too deep": lambda content: b"[" * 200_000,
    "another format": with_value("format", 99),
    "format alone": lambda content: json.dumps({"format": json.loads(content)["format"]}).encode(),
    "arguments of another type": with_value("arguments", []),
    "environment without versions": with_value("environment", {}),
    "a date of another type": with_value("started", 3),
    "an unknown field": with_value("surprise", 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", COMMANDS)
def test_damaged_results_are_named_with_a_way_out(
    name: str, damage: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, results = runs.copy(name, tmp_path / "out"), tmp_path / "out" / "results.json"
    results.write_bytes(DAMAGES[damage](results.read_bytes()))
    capsys.readouterr()
    anew = complaint(main(command), 2, capsys)
    resumed = complaint(main([*command, "--resume"]), 2, capsys)
    for line in (anew, resumed):
        assert f"'{results}'" in line
        assert "add --resume" not in line
        assert "choose another --out" in line
    follow(resumed)
    assert not results.exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("datasets", ["moons"]),
        ("datasets.0.features", "two"),
        ("datasets.0.notes", 1),
        ("results.0", None),
        ("results.0.metrics", []),
        ("results.0.metrics.test_nll", "low"),
        ("results.0.training.curve", [1]),
        ("published", {"nice": 1}),
    ],
)
def test_every_field_of_results_is_checked(
    place: str, value: object, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, results = runs.copy("compare", tmp_path / "out"), tmp_path / "out" / "results.json"
    content = json.loads(results.read_bytes())
    if place == "results.0":
        content["results"][0] = value
        results.write_text(json.dumps(content))
    else:
        results.write_bytes(with_value(place, value)(results.read_bytes()))
    capsys.readouterr()
    line = complaint(main([*command, "--resume"]), 2, capsys)
    assert place.split(".")[0] in line


@pytest.mark.parametrize("name", COMMANDS)
def test_the_way_out_of_damaged_results_works(
    name: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, results = runs.copy(name, tmp_path / "o u't"), tmp_path / "o u't" / "results.json"
    results.unlink()
    results.mkdir()
    capsys.readouterr()
    line = complaint(main([*command, "--resume"]), 2, capsys)
    assert "directory" in line.lower()
    follow(line)
    line = complaint(main([*command, "--resume"]), 2, capsys)
    assert "there is none; start anew without --resume" in line
    assert main(command) == 0
    assert main([*command, "--resume"]) == 0


@pytest.mark.parametrize("file", ["report.html", "results.csv", "moons.png"])
def test_a_folder_in_the_way_is_said_before_anything_is_trained(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o u't"
    (out / file).mkdir(parents=True)
    command = [*COMMANDS["compare"], "--quiet", "--out", str(out)]
    with monkeypatch.context() as patched:
        patched.setattr(LiveProgress, "step", lambda *_: pytest.fail("it was trained"))
        line = complaint(main(command), 2, capsys)
    assert f'{file}" is a folder' in line or f"{file}' is a folder" in line
    follow(line)
    assert main(command) == 0


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("figures --quick", "report.html"),
        ("figures --quick", "dynamics.png"),
        ("bench --quick", "bench.png"),
        ("compare moons --race 9s", "race.md"),
        ("compare moons --race 9s", "moons--race.png"),
    ],
)
def test_a_folder_in_the_way_is_said_before_anything_is_measured(
    command: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / file).mkdir(parents=True)
    line = complaint(main([*command.split(), "--out", str(tmp_path / "out")]), 2, capsys)
    assert f"{file}' is a folder" in line
    assert [each.name for each in (tmp_path / "out").iterdir()] == [file]


def test_a_file_in_the_way_of_the_weights_is_said_before_results_are_taken_back(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = runs.copy("compare", tmp_path / "out")
    weights, results = tmp_path / "out" / "weights", tmp_path / "out" / "results.json"
    before = results.read_bytes()
    shutil.rmtree(weights)
    weights.touch()
    capsys.readouterr()
    line = complaint(main([*command, "--resume"]), 2, capsys)
    assert f"'{weights}' is a file" in line
    assert results.read_bytes() == before
    follow(line)
    assert main([*command, "--resume"]) == 0


@pytest.mark.parametrize(
    ("name", "file", "status"), [("table2", "moons--bars.png", 1), ("table1", "table1.png", 2)]
)
def test_a_folder_that_gets_in_the_way_is_said_with_the_remedy(
    name: str,
    file: str,
    status: int,
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = runs.copy(name, tmp_path / "out")
    (tmp_path / "out" / file).unlink()
    (tmp_path / "out" / file).mkdir()
    capsys.readouterr()
    line = complaint(main([*command, "--resume"]), status, capsys)
    assert f"'{tmp_path / 'out' / file}'" in line
    follow(line)
    assert main([*command, "--resume"]) == 0


@pytest.mark.parametrize(("name", "file"), [("bench", "bench.json"), ("figures", "figures.json")])
def test_what_is_never_read_is_not_overwritten(
    name: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).write_bytes(b"{")
    line = complaint(main([name, "--quick", "--out", str(tmp_path)]), 2, capsys)
    assert "choose another --out" in line
    assert (tmp_path / file).read_bytes() == b"{"


# --- what lies beside -----------------------------------------------------------------------------


def empty_state(content: bytes) -> bytes:
    import io

    found = torch.load(io.BytesIO(content), weights_only=True)
    buffer = io.BytesIO()
    torch.save({**found, "state": {"model": {}}}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[:99], lambda content: b"text", empty_state],
    ids=["empty", "cut short", "text", "of no model"],
)
@pytest.mark.parametrize("name", COMMANDS)
def test_the_way_out_of_a_damaged_checkpoint_works(
    name: str,
    damage: Callable[[bytes], bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*COMMANDS[name], "--quiet", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(LiveProgress, "step", lambda *_: signal.raise_signal(signal.SIGINT))
        assert main(command) == 130
    (checkpoint,) = (tmp_path / "out" / "runs").glob("*.pt")
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    capsys.readouterr()
    line = complaint(main([*command, "--resume"]), 2, capsys)
    assert "is damaged, of another version, or none: delete it" in line
    assert str(checkpoint) in line
    follow(line)
    assert main([*command, "--resume"]) == 0
    data: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not any(each.get("failure") or each.get("failures") for each in outcomes(data))


def outcomes(data: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = data.get("outcomes") or data["results"]
    return found


def test_the_way_out_of_damaged_arrays_works(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, out = runs.copy("compare", tmp_path / "out"), tmp_path / "out"
    (out / "runs" / "moons--nice--0.npz").write_bytes(b"PK")
    capsys.readouterr()
    line = complaint(main([*command, "--resume"]), 2, capsys)
    assert "moons--nice--0.npz' is damaged" in line
    follow(line)
    assert main([*command, "--resume"]) == 0
    assert "arrays would say, and they are gone" in (out / "report.html").read_text()
