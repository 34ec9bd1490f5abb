"""Races: equal time for all, rates chosen on validation rows, runs side by side, nothing lost."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from nflows_iresnet.experiments import runs, tables
from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.arguments import duration
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.config import RACE_RATES, RunConfig
from nflows_iresnet.experiments.data import RowTask, Task
from nflows_iresnet.experiments.evaluation import CHUNK, Metrics
from nflows_iresnet.experiments.folder import Folder
from nflows_iresnet.experiments.models import Architecture
from nflows_iresnet.experiments.options import CompareOptions, parse, to_config
from nflows_iresnet.experiments.record import DatasetSummary, Record, Result, Trial
from nflows_iresnet.experiments.report import command_line
from nflows_iresnet.training import CurvePoint, History

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

ROOT = Path(__file__).parents[1]
TINY = ["--num-layers", "1", "--hidden-features", "8", "--num-blocks-per-layer", "1"]
SMALL: dict[str, Any] = {"num_layers": 1, "hidden_features": 8, "num_blocks_per_layer": 1}


@pytest.fixture
def table(tmp_path: Path) -> str:
    rows = np.random.default_rng(0).normal(size=(200, 3))
    np.savetxt(tmp_path / "table.csv", rows, delimiter=",")
    return str(tmp_path / "table.csv")


def config_of(*words: str) -> RunConfig:
    return to_config(cast(CompareOptions, parse(["compare", *words])))


def results(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return data


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("150s", 150), ("150", 150), ("2.5min", 150), ("2.5 m", 150), ("1h", 3600), ("1e2s", 100)],
)
def test_times_are_parsed(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "0s", "-1s", "1d", "150x", "nan", "1s s", "inf"])
def test_times_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a time"):
        duration(text)


def test_a_race_tries_three_learning_rates_unless_told_otherwise() -> None:
    assert config_of("moons", "--race", "150s").rates == RACE_RATES
    assert config_of("moons", "--race", "1s", "--learning-rate", "0.01").rates == (0.01,)
    assert config_of("moons", "--learning-rates", "1e-3", "1e-2", "1e-3").rates == (1e-3, 1e-2)
    assert config_of("moons").rates == (5e-3,)
    config = config_of("moons", "--race", "2min", "--patience", "3")
    assert (config.steps, config.budget, config.race, config.patience) == (None, None, 120, 3)


def test_all_models_with_one_seed_come_before_any_with_the_next() -> None:
    config = config_of("moons", "circles", "--models", "realnvp", "maf", "--repeats", "2")
    assert [run.key for run in runs.prepare(config)] == [
        (dataset, model, repeat)
        for dataset in ("moons", "circles")
        for repeat in (0, 1)
        for model in ("realnvp", "maf")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--race", "soon"], "'soon' is not a time"),
        (["--race", "5s", "--steps", "3"], "not allowed with"),
        (["--learning-rates", "0"], "'0' is not a positive number"),
        (["--patience", "0"], "'0' is not a positive integer"),
        (["--jobs", "0"], "'0' is not a positive integer"),
    ],
)
def test_bad_arguments_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "moons", *words]) == 2
    assert message in capsys.readouterr().err


def test_seconds_are_those_of_the_cpu_and_the_schedule_follows_them() -> None:
    plan = runs.training_plan(RunConfig(("moons",), ("nice",), None, race=10.0), 1e-2)
    assert plan.clock is time.process_time
    assert plan.length.progress(10**6, 5.0) == 0.5
    assert plan.learning_rate == 1e-2
    on_gpu = RunConfig(("moons",), ("nice",), None, race=10.0, device="cuda")
    assert runs.training_plan(on_gpu).clock is time.perf_counter
    assert runs.training_plan(RunConfig(("moons",), ("nice",))).clock is time.perf_counter


def test_every_model_and_kind_of_data_gets_the_same_plan() -> None:
    rows, images = (RunConfig(("digits",), ("nice",), images=flag) for flag in (False, True))
    plan = runs.training_plan(rows)
    assert runs.training_plan(images) == plan
    assert plan.average_decay is not None
    assert runs.training_plan(replace(rows, patience=3)).patience == 3


# --- what is chosen, and on what ------------------------------------------------------------------


class Spy(DensityModel):
    """Notes the rows that it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def log_prob(self, inputs: Tensor) -> Tensor:
        self.seen.append(inputs)
        return inputs.flatten(start_dim=1).sum(dim=1)

    exact_log_prob = encode = log_prob

    def decode(self, noise: Tensor) -> Tensor:
        return noise

    def sample(self, num_samples: int) -> Tensor:
        return torch.zeros(num_samples, 2)


@pytest.mark.parametrize("images", [False, True], ids=["rows", "images"])
def test_models_are_selected_on_validation_rows_alone(images: bool) -> None:
    pytest.importorskip("sklearn")
    config = RunConfig(("digits",), ("nice",), images=images)
    task: Any = runs.load_task("digits", config)
    spy = Spy()
    task.validate(spy, config)
    seen = torch.cat(spy.seen)
    given = task.data.validation[: len(seen)]
    assert len(seen) > 100
    if images:
        seen, given = seen.floor() if seen.max() > 1 else (seen * 17).floor(), given.float()
    assert torch.equal(seen, given)


def data(name: str = "a") -> DatasetSummary:
    return DatasetSummary(name, "made up", 2, 10, 10, 2, None, None, 0.0, None, ())


def record(*found: Result, trials: tuple[Trial, ...] = ()) -> Record:
    return Record({"race": 1.0, "models": ["one", "two"]}, {}, "", (data(),), found, trials=trials)


def result(model: str, repeat: int, nll: float, **others: Any) -> Result:
    metrics = Metrics(test_nll=nll, test_nll_se=0.1)
    return Result("a", model, repeat, repeat, {}, 5, (), others.pop("log", None), metrics, **others)


@dataclass(frozen=True)
class Named:
    """A task of which the name matters alone."""

    name: str = "a"


def runs_of(*models: str, repeats: int = 2) -> list[runs.Run]:
    size = Architecture(2, 4, 1, 1)
    return [
        runs.Run(cast(Task, Named()), model, size, k) for model in models for k in range(repeats)
    ]


def test_the_rate_is_the_one_that_validates_best_and_nothing_is_trained_twice() -> None:
    config = RunConfig(("a",), ("one",), None, race=1.0, learning_rates=(0.1, 0.2, 0.3))
    prepared = runs_of("one", "two")
    jobs = runs.trials_to_do(prepared, config, record())
    assert [(job.run.model, job.learning_rate, job.is_trial) for job in jobs] == [
        (model, rate, True) for model in ("one", "two") for rate in (0.1, 0.2, 0.3)
    ]
    trials = (
        Trial("a", "one", 0.1, 5.0),
        Trial("a", "one", 0.2, 4.0),
        Trial("a", "one", 0.3, None, failure="nan"),
        Trial("a", "two", 0.1, 1.0),
    )
    jobs = runs.trials_to_do(prepared, config, record(trials=trials))
    assert [(job.run.model, job.learning_rate) for job in jobs] == [("two", 0.2), ("two", 0.3)]
    chosen = runs.runs_to_do(prepared, config, record(trials=trials))
    assert [(job.run.key, job.learning_rate) for job in chosen] == [
        (("a", "one", 0), 0.2),
        (("a", "one", 1), 0.2),
        (("a", "two", 0), 0.1),
        (("a", "two", 1), 0.1),
    ]
    assert not any(job.is_trial for job in chosen)
    assert chosen[0].key == ("a", "one", 0, "0.2"), "it goes on from the checkpoint of its trial"
    assert chosen[1].key == ("a", "one", 1)
    done = record(result("one", 0, 1.0), trials=trials)
    jobs = runs.runs_to_do(prepared[:2], config, done)
    assert [job.run.key for job in jobs] == [("a", "one", 1)]


def test_every_checkpoint_of_a_run_is_known_before_its_rate_is() -> None:
    """So that a new start deletes them, and an interruption names them."""
    config = RunConfig(("a",), ("one",), None, race=1.0, learning_rates=(0.1, 0.2))
    every = {job.key for job in runs.every_job(runs_of("one"), config)}
    assert every == {("a", "one", 0, "0.1"), ("a", "one", 0, "0.2"), ("a", "one", 1)}
    trials = (Trial("a", "one", 0.1, 5.0), Trial("a", "one", 0.2, 4.0))
    for found in (record(), record(trials=trials)):
        jobs = runs.trials_to_do(runs_of("one"), config, found)
        assert {job.key for job in jobs} <= every
    assert {job.key for job in runs.runs_to_do(runs_of("one"), config, found)} <= every
    untuned = replace(config, learning_rates=())
    assert {job.key for job in runs.every_job(runs_of("one"), untuned)} == {
        ("a", "one", 0),
        ("a", "one", 1),
    }


def test_trials_do_not_look_at_test_rows(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config_of(table, "--race", "0.05s", "--models", "nice"), **SMALL)
    (run,) = runs.prepare(config)
    monkeypatch.setattr(RowTask, "evaluation_data", lambda *_: pytest.fail("it was examined"))
    trial, arrays, weights = runs.Job(run, config, 1e-2, is_trial=True).do()
    assert isinstance(trial, Trial)
    assert trial.failure is None
    assert trial.validation is not None
    assert not arrays
    assert weights is None


def test_the_verdict_is_of_all_repeats(tmp_path: Path) -> None:
    """Of two repeats with opposite leads the larger one counts, and the seeds' spread."""
    folder = Folder(tmp_path)
    folder.create()
    nlls = {("one", 0): 1.0, ("two", 0): 2.0, ("one", 1): 9.0, ("two", 1): 3.0}
    for (model, repeat), nll in nlls.items():
        rows = -nll + np.linspace(-0.01, 0.01, 200)
        folder.save_arrays(("a", model, repeat), {"test_log_prob": rows})
    found = record(*(result(*key, nll) for key, nll in nlls.items()))
    text = tables.verdict(found, folder, "a")
    assert text.startswith("two and one are level: they differ by 2.500 ± 4.0")
    first = replace(found, results=found.results[:2])
    assert tables.verdict(first, folder, "a").startswith("one is best: ahead of two by 1.000")


def test_the_verdict_knows_that_rows_of_an_estimate_share_random_numbers(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.create()
    shared = np.repeat(np.random.default_rng(0).normal(size=10), CHUNK)
    for model, lead in (("one", 0.2), ("two", 0.0)):
        rows = lead + (shared if lead else 0 * shared)
        folder.save_arrays(("a", model, 0), {"test_log_prob": rows})
    found = record(result("one", 0, 1.0), result("two", 0, 1.2))
    for exact, expected in ((True, "is best"), (False, "are level")):
        told = tuple(
            replace(each, metrics=replace(each.metrics, test_nll_exact=exact))
            for each in found.results
        )
        assert expected in tables.verdict(replace(found, results=told), folder, "a")


# --- what is shown --------------------------------------------------------------------------------


def log_of(values: list[float]) -> History:
    points = tuple(CurvePoint(k + 1, float(k), v, v) for k, v in enumerate(values))
    best = int(np.argmin(values)) + 1
    return History(len(values), 1.0, 1.0, best, min(values), points, stopped="patience")


def test_early_stops_are_said_with_the_best_step() -> None:
    found = record(result("one", 0, 1.0, log=log_of([3.0, 1.0, 2.0])), result("two", 0, 1.0))
    assert tables.early_stops(found, "a") == [
        "one stopped early, at step 3: its best validation was at step 2"
    ]
    second = replace(found, results=(replace(found.results[0], repeat=1),))
    assert tables.early_stops(second, "a")[0].startswith("one, repeat 1, stopped early")


def test_the_console_says_when_a_training_stopped(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([1.0, *range(2, 99)])
    monkeypatch.setattr(RowTask, "validate", lambda *_: float(next(values)))
    words = [table, "--models", "nice", "--steps", "40", "--patience", "2", *TINY]
    assert main(["compare", *words, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "best at step 2 stopped early at 6" in printed.err
    assert "nice stopped early, at step 6: its best validation was at step 2" in printed.out
    assert "stopped early, at step 6" in (tmp_path / "out" / "report.html").read_text()


# --- the command ----------------------------------------------------------------------------------


RACE = [
    "--race",
    "0.1s",
    "--patience",
    "20",
    "--repeats",
    "2",
    "--learning-rates",
    "1e-3",
    "1e-2",
    *TINY,
]


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("race")
    rows = np.random.default_rng(0).normal(size=(200, 3))
    np.savetxt(folder / "table.csv", rows, delimiter=",")
    words = [str(folder / "table.csv"), "--models", "nice", "realnvp", *RACE]
    assert main(["compare", *words, "--quiet", "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_a_race_leaves_records_a_table_and_a_picture(raced: Path) -> None:
    found = results(raced)
    assert len(found["results"]) == len(found["trials"]) == 4
    for each in found["results"]:
        trials = {t["learning_rate"]: t for t in found["trials"] if t["model"] == each["model"]}
        best = min(trials.values(), key=lambda trial: float(trial["validation"]))
        assert each["learning_rate"] == best["learning_rate"]
        assert 0.1 <= each["training"]["seconds"] < 1.0
        if each["repeat"] == 0:
            assert each["training"]["best_validation"] == best["validation"], "trained once"
    page = (raced / "race.md").read_text()
    assert "| model | test NLL (nats) | seeds | steps | best at step |" in page
    assert page.count("| 2 |") == 2
    assert "0.001: " in page
    assert (raced / "table--race.png").read_bytes().startswith(b"\x89PNG")
    assert not list((raced / "runs").glob("*.pt"))
    assert "table race" in (raced / "report.html").read_text()


def test_a_race_can_be_repeated_and_goes_on(
    raced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results(raced)
    line = command_line(Folder(raced).load(Record.from_json)).split()[1:]
    cut = tmp_path / "cut"
    shutil.copytree(raced, cut)
    elsewhere = {**before["environment"], "device_name": "another machine"}
    kept = {**before, "results": before["results"][:1], "environment": elsewhere}
    (cut / "results.json").write_text(json.dumps(kept))
    capsys.readouterr()
    assert main([*line, "--quiet", "--out", str(cut), "--resume"]) == 0
    assert "warning: begun on another machine" in capsys.readouterr().err
    after = results(cut)
    assert after["trials"] == before["trials"]
    assert after["results"][0] == before["results"][0]
    assert len(after["results"]) == 4
