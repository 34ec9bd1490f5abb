"""What a run leaves behind: its weights, a table of all runs, curves for TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nflows_iresnet import datasets, load_run, logdet, transforms
from nflows_iresnet.experiments import saved
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.folder import Folder
from nflows_iresnet.experiments.models import Architecture, find_model
from nflows_iresnet.experiments.record import Record, RunRecord
from tests.optional import named

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

SMALL = ["--steps", "6", "--num-layers", "2", "--hidden-features", "16", "--quiet"]
IMAGES = ["--images", "--num-layers", "1", "--num-blocks-per-layer", "1", *SMALL[:2], "--quiet"]
ROWS = ("residual-flow", "hybrid", "i-resnet", "realnvp", "maf-same-start")
PICTURES = ("residual-flow", "realnvp", "made")


@dataclass(frozen=True)
class Finished:
    """Two folders of results, and the table that the first is of."""

    rows: Path
    images: Path
    table: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    path = tmp_path_factory.mktemp("finished")
    place = Finished(path / "rows", path / "images", path / "table.csv")
    rows = np.random.default_rng(0).normal(size=(300, 3)) * [1e-3, 1, 50] + [1000, 0, -7]
    np.savetxt(place.table, rows, delimiter=",", fmt="%.17g")
    command = ["compare", str(place.table), "--models", *ROWS, *SMALL, "--repeats", "2"]
    assert main([*command, "--out", str(place.rows)]) == 0
    command = ["compare", "digits", "--models", *PICTURES, *IMAGES, "--hidden-features", "8"]
    assert main([*command, "--out", str(place.images)]) == 0
    return place


@torch.no_grad()
def exact(flow: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return the log-density as the command examines it."""
    is_residual = any(isinstance(each, transforms.ResidualTransform) for each in flow.modules())
    using = transforms.using(flow, estimator=logdet.Exact()) if is_residual else nullcontext()
    with using:
        log_prob: torch.Tensor = flow.log_prob(rows)
    return log_prob


# --- load_run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeat", [0, 1])
@pytest.mark.parametrize("model", ROWS)
def test_the_loaded_flow_has_the_density_of_the_results(
    model: str, repeat: int, finished: Finished
) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    flow = load_run(finished.rows, model=model, repeat=repeat)
    assert torch.equal(torch.get_rng_state(), before), "nothing global is changed"
    assert not any(module.training for module in flow.modules())
    rows = datasets.load(str(finished.table), seed=0).test
    kept = Folder(finished.rows).load_arrays(("table", model, repeat))["test_log_prob"]
    torch.testing.assert_close(exact(flow, rows), torch.from_numpy(kept), rtol=1e-6, atol=1e-6)
    assert flow.sample(5).shape == (5, 3)


@pytest.mark.parametrize("model", PICTURES)
def test_the_loaded_flow_of_images_has_the_density_of_the_results(
    model: str, finished: Finished
) -> None:
    from nflows_iresnet.experiments.data import _TEST_NOISE, _with_noise

    flow = load_run(finished.images, model=model)
    assert flow.location is flow.scale is None
    images = _with_noise(datasets.load_images("digits", seed=0).test, _TEST_NOISE)
    arrays = Folder(finished.images).load_arrays(("digits", model, 0))
    kept = torch.from_numpy(arrays["test_log_prob"])
    torch.testing.assert_close(exact(flow, images), kept, rtol=1e-6, atol=1e-4)
    assert flow.sample(2).shape == (2, 1, 8, 8)


def test_rows_are_scored_in_their_own_units(finished: Finished) -> None:
    flow = load_run(finished.rows, model="realnvp")
    data = datasets.load(str(finished.table), seed=0)
    assert torch.equal(flow.location, data.location)
    assert torch.equal(flow.scale, data.scale)
    original = data.test.double() * flow.scale + flow.location
    with torch.no_grad():
        again = flow.log_prob(((original - flow.location) / flow.scale).float())
        torch.testing.assert_close(again, flow.log_prob(data.test), rtol=1e-5, atol=1e-5)
    assert float(flow.scale.log().sum()) == pytest.approx(data.log_scale)
    assert not {"location", "scale"} & flow.state_dict().keys()


def test_flows_are_those_of_their_libraries(finished: Finished) -> None:
    from nflows.flows import Flow, SimpleRealNVP

    from nflows_iresnet.flows import ResidualFlow

    assert type(load_run(finished.rows, model="residual-flow")) is ResidualFlow
    assert type(load_run(finished.rows, model="realnvp")) is SimpleRealNVP
    started = load_run(finished.rows, model="maf-same-start")
    assert isinstance(started, Flow)
    assert "ElementwiseRationalQuadraticSpline" in repr(started)


def test_of_several_runs_one_is_to_be_named(finished: Finished) -> None:
    with pytest.raises(ValueError, match=r"has 5 trained runs with repeat=0: choose") as caught:
        load_run(finished.rows)
    assert "('table', 'maf-same-start', 0)" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"no trained runs with model='maf'.*'realnvp', 1"):
        load_run(finished.rows, model="maf")
    with pytest.raises(
        ValueError, match=r"'residualflow', repeat=0 \(did you mean 'residual-flow'\?"
    ):
        load_run(finished.rows, model="residualflow")
    with pytest.raises(ValueError, match=r"no trained runs with dataset='moons'"):
        load_run(finished.rows, "moons", "realnvp")
    with pytest.raises(ValueError, match=r"no trained runs with model='realnvp', repeat=2"):
        load_run(finished.rows, model="realnvp", repeat=2)


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no folder of results: it has no results.json"):
        load_run(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results.json' cannot be read: it is not JSON"):
        load_run(str(tmp_path))


def test_a_folder_of_another_command_names_it_and_what_to_give(tmp_path: Path) -> None:
    words = ["--coeffs", "0.9", "--steps", "1", "--repeats", "1", "--num-blocks", "1"]
    words += ["--hidden-channels", "4", "--num-train", "32", "--quiet", "--out", str(tmp_path)]
    assert main(["table1", *words]) == 0
    with pytest.raises(ValueError, match=r"holds results of nflows-iresnet table1") as caught:
        load_run(tmp_path)
    assert "give the --out of a run of nflows-iresnet compare" in str(caught.value)
    assert "\n" not in str(caught.value)


def flipped(content: bytes) -> bytes:
    """Change one bit of a weight, which torch.load would not see."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        values = max(map(archive.read, archive.namelist()), key=len)
    middle = content.index(values) + len(values) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[:99], lambda content: b"text", flipped],
    ids=["empty", "cut short", "text", "one bit"],
)
def test_damaged_weights_are_named(
    damage: Callable[[bytes], bytes], finished: Finished, tmp_path: Path
) -> None:
    place = copied(finished.rows, tmp_path)
    path = place.weights(("table", "realnvp", 0))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"weights '.*table--realnvp--0.pt' are damaged") as caught:
        load_run(place.path, model="realnvp")
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match=r"there are no weights '.*table--realnvp--0.pt'"):
        load_run(place.path, model="realnvp")


def test_weights_of_another_function_are_refused(finished: Finished, tmp_path: Path) -> None:
    place = copied(finished.rows, tmp_path)
    path = place.weights(("table", "residual-flow", 0))
    content = torch.load(path, weights_only=True)
    content["size"]["hidden_features"] = 17
    content["versions"]["torch"] = "1.0"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"do not fit the model 'residual-flow'.*are of 1.0"):
        load_run(place.path, model="residual-flow")


def test_weights_of_another_model_are_refused(finished: Finished, tmp_path: Path) -> None:
    place = copied(finished.rows, tmp_path)
    other = place.weights(("table", "residual-flow", 0)).read_bytes()
    place.weights(("table", "realnvp", 0)).write_bytes(other)
    with pytest.raises(ValueError, match=r"are those of 'residual-flow', not of 'realnvp'"):
        load_run(place.path, model="realnvp")


def test_missing_units_are_named(finished: Finished, tmp_path: Path) -> None:
    place = copied(finished.rows, tmp_path)
    (place.path / "runs" / "table.npz").unlink()
    with pytest.raises(ValueError, match=r"runs.table.npz' is missing"):
        load_run(place.path, model="realnvp")


OTHERS = ("normflows-residual", "glow-same-start", "nsf-coupling", "zuko-nsf", "ffjord")


@pytest.mark.parametrize("name", named([*OTHERS, "zuko-nsf-same-start"]))
def test_a_model_comes_out_of_its_file_with_the_weights_that_went_in(
    name: str, tmp_path: Path
) -> None:
    if name.startswith("normflows"):
        pytest.importorskip("normflows")
    torch.manual_seed(0)
    size, rows = Architecture(2, 8, 2, 2), torch.randn(64, 2)
    model = find_model(name).build(size)
    model.initialize(rows)
    path = tmp_path / "weights.pt"
    path.write_bytes(saved.pack(model, name, size))
    found = saved.unpack(path)
    assert torch.equal(found.exact_log_prob(rows), model.eval().exact_log_prob(rows))


def test_runs_whose_weights_are_lost_are_done_again_and_no_others(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copied(finished.images, tmp_path)
    missing, damaged, foreign = (place.weights(("digits", name, 0)) for name in PICTURES)
    kept = finished.images / "weights" / missing.name
    missing.unlink()
    damaged.write_bytes(flipped(damaged.read_bytes()))
    command = ["compare", "digits", "--models", *PICTURES, *IMAGES, "--hidden-features", "8"]
    command += ["--out", str(place.path), "--resume"]
    assert main(command) == 0
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert first.startswith(f"there are no weights '{missing}'")
    assert second.startswith(f"the weights '{damaged}' are damaged")
    assert first.endswith(": that run is done again")
    assert second.endswith(": that run is done again")
    assert place.weights(("digits", "made", 0)).stat().st_mtime == foreign.stat().st_mtime
    before, after = (
        {each["model"]: each["metrics"]["test_nll"] for each in record_of(path)["results"]}
        for path in (finished.images, place.path)
    )
    assert after == pytest.approx(before)
    again = load_run(place.path, model=PICTURES[0]).state_dict()
    then = saved.unpack(kept).flow.state_dict()
    assert all(torch.equal(again[name], then[name]) for name in then)

    shutil.copy(kept, foreign)
    assert main(command) == 0
    assert "are those of 'residual-flow', not of 'made'" in capsys.readouterr().err
    assert main(command) == 0
    assert "weights" not in capsys.readouterr().err


def test_a_run_that_failed_has_no_weights_and_is_not_done_again(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copied(finished.images, tmp_path)
    whole = place.load(Record.from_json)
    failed = replace(whole.results[0], training=None, failures=("it exploded",))
    place.save_record(replace(whole, results=(failed, *whole.results[1:])))
    place.weights(failed.key).unlink()
    command = ["compare", "digits", "--models", *PICTURES, *IMAGES, "--hidden-features", "8"]
    assert main([*command, "--out", str(place.path), "--resume"]) == 0
    assert "weights" not in capsys.readouterr().err
    assert place.load(Record.from_json).results[0].failures == ("it exploded",)


def copied(source: Path, tmp_path: Path) -> Folder:
    shutil.copytree(source, tmp_path / "out")
    return Folder(tmp_path / "out")


def record_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "results.json").read_text())
    return found


# --- the table of all runs ------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_run(finished: Finished) -> None:
    with (finished.rows / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    results = record_of(finished.rows)["results"]
    assert [(line["model"], int(line["repeat"])) for line in lines] == [
        (result["model"], result["repeat"]) for result in results
    ]
    for line, result in zip(lines, results, strict=True):
        assert float(line["test_nll"]) == result["metrics"]["test_nll"]
        assert int(line["seed"]) == result["seed"] == result["repeat"]
        assert int(line["best_step"]) == result["training"]["best_step"]
        assert int(line["hidden_features"]) == result["hyperparameters"]["hidden_features"]
        assert line["failures"] == line["bits_per_dim"] == ""
        assert "curve" not in line


def test_the_table_has_what_turns_its_likelihoods_into_other_units(finished: Finished) -> None:
    for folder, name in ((finished.rows, "table"), (finished.images, "digits")):
        record = Folder(folder).load(Record.from_json)
        data = record.datasets[0]
        assert data.name == name
        for line in csv.DictReader((folder / "results.csv").read_text().splitlines()):
            assert float(line["log_scale"]) == data.log_scale
            for key in ("features", "num_train", "num_validation", "num_test"):
                assert int(line[key]) == getattr(data, key)
            assert line["levels"] == ("" if data.levels is None else str(data.levels))


def test_failures_are_in_the_table_and_a_table_without_runs_has_its_head(
    finished: Finished, tmp_path: Path
) -> None:
    place = Folder(tmp_path)
    whole = Folder(finished.rows).load(Record.from_json)
    failed = replace(whole.results[0], training=None, failures=("one, or", "two"))
    place.save_record(replace(whole, results=(failed,)))
    (line,) = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert (line["failures"], line["steps"]) == ("one, or; two", "")
    place.save_record(replace(whole, results=()))
    head = (tmp_path / "results.csv").read_text().splitlines()
    assert head[0].startswith("dataset,model,repeat,seed,num_parameters")
    assert len(head) == 1


# --- TensorBoard ----------------------------------------------------------------------------------


def test_curves_are_written_for_tensorboard(finished: Finished) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.rows / "tensorboard" / "table--realnvp--1"))
    events.Reload()
    (result,) = [r for r in record_of(finished.rows)["results"] if r["model"] == "realnvp"][1:]
    for name in ("train", "validation"):
        found = {each.step: each.value for each in events.Scalars(f"nll/{name}")}
        wanted = {each["step"]: each[name] for each in result["training"]["curve"]}
        assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("error", [ImportError, AttributeError, OSError])
def test_a_broken_tensorboard_costs_nothing(
    error: type[Exception], finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise error(name)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken())
    result = Folder(finished.rows).load(Record.from_json).results[0]
    Folder(tmp_path).write_scalars(result)
    assert not (tmp_path / "tensorboard").exists()


# --- what is read, and what is not ----------------------------------------------------------------


class Tally(RunRecord):
    """A record of which something follows."""

    DERIVED = ("total",)

    @property
    def total(self) -> int:
        """The sum of the arguments."""
        return sum(self.arguments.values())


def test_what_follows_from_a_record_is_written_and_not_read() -> None:
    tally = Tally.begin({"a": 1, "b": 2}, "cpu")
    text = tally.as_json()
    assert json.loads(text)["total"] == 3
    assert Tally.from_json(text) == tally
    with pytest.raises(ValueError, match="surprise is unknown"):
        Tally.from_json(text.replace('"total"', '"surprise"'))


def test_settings_are_there_before_torch() -> None:
    script = (
        "import sys, nflows_iresnet.experiments.config, nflows_iresnet.files\n"
        "print(sorted({'torch', 'pandas', 'tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_load_run_is_imported_when_it_is_asked_for() -> None:
    script = (
        "import sys, nflows_iresnet\n"
        "print('nflows_iresnet.experiments' in sys.modules, callable(nflows_iresnet.load_run))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False True"


def test_loaded_flows_are_modules(finished: Finished) -> None:
    assert isinstance(load_run(finished.images, model="made"), nn.Module)
