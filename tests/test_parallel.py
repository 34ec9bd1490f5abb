"""Runs side by side, in processes and on a cluster: the same numbers, and nothing lost."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import numpy as np
import pytest
import torch

from nflows_iresnet.experiments import parallel, runs
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.config import RunConfig, UsageError, in_any_folder
from nflows_iresnet.experiments.table1 import Settings
from nflows_iresnet.experiments.table1.classifiers import ClassifierJob, load
from nflows_iresnet.training.checkpoints import Keeper

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("joblib")

ROOT = Path(__file__).parents[1]
TINY = ["--num-layers", "1", "--hidden-features", "8", "--num-blocks-per-layer", "1"]


@pytest.fixture
def table(tmp_path: Path) -> str:
    rows = np.random.default_rng(0).normal(size=(200, 3))
    np.savetxt(tmp_path / "table.csv", rows, delimiter=",")
    return str(tmp_path / "table.csv")


def results(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return data


def numbers(folder: Path) -> dict[Any, Any]:
    found = results(folder)["results"]
    keys = [(each["model"], each["repeat"], each["learning_rate"]) for each in found]
    return dict(zip(keys, [each["metrics"]["test_nll"] for each in found], strict=True))


@pytest.mark.parametrize("command", ["compare", "table1"])
def test_jobs_are_not_for_one_gpu(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main([command, "--device", "cuda", "--jobs", "2"]) == 2
    assert "would share one GPU" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "table1"])
def test_jobs_and_a_cluster_are_two_places(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--jobs", "2", "--dask", "tcp://scheduler:8786"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_without_dask_the_remedy_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    words = ["--dask", "tcp://scheduler:8786", "--out", str(tmp_path / "out")]
    assert main(["compare", "moons", "--models", "nice", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install '.[dask]' in the clone" in line
    assert not (tmp_path / "out").exists()


def test_a_scheduler_that_does_not_answer_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(parallel, "_CONNECTING", 0.5)
    words = ["--dask", "tcp://127.0.0.1:1", "--out", str(tmp_path / "out")]
    assert main(["compare", "moons", "--models", "nice", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--dask tcp://127.0.0.1:1: no scheduler answers there" in line
    assert not (tmp_path / "out").exists()


class Refusal(BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(1)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def test_what_answers_and_is_no_scheduler_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The first bytes of an answer in HTTP are a length of three EiB."""
    pytest.importorskip("distributed")
    with ThreadingTCPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"tcp://127.0.0.1:{server.server_address[1]}"
        words = ["--dask", place, "--out", str(tmp_path / "out")]
        assert main(["compare", "moons", "--models", "nice", *words]) == 2
        server.shutdown()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: --dask {place}: no scheduler answers there" in line
    assert not (tmp_path / "out").exists()


class Wish:
    """Whether a training is to stop."""

    def __init__(self, was_pressed: bool) -> None:
        self.was_pressed = was_pressed

    def __enter__(self) -> Wish:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.was_pressed:
            raise KeyboardInterrupt


def order_of(table: str, folder: Path) -> parallel.Order:
    config = RunConfig((table,), ("nice",), 3, num_layers=1, hidden_features=8)
    (run,) = runs.prepare(config)
    keeper = Keeper(folder / "runs" / "run.pt", every=0.0)
    return parallel.Order.of(runs.Job(run, config, 1e-3), keeper)


def test_an_order_holds_no_data_and_can_be_done_in_any_folder(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(table).parent)
    sent = pickle.dumps(order_of(Path(table).name, Path("out")))
    assert len(sent) < 4_000
    monkeypatch.chdir(ROOT)
    outcome = pickle.loads(sent).do(Wish(False), None)
    assert outcome is not None
    assert outcome[0].key == ("table", "nice", 0)
    assert outcome[0].metrics.test_nll is not None


def test_the_order_of_a_classifier_holds_no_images(tmp_path: Path) -> None:
    settings = Settings(num_train=32, steps=2, num_blocks=1, hidden_channels=4, data_dir="data")
    job = ClassifierJob("resnet", 0, settings, load(settings, 0))
    sent = pickle.dumps(parallel.Order.of(job, Keeper(tmp_path / "run.pt")))
    assert len(sent) < 2_000
    order = pickle.loads(sent)
    assert order.job.config.data_dir == os.path.abspath("data")
    outcome = order.do(Wish(False), None)
    assert (outcome.key, outcome.failure) == (("resnet", 0), None)
    assert outcome.num_wrong == job.do().num_wrong


def test_an_order_that_is_told_to_stop_finds_nothing(table: str, tmp_path: Path) -> None:
    assert order_of(table, tmp_path).do(Wish(True), None) is None


def test_an_order_whose_data_are_not_there_says_so(table: str, tmp_path: Path) -> None:
    order = order_of(table, tmp_path)
    Path(table).rename(tmp_path / "elsewhere.csv")
    runs._load_once.cache_clear()
    with pytest.raises(UsageError, match=r"table · nice: its process cannot load the data: .*csv"):
        order.do(Wish(False), None)


def test_a_process_that_was_killed_is_one_line_that_names_a_job(table: str, tmp_path: Path) -> None:
    message = "while table · nice was under way: give fewer --jobs"
    with (
        pytest.raises(ChildProcessError, match=message),
        parallel._death_described({0: order_of(table, tmp_path)}),
    ):
        raise BrokenProcessPool


def test_checkpoints_of_a_cluster_are_kept_where_the_folder_is_seen(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "runs" / "run.pt")
    assert not parallel._is_shared(keeper, "today")
    (tmp_path / "results.json").write_text('{"started": "yesterday"}')
    assert not parallel._is_shared(keeper, "today"), "another of its name"
    assert parallel._is_shared(keeper, "yesterday")


# --- side by side ---------------------------------------------------------------------------------

SCRIPT = """
import signal, sys
from nflows_iresnet.experiments.cli import main
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    script = tmp_path / "command.py"
    script.write_text(SCRIPT)

    def popen(*words: str, command: str = "compare") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(script), command, *words],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            start_new_session=True,
        )

    return popen


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("it did not come")


@pytest.mark.slow
def test_side_by_side_is_the_same_as_one_after_the_other(
    table: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    words = [table, "--models", "nice", "residual-flow", "--steps", "30", "--repeats", "2", *TINY]
    one, two = tmp_path / "one", tmp_path / "two"
    rates = ["--learning-rates", "1e-3", "1e-2", "--quiet", "--out"]
    assert main(["compare", *words, *rates, str(one)]) == 0
    process = start(*words, *rates, str(two), "--jobs", "2")
    _, printed = process.communicate(timeout=600)
    assert process.returncode == 0, printed

    assert numbers(one) == pytest.approx(numbers(two), abs=1e-5)


@pytest.mark.slow
def test_classifiers_side_by_side_are_the_same_as_one_after_the_other(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    words = ["--coeffs", "0.9", "--steps", "3", "--repeats", "2", "--num-blocks", "1"]
    words += ["--hidden-channels", "4", "--num-train", "64", "--quiet", "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["table1", *words, str(one)]) == 0
    process = start(*words, str(two), "--jobs", "2", command="table1")
    _, printed = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    found = [results(folder)["outcomes"] for folder in (one, two)]
    for outcome in (each for outcomes in found for each in outcomes):
        outcome["train_seconds"] = 0
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_end_in_the_middle_loses_nothing_that_was_finished(
    ending: signal.Signals,
    table: str,
    tmp_path: Path,
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    out = tmp_path / "out"
    words = [table, "--models", "nice", "--steps", "2000", "--repeats", "3", *TINY]
    words += ["--patience", "20", "--checkpoint-minutes", "0.001", "--out", str(out)]
    process = start(*words, "--jobs", "2")
    wait_for(lambda: len(list((out / "runs").glob("*.pt"))) == 2)
    if ending == signal.SIGTERM:
        os.killpg(process.pid, ending)
    else:
        process.send_signal(ending)
    _, printed = process.communicate(timeout=600)
    if ending != signal.SIGKILL:
        assert process.returncode == 128 + ending, printed
        assert "Traceback" not in printed
        assert "interrupted: finishing the steps under way" in printed
        assert re.search("[12] under way up to their last checkpoints", printed)
    for path in (out / "runs").glob("*.pt"):
        torch.load(path, weights_only=True)
    again = start(*words, "--resume", "--quiet")
    _, printed = again.communicate(timeout=600)
    assert again.returncode == 0, printed
    found = results(out)["results"]
    assert [each["training"]["steps"] for each in found] == [2000] * 3


ORPHANS = """
import os, sys, threading
from nflows_iresnet.experiments import parallel
parallel._GRACE, parent = 3600.0, os.getpid()
if os.fork():
    os._exit(0)
if sys.argv[1] == "at work":
    parallel._AT_WORK.acquire()
    threading.Timer(2.0, lambda: (print("saved", flush=True), parallel._AT_WORK.release())).start()
parallel._outlive_nobody(parent, sys.argv[2])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("state", "said"), [("idle", ""), ("at work", "saved\n")])
def test_a_process_whose_parent_is_gone_ends_with_its_step_and_not_later(
    state: str, said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "board"
    folder.mkdir()
    command = [sys.executable, "-c", ORPHANS, state, str(folder)]
    done = subprocess.run(  # waits for the orphan, too, which holds the pipe
        command, stdout=subprocess.PIPE, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.stdout == said
    assert not folder.exists()


# --- on a cluster ---------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as found:
        yield found


@pytest.mark.slow
def test_the_runs_of_a_worker_that_dies_are_done_again_and_counted_once(
    cluster: Any, table: str, tmp_path: Path
) -> None:
    words = [table, "--models", "nice", "--steps", "400", "--repeats", "3", *TINY, "--quiet"]
    words += ["--patience", "20", "--checkpoint-minutes", "0.001", "--out"]
    alone, out = tmp_path / "alone", tmp_path / "out"
    killer = Killer(cluster, out)
    killer.start()
    assert main(["compare", *words, str(out), "--dask", cluster.scheduler_address]) == 0
    killer.join(timeout=1)
    assert killer.has_killed
    assert main(["compare", *words, str(alone)]) == 0
    found = results(out)["results"]
    assert len(found) == 3
    assert numbers(out) == pytest.approx(numbers(alone), abs=1e-5)
    assert not list((out / "runs").glob("*.pt"))


class Killer(threading.Thread):
    """Kills a worker while it has a run, as soon as a training has kept a checkpoint."""

    def __init__(self, cluster: Any, out: Path) -> None:
        super().__init__(daemon=True)
        self.cluster, self.out = cluster, out
        self.has_killed = False

    def run(self) -> None:
        nanny = next(iter(self.cluster.workers.values()))
        victim = self.cluster.scheduler.workers[nanny.worker_address]
        while not (list((self.out / "runs").glob("*.pt")) and victim.processing):
            time.sleep(0.01)
        os.kill(nanny.pid, signal.SIGKILL)
        self.has_killed = True


def test_an_order_whose_data_are_others_says_so(table: str, tmp_path: Path) -> None:
    order = order_of(table, tmp_path)
    lines = Path(table).read_text().splitlines()
    Path(table).write_text("\n".join([*lines[:-1], lines[-2]]))
    with pytest.raises(UsageError, match=r"table\.csv has other rows than where the command began"):
        order.do(Wish(False), None)


def test_a_worker_that_served_an_earlier_command_reads_the_rows_again(
    table: str, tmp_path: Path
) -> None:
    assert order_of(table, tmp_path).do(Wish(False), None) is not None
    lines = Path(table).read_text().splitlines()
    Path(table).write_text("\n".join([*lines[:-1], lines[-2]]))
    later = pickle.loads(pickle.dumps(order_of(table, tmp_path)))
    assert later.do(Wish(False), None) is not None


def test_a_folder_with_the_name_of_a_data_set_is_not_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "moons").mkdir()
    monkeypatch.chdir(tmp_path)
    order = order_of("moons", tmp_path)
    assert order.do(Wish(False), None) is not None


def test_the_home_of_the_user_is_the_same_in_another_folder(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(table).parent))
    job: Any = order_of(f"~/{Path(table).name}", tmp_path).job
    assert job.run.source == table
    config = replace(job.config, data_dir="~/data")
    assert in_any_folder(config).data_dir == str(Path(table).parent / "data")
