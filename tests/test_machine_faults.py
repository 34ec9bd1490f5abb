"""Machines fail: kill -9 amid a write, full disks, folders that are locked, clocks, wrong bits.

What was finished before stays, the command says one line, and `--resume` goes on.
"""

from __future__ import annotations

import ast
import ctypes
import datetime
import io
import itertools
import json
import os
import pickle
import shlex
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nflows_iresnet
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.folder import Folder, prepare_folder
from nflows_iresnet.files import write_atomically
from nflows_iresnet.training.checkpoints import CheckpointError, Keeper
from tests.test_compare_disk import COMMANDS

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

forks = pytest.mark.skipif(
    not (hasattr(os, "fork") and Path("/proc/self/fd").exists()), reason="needs fork and /proc"
)
PACKAGE = Path(nflows_iresnet.__file__).parent


def in_child(function: Callable[[], int], said: Path) -> int:
    """Run a function in a forked process, which writes to a file what it says; return its end.

    The end is the status, or minus the number of the signal that killed it.
    """
    child = os.fork()
    if child == 0:
        status = 99
        try:
            torch.set_num_threads(1)
            sys.stdout = sys.stderr = said.open("w")
            status = function()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- kill -9 ---


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def target_of(handle: int) -> str:
    """Return the name that a file under way is to have."""
    return Path(os.readlink(f"/proc/self/fd/{handle}")).name[1:].rsplit(".", 1)[0]


def killed_at(moment: str, file: str, after: int) -> None:
    """Let this process be killed when a file is written that was written `after` times before."""
    sync, replace, times = os.fsync, os.replace, itertools.count()

    def killing_sync(handle: int) -> None:
        if moment == "half" and fnmatch(target_of(handle), file) and next(times) == after:
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            kill()
        sync(handle)

    def killing_replace(source: Any, target: Any) -> None:
        is_it = moment != "half" and fnmatch(Path(target).name, file) and next(times) == after
        if is_it and moment == "whole":
            kill()
        replace(source, target)
        if is_it:
            kill()

    os.fsync, os.replace = killing_sync, killing_replace  # type: ignore[assignment]


def outcomes(folder: Path) -> list[Any]:
    """Return what the runs in a folder found, but for times."""
    data = json.loads((folder / "results.json").read_text())
    if "outcomes" in data:
        return [each["errors"] if "errors" in each else sorted(each) for each in data["outcomes"]]
    return [each["metrics"]["test_nll"] for each in data["results"]]


def read_whole(folder: Path) -> None:
    """Read every file in a folder that has its name."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.is_dir() or "tensorboard" in path.parts:
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".npz":
            dict(np.load(path, allow_pickle=False))
        elif path.suffix == ".png":
            assert content.endswith(b"IEND\xaeB`\x82")
        elif path.suffix == ".csv":
            assert content.startswith(b"dataset,")
            assert content.endswith(b"\n")
        else:
            assert content.rstrip().endswith(b"</html>")


KILLS = {
    "compare": [
        ("half", "results.json", 1),
        ("half", "*.pt", 0),
        ("named", "*.pt", 1),
        ("half", "moons--realnvp--*.npz", 0),
        ("whole", "results.json", 2),
        ("half", "report.html", 0),
    ],
    "table1": [("half", "*.pt", 0), ("half", "results.json", 1), ("half", "table1.png", 0)],
    "table2": [("half", "*.pt", 0), ("named", "results.json", 1)],
    "images": [("half", "*.pt", 0)],
}
FAST = {("compare", "half", "results.json", 1), ("compare", "half", "*.pt", 0)}
CASES = [(name, *kill) for name, kills in KILLS.items() for kill in kills]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What each command finds that nobody kills."""
    found: dict[str, list[Any]] = {}

    def outcomes_of(name: str) -> list[Any]:
        if name not in found:
            folder = tmp_path_factory.mktemp(name) / "out"
            assert main([*COMMANDS[name], "--quiet", "--out", str(folder)]) == 0
            found[name] = outcomes(folder)
        return found[name]

    return outcomes_of


@forks
@pytest.mark.parametrize(
    ("name", "moment", "file", "after"),
    [pytest.param(*each, marks=() if each in FAST else pytest.mark.slow) for each in CASES],
    ids=lambda each: str(each),
)
def test_a_command_that_is_killed_amid_a_write_is_gone_on_with(
    name: str,
    moment: str,
    file: str,
    after: int,
    straight: Callable[[str], list[Any]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    command = [*COMMANDS[name], "--quiet", "--out", str(out)]

    def killed() -> int:
        killed_at(moment, file, after)
        return main(command)

    expected = straight(name)
    assert in_child(killed, tmp_path / "said") == -signal.SIGKILL
    read_whole(out)
    before = outcomes(out)
    assert main([*command, "--resume"]) == 0
    assert outcomes(out)[: len(before)] == before
    assert outcomes(out) == pytest.approx(expected, rel=1e-3) if name != "table1" else expected
    read_whole(out)
    assert not [path.name for path in out.rglob(".*")]


@forks
@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), [("figures", "*.png"), ("figures", "figures.json")])
def test_a_command_that_starts_anew_leaves_whole_files_when_it_is_killed(
    name: str, file: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*COMMANDS[name], "--out", str(out)]

    def killed() -> int:
        killed_at("half", file, 0)
        return main(command)

    assert in_child(killed, tmp_path / "said") == -signal.SIGKILL
    read_whole(out)
    assert main(command) == 0
    assert not [path.name for path in out.rglob(".*")]


@forks
def test_only_what_the_dead_have_written_in_part_is_removed(tmp_path: Path) -> None:
    """Two processes may write into one folder."""
    ready, path = tmp_path / "ready", tmp_path / "results.json"
    child = os.fork()
    if child == 0:
        genuine = os.fsync

        def waiting(handle: int) -> None:
            genuine(handle)
            ready.touch()
            time.sleep(60)

        os.fsync = waiting  # type: ignore[assignment]
        write_atomically(path, b"old" * 1000)
        os._exit(0)
    try:
        while not ready.exists():
            time.sleep(0.01)
        (part,) = tmp_path.glob(".results.json.*")
        write_atomically(path, b"new")
        assert part.exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    write_atomically(tmp_path / "another.json", b"new")
    assert not part.exists()
    assert path.read_bytes() == b"new"


# --- disks ---


@forks
@pytest.mark.parametrize("kilobytes", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_quota_is_one_line_and_the_command_is_gone_on_with(
    kilobytes: int, tmp_path: Path
) -> None:
    import resource

    out, said = tmp_path / "out", tmp_path / "said"

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, 1024 * kilobytes))
        return main([*COMMANDS["compare"], "--quiet", "--out", str(out)])

    assert in_child(limited, said) == 1
    (line,) = said.read_text().splitlines()
    assert "error: cannot write" in line
    assert "File too large" in line
    assert not [path.name for path in out.rglob(".*")]
    if not (out / "results.json").exists():
        assert main([*COMMANDS["compare"], "--quiet", "--out", str(out)]) == 0
        return
    read_whole(out)
    again = shlex.split(line.split("; go on with: nflows-iresnet ")[1])
    assert main([*again, "--quiet"]) == 0


def obeys_modes() -> None:
    """Give up root's privilege to write where a folder's mode forbids it."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << 1)
    assert libc.capset(header, sets) == 0


@forks
@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_read_only_folder_is_one_line(when: str, tmp_path: Path) -> None:
    from nflows_iresnet.experiments.session import LiveProgress

    out, said = tmp_path / "out", tmp_path / "said"
    (out / "runs").mkdir(parents=True)

    def lock(*_: object) -> None:
        (out / "runs").chmod(0o500)

    def locked() -> int:
        obeys_modes()
        if when == "before":
            lock()
        else:
            LiveProgress.step = lock  # type: ignore[method-assign, assignment]
        return main([*COMMANDS["compare"], "--quiet", "--out", str(out)])

    assert in_child(locked, said) == {"before": 2, "meanwhile": 1}[when]
    (line,) = said.read_text().splitlines()
    assert "Permission denied" in line
    (out / "runs").chmod(0o700)
    if when == "meanwhile":
        again = shlex.split(line.split("; go on with: nflows-iresnet ")[1])
        assert main([*again, "--quiet"]) == 0


def test_a_name_outlasts_a_loss_of_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is written to the disk after the file, or the file may have no name there."""
    events, sync, replace = [], os.fsync, os.replace

    def syncing(handle: int) -> None:
        is_folder = os.path.isdir(f"/proc/self/fd/{handle}")
        events.append("folder" if is_folder else "file")
        sync(handle)

    def replacing(source: Any, target: Any) -> None:
        events.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    write_atomically(tmp_path / "file", b"content")
    assert events == ["file", "name", "folder"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_as_public_as_the_user_wants(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_folder_is_proved_without_a_trace(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


# --- clocks ---


def test_a_clock_that_jumps_changes_no_interval_and_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = itertools.cycle([0.0, 4e9, -5.0, 1e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    keeper = Keeper(tmp_path / "run.pt", every=1000.0)
    assert not any(keeper.due for _ in range(8))
    assert not any(Keeper(tmp_path / "run.pt", every=0.0).due is False for _ in range(8))
    out = tmp_path / "out"
    assert main([*COMMANDS["compare"], "--quiet", "--out", str(out)]) == 0
    text = (out / "results.json").read_text()
    seconds = [value for key, value in numbers_of(json.loads(text)) if "seconds" in key]
    assert seconds
    assert all(0 <= each < 3600 for each in seconds)


def numbers_of(data: Any, key: str = "") -> list[tuple[str, float]]:
    if isinstance(data, dict):
        return [each for name, value in data.items() for each in numbers_of(value, name)]
    if isinstance(data, list):
        return [each for value in data for each in numbers_of(value, key)]
    is_number = isinstance(data, (int, float)) and not isinstance(data, bool)
    return [(key, float(data))] if is_number else []


def test_no_interval_is_measured_by_the_clock_on_the_wall() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert "time.time(" not in path.read_text(), path


def test_a_checkpoint_of_a_later_day_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    Keeper(path, {"of": "run"}).save({"step": 3})
    later = datetime.datetime(2090, 1, 1, tzinfo=datetime.timezone.utc).timestamp()
    os.utime(path, (later, later))
    assert Keeper(path, {"of": "run"}).load() == {"step": 3}


# --- wrong bits ---


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"checkpoint-{os.getpid()}.pt"
    generator = torch.Generator().manual_seed(0)
    weights = {f"w{index}": torch.randn(64, 64, generator=generator) for index in range(4)}
    try:
        Keeper(folder, {"of": "run"}).save({"model": weights})
        return folder.read_bytes()
    finally:
        folder.unlink(missing_ok=True)


def test_a_checkpoint_cut_anywhere_is_refused(checkpoint: bytes, tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "run.pt", {"of": "run"})
    for length in (*range(0, len(checkpoint), 4096), len(checkpoint) - 1):
        keeper.path.write_bytes(checkpoint[:length])
        with pytest.raises(
            CheckpointError, match="is damaged, of another version, or none: delete it"
        ):
            keeper.load()
    keeper.path.write_bytes(checkpoint)
    assert keeper.load() is not None


def spoiled(content: bytes, start: int, length: int, value: int | None) -> bytes:
    part = content[start : start + length]
    other = bytes(each ^ 1 for each in part) if value is None else bytes([value]) * len(part)
    return content[:start] + other + content[start + length :]


@pytest.mark.parametrize(
    ("length", "value"), [(1, None), (4096, 0), (4096, 255)], ids=["bit", "zeros", "ones"]
)
def test_wrong_bits_are_refused_or_change_nothing(
    length: int, value: int | None, checkpoint: bytes, tmp_path: Path
) -> None:
    """A weight with a wrong bit would be a weight: torch reads it without a word."""
    keeper = Keeper(tmp_path / "run.pt", {"of": "run"})
    keeper.path.write_bytes(checkpoint)
    right = keeper.load()
    assert right is not None
    refused = 0
    for start in range(7, len(checkpoint), 997):
        keeper.path.write_bytes(spoiled(checkpoint, start, length, value))
        try:
            found = keeper.load()
        except CheckpointError:
            refused += 1
            continue
        assert found is not None
        for name, weight in right["model"].items():
            assert torch.equal(found["model"][name], weight)
    assert refused > len(checkpoint) // 997 // 2


# --- strangers ---


class Harmful:
    """Makes a file when it is read from a pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def in_torch_file(harmful: Harmful) -> bytes:
    buffer = io.BytesIO()
    torch.save({"identity": '"run"', "state": {"model": harmful}}, buffer)
    return buffer.getvalue()


def in_old_torch_file(harmful: Harmful) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state": harmful}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def in_zip(harmful: Harmful) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(harmful))
        archive.writestr("archive/version", "3")
    return buffer.getvalue()


def in_array_of_objects(harmful: Harmful) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, samples=np.array([harmful], dtype=object))
    return buffer.getvalue()


KEY = ("moons", "nice", 0)
FOREIGN: dict[str, Callable[[Harmful], bytes]] = {
    "torch": in_torch_file,
    "torch, old": in_old_torch_file,
    "zip": in_zip,
    "pickle": pickle.dumps,
    "npz": in_array_of_objects,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_strangers_wrote_is_refused_and_does_not_run(kind: str, tmp_path: Path) -> None:
    harmful = Harmful(tmp_path / "mark")
    pickle.loads(pickle.dumps(harmful))
    assert harmful.mark.exists(), "the test would tell"
    harmful.mark.unlink()
    folder = Folder(tmp_path)
    path = folder.checkpoint(KEY)
    path.parent.mkdir()
    path.write_bytes(FOREIGN[kind](harmful))
    with pytest.raises(CheckpointError):
        Keeper(path, {"of": "run"}).load()
    path.with_suffix(".npz").write_bytes(FOREIGN[kind](harmful))
    with suppress(ValueError):
        assert all(isinstance(each, bytes) for each in folder.load_arrays(KEY).values())
    assert not harmful.mark.exists()


SAFE = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}
RUNS_CODE = {"eval", "exec", "pickle.load", "pickle.Unpickler", "joblib.load", "np.fromfile"}


def test_nothing_is_read_in_a_way_that_runs_code() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, call = ast.unparse(node.func), ast.unparse(node)
            assert name not in RUNS_CODE, f"{path}: {call}"
            if name in SAFE:
                assert SAFE[name] in call, f"{path}: {call}"
            if name == "pickle.loads":
                assert "pickle.loads(pickle.dumps(" in call, f"{path}: {call}"
