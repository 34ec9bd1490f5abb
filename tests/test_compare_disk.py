"""A full disk, or a folder that can no longer be written: one line, and what is written stays."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from nflows_iresnet.experiments.bench import ITEMS, Item
from nflows_iresnet.experiments.bench.steps import step_case
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.models import Architecture

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

SMALL = ["--steps", "3", "--num-layers", "2", "--hidden-features", "16"]
CLASSIFIERS = ["--steps", "3", "--repeats", "1", "--num-blocks", "1", "--hidden-channels", "8"]
IMAGES = ["--num-layers", "1", "--num-blocks-per-layer", "1", "--hidden-features", "16"]
COMMANDS = {
    "compare": ["compare", "moons", "--models", "nice", "realnvp", *SMALL],
    "images": ["compare", "digits", "--images", "--models", "realnvp", "--steps", "2", *IMAGES],
    "table2": ["table2", "moons", "--models", "nice", "realnvp", *SMALL],
    "table1": ["table1", "--coeffs", "0.9", *CLASSIFIERS, "--num-train", "64"],
    "bench": ["bench", "--quick", "--only", "tiny", "--repeats", "1"],
    "figures": ["figures", "--quick", "--only", "dynamics", "--steps", "3"],
}
FILES = {
    "compare": [
        "results.json",
        "results.csv",
        "*.pt",
        "moons--nice--0.pt",
        "*.npz",
        "moons.png",
        "report.html",
    ],
    "images": ["*.pt", "digits--realnvp--samples.png"],
    "table2": ["results.json", "*--bars.png"],
    "table1": ["results.json", "*.pt", "table1.png", "report.html"],
    "bench": ["bench.json", "bench.png"],
    "figures": ["dynamics.png", "figures.json", "report.html"],
}
HEADS = ("results.json", "results.csv", "bench.json")
"""Files that are written before anything is done, too."""
CASES = [(name, file) for name, files in FILES.items() for file in files]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item of the benchmark that takes no time."""
    cases = [step_case(Architecture(2, 4, 1, 2), batch) for batch in (4, 8)]
    monkeypatch.setitem(ITEMS, "tiny", Item("steps", lambda _: cases, variable="B"))


def full_disk(monkeypatch: pytest.MonkeyPatch, function: str, file: str, after: int = 0) -> None:
    """Let the disk be full when a file is written that has been written `after` times before."""
    genuine: Callable[..., Any] = getattr(os, function)
    written = 0

    def fail(*arguments: Any) -> Any:
        nonlocal written
        if fnmatch(_name(arguments), file):
            written += 1
            if written > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return genuine(*arguments)

    monkeypatch.setattr(os, function, fail)


def _name(arguments: tuple[Any, ...]) -> str:
    """Return the name of the file behind a descriptor, or of the target of os.replace."""
    if isinstance(arguments[0], int):
        temporary = Path(os.readlink(f"/proc/self/fd/{arguments[0]}")).name
        return temporary[1:].rsplit(".", 1)[0]
    return Path(arguments[1]).name


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("name", "file"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_full_disk_is_one_line_and_what_is_written_stays(
    name: str,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, after = tmp_path / "out", 1 if file in HEADS else 0
    with monkeypatch.context() as patched:
        full_disk(patched, "replace", file, after)
        assert main([*COMMANDS[name], "--quiet", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert printed.out == ""
    assert "nflows-iresnet: error: cannot write" in line
    assert "No space left on device" in line
    assert fnmatch(Path(line.split("'")[1]).name, file)
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    for path in out.glob("*.json"):
        json.loads(path.read_text())
    if name in ("bench", "figures"):
        assert str(out) in line.split(";")[-1]
        return
    command = shlex.split(line.split("; go on with: nflows-iresnet ")[1])
    assert main([*command, "--quiet"]) == 0
    assert "No space" not in (out / "results.json").read_text(), "it is no failure of a model"


def test_what_was_written_in_part_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("descriptors have no names here")
    with monkeypatch.context() as patched:
        full_disk(patched, "fsync", "results.json", after=1)
        assert main([*COMMANDS["compare"], "--quiet", "--out", str(tmp_path)]) == 1
    assert "results.json': No space left on device; 0 of 2 runs are kept" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["results"] == []
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_is_gone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from nflows_iresnet.experiments.session import LiveProgress

    out = tmp_path / "out"
    monkeypatch.setattr(LiveProgress, "step", lambda *_: shutil.rmtree(out, ignore_errors=True))
    assert main([*COMMANDS["compare"], "--quiet", "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No such file or directory" in line
    assert line.endswith(f"; nothing is kept, for '{out}' is gone: start anew")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["bench", "figures"])
def test_of_a_folder_that_is_gone_nothing_is_promised(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from nflows_iresnet.experiments.session import CaseProgress

    @contextmanager
    def stage(*_: object) -> Iterator[None]:
        yield
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    monkeypatch.setattr(CaseProgress, "stage", stage)
    assert main([*COMMANDS[name], "--quiet", "--out", str(tmp_path / "out")]) == 1
    assert "nothing is kept, for" in capsys.readouterr().err


def test_a_folder_that_became_read_only_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nflows_iresnet.experiments.session import LiveProgress

    locked, out = tmp_path / "locked", tmp_path / "out"
    locked.mkdir(mode=0o500)
    with suppress(PermissionError):
        (locked / "file").touch()
        pytest.skip("this user may write everywhere")
    monkeypatch.setattr(LiveProgress, "step", lambda *_: (out / "runs").chmod(0o500))
    assert main([*COMMANDS["compare"], "--quiet", "--out", str(out)]) == 1
    (out / "runs").chmod(0o700)
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_cannot_be_printed_is_one_line(unbuffered: str) -> None:
    script = "import sys; from nflows_iresnet.experiments.cli import main; sys.exit(main())"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script, "compare", "--list"],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "nflows-iresnet: error: No space left on device\n"


@pytest.mark.parametrize("asked", ["--list", "--help"])
def test_who_reads_no_further_hears_of_no_error(asked: str) -> None:
    script = "import sys; from nflows_iresnet.experiments.cli import main; sys.exit(main())"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-c", script, "compare", asked],
            cwd=Path(__file__).parents[1],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
