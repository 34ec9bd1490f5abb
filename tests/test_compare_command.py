"""The command's manners: bad input, interruption, resumption, help."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import nflows_iresnet
from nflows_iresnet.experiments import models, runs
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.config import RunConfig
from nflows_iresnet.experiments.data import RowTask
from nflows_iresnet.experiments.folder import Folder
from nflows_iresnet.experiments.options import COMMANDS, CompareOptions, parse, to_config
from nflows_iresnet.experiments.record import Record
from nflows_iresnet.experiments.report import command_of
from nflows_iresnet.experiments.runs import Run
from nflows_iresnet.experiments.session import LiveProgress, Session, check_places, folder_of

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

TINY = ["--steps", "2", "--num-layers", "2", "--hidden-features", "16", "--batch-size", "32"]


@pytest.fixture
def table(tmp_path: Path) -> str:
    np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(60, 3)))
    return str(tmp_path / "table.npy")


def test_help_version_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--version"], nflows_iresnet.__version__),
        (["--help"], "compare"),
        (["compare", "--help"], "normflows-residual"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out
    assert main(["compare", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("checkerboard", "digits", *models.MODELS))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["compar"], "'compar'"),
        (["compare", "--steps", "0"], "'0' is not a positive integer"),
        (["compare", "--steps", "-3"], "'-3' is not a positive integer"),
        (["compare", "--steps", "many"], "'many' is not a positive integer"),
        (["compare", "--budget", "0"], "'0' is not a positive number"),
        (["compare", "--budget", "nan"], "'nan' is not a positive number"),
        (["compare", "--repeats", "0"], "--repeats"),
        (["compare", "--learning-rate", "-1"], "--learning-rate"),
        (["compare", "--steps", "3", "--budget", "3"], "not allowed with"),
        (["compare", "--device", "tpu"], "'tpu'"),
        (["compare", "--unknown"], "--unknown"),
        (["compare", "moon"], "did you mean 'moons'"),
        (["compare", "absent.npy"], "absent.npy"),
        (["compare", "moons", "--models", "realnpv"], "did you mean 'realnvp'"),
        (["compare", "moons", "--models", "zzz"], "choose from"),
        (["compare", "moons", "--hidden-features", "1", "--models", "maf"], "cannot match"),
        (["compare", "--hidden-features", f"{10**22}"], "not a positive integer below 2147483648"),
        (["compare", "moons", "--hidden-features", f"{10**8}"], "give fewer --hidden-features"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(main(arguments), message, capsys)
    assert not list(tmp_path.iterdir())


def assert_refused(status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert message in printed.err


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[5, 1] = value
        return values

    return change


@pytest.mark.parametrize(
    "change",
    [
        with_value(float("nan")),
        with_value(float("inf")),
        lambda values: values * [1, 0, 1],
        lambda values: values[:1],
        lambda values: values[:0],
        lambda values: values[:, :1],
        lambda values: values[0],
        lambda values: values[None],
        lambda values: values.astype(str),
    ],
    ids=["nan", "inf", "constant", "one-row", "empty", "one-column", "1-D", "3-D", "text"],
)
def test_bad_data(
    change: Callable[[np.ndarray], np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.save(tmp_path / "bad.npy", change(np.random.default_rng(0).normal(size=(60, 3))))
    out = tmp_path / "out"
    status = main(["compare", str(tmp_path / "bad.npy"), *TINY, "--out", str(out)])
    assert_refused(status, "bad", capsys)
    assert not out.exists()


def test_cuda_without_cuda(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(main(["compare", "moons", "--device", "cuda"]), "--device cpu", capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_package_that_is_missing_is_said_before_it_is_imported(name: str) -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = sys.modules['rich'] = None\n"
        "from nflows_iresnet.experiments.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "matplotlib and rich not installed: pip install '.[compare]' in the clone" in line


def test_a_name_that_is_not_there_is_said_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = RowTask.load, []

    def noticed(name: str, settings: RunConfig) -> RowTask:
        loaded.append(name)
        return load(name, settings)

    monkeypatch.setattr(RowTask, "load", noticed)
    assert_refused(main(["compare", "moons", "absent.npy"]), "set absent.npy (looked for", capsys)
    assert_refused(main(["compare", "moons", "moosn"]), "did you mean 'moons'", capsys)
    assert loaded == ["absent.npy", "moosn"]


def test_unwritable_out(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", table, "--models", "nice", *TINY, "--out", f"{table}/out"]
    assert_refused(main(arguments), "choose another one with --out", capsys)


# --- interruption ---------------------------------------------------------------------------------


def test_interrupt_keeps_and_resume_goes_on(
    table: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(Path(table).parent / "out")
    arguments = ["compare", table, "--models", "nice", "realnvp", "maf", *TINY, "--out"]
    executed: list[str] = []
    execute = runs.execute

    def interrupted(job: runs.Job, *rest: Any) -> runs.Outcome:
        executed.append(job.run.model)
        if len(executed) == 2:
            raise KeyboardInterrupt
        return execute(job, *rest)

    monkeypatch.setattr(runs, "execute", interrupted)
    assert main([*arguments, str(folder.path)]) == 130
    message = capsys.readouterr().err
    assert "1 of 3 runs are kept" in message
    assert "--resume" in message
    kept = folder.load(Record.from_json).results
    assert [result.model for result in kept] == ["nice"]

    assert_refused(main([*arguments, str(folder.path)]), "already holds results", capsys)
    assert main([*arguments, str(folder.path), "--resume", "--quiet"]) == 0
    assert executed == ["nice", "realnvp", "realnvp", "maf"]
    assert folder.load(Record.from_json).results[0] == kept[0]
    assert (folder.path / "report.html").exists()


def finished(table: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return a command that was run to its end."""
    out = ["--out", str(Path(table).parent / "out")]
    command = ["compare", table, "--models", "nice", *TINY, *out]
    assert main([*command, "--quiet"]) == 0
    capsys.readouterr()
    return command


def test_resume_refuses_other_arguments_and_other_data(
    table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = finished(table, capsys)
    other = [*command, "--seed", "7", "--resume"]
    assert_refused(main(other), "--seed was 0 there and is 7 now", capsys)
    np.save(table, np.random.default_rng(1).normal(size=(90, 3)))
    assert_refused(main([*command, "--resume"]), "the data have changed", capsys)


def test_resume_without_results(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", table, "--models", "nice", *TINY, "--resume"]
    assert_refused(main([*arguments, "--out", str(tmp_path / "new")]), "cannot resume", capsys)
    (tmp_path / "results.json").write_text("[1, 2]")
    assert_refused(main([*arguments, "--out", str(tmp_path)]), "cannot resume", capsys)
    assert not (tmp_path / "new").exists()


def test_interrupt_while_preparing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: RunConfig) -> list[Run]:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "prepare", interrupted)
    assert main(["compare", "moons"]) == 130
    assert "before training began" in capsys.readouterr().err


# --- whole ----------------------------------------------------------------------------------------


def test_module_is_the_command() -> None:
    command = [sys.executable, "-m", "nflows_iresnet.experiments", "banch", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown command 'banch': did you mean 'bench'?" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_module_takes_every_command(name: str) -> None:
    command = [sys.executable, "-m", "nflows_iresnet.experiments", name, "--quik"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"(see nflows-iresnet {name} --help)" in done.stderr or "did you mean" in done.stderr
    command[-1] = "--help"
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"usage: nflows-iresnet {name} ")


@pytest.mark.slow
def test_default_run_is_complete_and_ours_wins(tmp_path: Path) -> None:
    assert main(["compare", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert (tmp_path / "out" / "report.html").stat().st_size > 0
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    nll = {(r["dataset"], r["model"]): r["metrics"]["test_nll"] for r in data["results"]}
    assert len(nll) == 15
    for dataset in ("moons", "8-gaussians", "checkerboard"):
        assert nll[dataset, "residual-flow"] <= nll[dataset, "i-resnet"]
        assert nll[dataset, "residual-flow"] <= nll[dataset, "realnvp"]


def test_resume_notices_one_value_in_one_test_row(
    table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = finished(table, capsys)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    rows = np.load(table)
    rows[int(order[-1]), 0] += 1.0
    np.save(table, rows)
    assert_refused(main([*command, "--resume"]), "the data have changed", capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-scales", "3"], "--num-scales is for images: add --images"),
        (["--marginal-bins", "4", "--alpha", "0.1"], "--alpha and --marginal-bins are for images"),
        (["--learning-rate", "5e-4", "--learning-rates", "1e-3"], "would not be used beside"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(main(["compare", "moons", *words]), message, capsys)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compare digits --images --models glow --num-terms 4", "--num-terms 4 is for residual-fl"),
        ("table2 mnist --models made --marginal-bins 8", "--marginal-bins 8 is for residual-flow"),
        ("compare mnist --images --models glow --num-terms 4", "--num-terms 4 is for residual-fl"),
        ("bench --only operations --seconds 30", "--seconds 30 is for the item quality"),
        ("bench --learning-rate 0.1", "--learning-rate 0.1 is for the item quality"),
        ("bench --only quality --repeats 9", "--repeats 9 is for what is timed"),
    ],
)
def test_options_of_what_is_not_there_are_refused(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(main(line.split()), message, capsys)


@pytest.mark.parametrize("models", [[], ["--models", "glow"]])
def test_the_line_that_a_record_says_is_accepted(models: list[str]) -> None:
    options = parse(["compare", "mnist", "--images", *models])
    assert isinstance(options, CompareOptions)
    arguments = to_config(options).as_arguments()
    line = command_of("compare", arguments.pop("datasets"), arguments)
    for device in ("cpu", "cuda"):
        assert parse([*shlex.split(line)[1:], "--device", device])


def test_the_home_of_the_user_is_where_results_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_of(CompareOptions(out="~/here"), "compare").path == tmp_path / "here"


def test_what_goes_on_goes_on_side_by_side(tmp_path: Path) -> None:
    parsed = CompareOptions(jobs=2, dask=None, checkpoint_minutes=1.0)
    arguments = {"datasets": ["moons"], "steps": 3}
    session = SimpleNamespace(
        parsed=parsed,
        record=SimpleNamespace(arguments=arguments, command="compare"),
        folder=Folder(tmp_path),
    )
    line = Session.resume.fget(session)  # type: ignore[attr-defined]
    assert f"moons --steps 3 --jobs 2 --checkpoint-minutes 1.0 --out {tmp_path} --resume" in line


def test_jobs_that_share_cores_are_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    check_places(CompareOptions(jobs=2), "cpu")
    assert capsys.readouterr().err == ""
    check_places(CompareOptions(jobs=2, threads=2), "cpu")
    assert "2 jobs of 2 threads share 2 cores" in capsys.readouterr().err
    check_places(CompareOptions(jobs=1, threads=4), "cpu")
    assert "1 job of 4 threads shares 2 cores" in capsys.readouterr().err


def test_lines_about_runs_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    line = "data[new] · maf: FAILED RuntimeError: [enforce fail at alloc.cpp:117] bad [/tmp/x]"
    with LiveProgress(1, 0, quiet=False) as progress:
        progress.begin("data[/x]", str)
        progress.finish(line)
    assert line in capsys.readouterr().err
