"""The manners of `nflows-iresnet bench`: what it prints, writes and refuses."""

from __future__ import annotations

import copy
import json
import math
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from nflows_iresnet.experiments.bench import (
    BASELINE,
    FLOOR,
    ITEMS,
    OURS,
    STEP_MODELS,
    Item,
    chosen_items,
    inverses,
    quality,
    steps,
)
from nflows_iresnet.experiments.bench.command import WIDTH, print_item
from nflows_iresnet.experiments.bench.inverses import FrozenNet, SlowestMap, default_block
from nflows_iresnet.experiments.bench.measure import Benchmark, Case
from nflows_iresnet.experiments.bench.steps import (
    IMAGE_MODELS,
    TRIO,
    ImageSize,
    PlainNet,
    Trainable,
    first_block,
    step_case,
)
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.models import MODELS, Architecture, ModelSpec
from nflows_iresnet.experiments.options import BenchOptions
from nflows_iresnet.experiments.tables import make_console
from nflows_iresnet.nn import LipschitzMLP
from nflows_iresnet.solvers import FixedPointIteration

pytest.importorskip("matplotlib")
pytest.importorskip("rich")


def small(features: int, hidden: int) -> Architecture:
    return Architecture(features, hidden, 1, 2)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two items that take no time."""
    step = Item(
        "small steps",
        lambda options: [step_case(small(2, 4), batch) for batch in (4, 8)],
        targets=ITEMS["step-dimension"].targets,
        variable="B",
    )
    monkeypatch.setitem(ITEMS, "tiny", step)


def run(out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["bench", "--quick", *arguments, "--out", str(out)]) == 0
    content: dict[str, Any] = json.loads((out / "bench.json").read_text())
    return content


@pytest.mark.usefixtures("tiny")
def test_what_is_written_can_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = run(tmp_path, "--only", "tiny", "--repeats", "3", "--seed", "5")
    assert content["arguments"]["items"] == ["tiny"]
    assert content["arguments"]["seed"] == 5
    assert content["environment"]["versions"]["torch"]
    assert [result["parameters"]["B"] for result in content["results"]] == [4, 8]
    table = iter(content["table"])
    for result in content["results"]:
        measured = {each["model"]: each for each in result["measurements"]}
        assert list(measured) == [OURS, BASELINE, FLOOR]
        for name, each in measured.items():
            assert len(each["seconds"]) == len(each["cpu_seconds"]) == 3
            row = next(table)
            assert [row[key] for key in ("item", "case", "model")] == ["tiny", result["case"], name]
            for clock, key in (("seconds", "wall_ratio"), ("cpu_seconds", "cpu_ratio")):
                pairs = zip(measured[BASELINE][clock], each[clock], strict=True)
                expected = statistics.median(above / below for above, below in pairs)
                assert row[key]["median"] == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("small steps", "normflows", "promised", "bench.json"))


@pytest.mark.usefixtures("tiny")
def test_targets_in_the_file_are_those_of_the_samples(tmp_path: Path) -> None:
    content = run(tmp_path, "--only", "tiny", "--repeats", "3")
    faster = [target for target in content["targets"] if "d = 2" in target["target"]]
    assert len(faster) == 2
    rows = [row for row in content["table"] if row["model"] == OURS]
    for target, ours in zip(faster, rows, strict=True):
        assert target["measured"] == pytest.approx(ours["cpu_ratio"]["median"])
        assert target["is_met"] == (target["measured"] >= target["bound"])


@pytest.mark.usefixtures("tiny")
def test_scaling_is_fitted_and_drawn(tmp_path: Path) -> None:
    content = run(tmp_path, "--only", "tiny", "--repeats", "1")
    assert {fit["model"] for fit in content["fits"]} == set(TRIO)
    assert all(len(fit["points"]) == 2 for fit in content["fits"])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_ratio_to_another_row_than_normflows_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[1] / "examples/results/bench-cpu-intel-xeon.json"
    item, results = ITEMS["accuracy"], Benchmark.from_json(file.read_text()).of("accuracy")
    print_item(make_console(WIDTH), "accuracy", item, results)
    _, upper, lower, *_ = [s for s in capsys.readouterr().out.splitlines() if "value" in s]
    assert upper.count("x of") == lower.count("normflows-value") == 1
    assert lower.count(" x ") == 2


@pytest.mark.usefixtures("tiny")
def test_a_model_that_fails_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = STEP_MODELS[FLOOR].build(small(3, 4))
    monkeypatch.setitem(TRIO, FLOOR, lambda size: broken)
    content = run(tmp_path, "--only", "tiny", "--repeats", "2")
    measured = content["results"][0]["measurements"][-1]
    assert measured["seconds"] == []
    assert "RuntimeError" in measured["note"]
    assert "RuntimeError" in capsys.readouterr().out
    assert content["table"][0]["wall_ratio"] is not None


def test_the_real_items_run(tmp_path: Path) -> None:
    content = run(tmp_path, "--only", "likelihood", "inverse-scaling", "--repeats", "1")
    found = {result["item"] for result in content["results"]}
    assert found == {"likelihood", "inverse-scaling"}
    law = {fit["model"]: fit["exponent"] for fit in content["fits"]}
    assert law["ours-picard"] == pytest.approx(1.1, abs=0.15)


def test_quality_trains_both_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nflows_iresnet.experiments.bench.quality.HIDDEN", {"two-spirals": 8})
    monkeypatch.setattr("nflows_iresnet.experiments.bench.quality.TEST_ROWS", 50)
    content = run(tmp_path, "--only", "quality", "--seconds", "0.2")
    (result,) = content["results"]
    assert [each["model"] for each in result["measurements"]] == [OURS, BASELINE]
    for each in result["measurements"]:
        raw = each["raw"]
        assert len(raw["seconds"]) == len(raw["nll"]) == 17
        assert raw["seconds"][-1] >= 0.2
        chosen = raw["validation"].index(min(raw["validation"]))
        assert each["numbers"]["nll"] == raw["nll"][chosen]
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_fails_in_training_leaves_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nflows_iresnet.experiments.bench.quality.HIDDEN", {"two-spirals": 8})
    monkeypatch.setattr("nflows_iresnet.experiments.bench.quality.TEST_ROWS", 50)
    broken = MODELS["normflows-residual"].build(small(3, 4))
    monkeypatch.setitem(MODELS, "normflows-residual", ModelSpec("broken", lambda size: broken))
    (result,) = run(tmp_path, "--only", "quality", "--seconds", "0.1")["results"]
    ours, failed = result["measurements"]
    assert len(ours["raw"]["nll"]) == 17
    assert failed["raw"] == {"seconds": [], "validation": [], "nll": []}
    assert "RuntimeError" in failed["note"]


@pytest.mark.usefixtures("tiny")
def test_interruption_keeps_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(options: BenchOptions) -> NoReturn:
        raise KeyboardInterrupt

    endless = Item("stops", lambda options: [Case("x", {}, interrupt)])
    monkeypatch.setitem(ITEMS, "endless", endless)
    out = ["--out", str(tmp_path)]
    assert main(["bench", "--only", "tiny", "endless", "--repeats", "1", *out]) == 130
    assert str(tmp_path) in capsys.readouterr().err
    assert len(json.loads((tmp_path / "bench.json").read_text())["results"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "step-dimensoin"], "did you mean 'step-dimension'"),
        (["--only", "zzz"], "choose from"),
        (["--only"], "--only"),
        (["--repeats", "0"], "'0' is not a positive integer"),
        (["--seconds", "-1"], "'-1' is not a positive number"),
        (["--threads", "many"], "'many' is not a positive integer"),
        (["--device", "tpu"], "'tpu'"),
        (["--unknown"], "--unknown"),
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
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert message in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("tiny")
def test_folder_that_holds_results_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "--only", "tiny", "--repeats", "1", "--quiet")
    assert main(["bench", "--only", "tiny", "--out", str(tmp_path)]) == 2
    assert "already holds results" in capsys.readouterr().err


def test_list_and_help_name_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*ITEMS, *STEP_MODELS))
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    helped = capsys.readouterr().out
    assert all(name in helped for name in (*ITEMS, "cpu ratio", "--quality"))


def test_items_are_listed_without_torch() -> None:
    code = (
        "import sys; from nflows_iresnet.experiments.bench import describe_items; "
        "assert 'step-dimension' in describe_items(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ITEMS)
def test_quick_is_no_more_than_everything(name: str) -> None:
    item = ITEMS[name]
    quick, full = (item.cases(BenchOptions(quick=flag)) for flag in (True, False))
    assert 0 < len(quick) <= len(full)
    assert len({case.label for case in full}) == len(full)
    assert all(item.variable in case.parameters for case in full if item.variable is not None)


def test_what_runs_by_default() -> None:
    optional = {"step-compiled", "quality"}
    assert list(chosen_items(None)) == [name for name in ITEMS if name not in optional]
    assert list(chosen_items(None, quality=True)) == [*chosen_items(None), "quality"]
    assert list(chosen_items(["memory", "memory"], quality=True)) == ["memory", "quality"]


# --- models and problems ---------------------------------------------------------------------


@pytest.mark.parametrize("name", STEP_MODELS)
def test_every_model_takes_steps(name: str) -> None:
    assert_takes_steps(STEP_MODELS[name].build(small(3, 8)), torch.randn(16, 3))


def assert_takes_steps(model: Trainable, rows: torch.Tensor) -> None:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = steps.training_step(model, iter([rows, rows]), learning_rate=0.1)
    step()
    step()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert any(changed)
    assert model.log_prob(rows).shape == (len(rows),)


def test_floor_has_the_widths_of_ours() -> None:
    def shapes(module: Any) -> list[torch.Size]:
        return sorted(p.shape for p in module.parameters() if p.dim() == 2)

    ours, plain = (STEP_MODELS[name].build(small(5, 16)) for name in (OURS, FLOOR))
    assert isinstance(plain, PlainNet)
    assert shapes(plain) == shapes(ours)


def test_exact_jacobians_that_nobody_can_afford_are_left_out() -> None:
    affords = STEP_MODELS["ours-exact"].affords
    assert affords(small(2, 64), 8192)
    assert not affords(small(512, 512), 128)


@pytest.mark.parametrize("name", TRIO)
def test_a_block_alone_is_without_what_is_beside_it(name: str) -> None:
    model = first_block(STEP_MODELS[name].build(Architecture(3, 8, 2, 2)))
    kinds = {type(each).__name__ for each in model.modules()}
    assert "ActNorm" not in kinds
    assert_takes_steps(model, torch.randn(16, 3))


def frozen_problem(dtype: torch.dtype = torch.float64) -> inverses.Problem:
    torch.manual_seed(0)
    return inverses.make_problem(FrozenNet(LipschitzMLP(3, [16, 16]).to(dtype)), torch.randn(20, 3))


def test_frozen_net_is_the_same_function() -> None:
    net = LipschitzMLP(3, [16, 16]).double()
    frozen = FrozenNet(net)
    inputs = torch.randn(7, 3, dtype=torch.float64)
    assert torch.allclose(frozen(inputs), net(inputs), atol=1e-12)
    assert torch.allclose(frozen.bind()(inputs), net(inputs), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_problem_knows_its_solution(dtype: torch.dtype) -> None:
    problem = frozen_problem(dtype)
    exact = copy.deepcopy(problem.net).double()
    images = problem.solution + exact(problem.solution)
    assert torch.allclose(images, problem.targets.double(), rtol=0, atol=1e-13)
    assert problem.error(problem.solution + 1e-3) == pytest.approx(1e-3 * math.sqrt(3))


@pytest.mark.parametrize(
    ("inverse_at", "tolerances"),
    [
        (partial(inverses.our_inverse, default_block().solver), inverses.OUR_TOLERANCES),
        (partial(inverses.our_inverse, FixedPointIteration()), inverses.OUR_TOLERANCES),
        (inverses.normflows_inverse, inverses.NORMFLOWS_TOLERANCES),
    ],
    ids=["ours", "picard", "normflows"],
)
def test_reach_finds_the_loosest_tolerance(
    inverse_at: inverses.InverseAt, tolerances: tuple[float, ...]
) -> None:
    net = SlowestMap(6, 0.8).double()
    problem = inverses.make_problem(net, torch.randn(10, 6))
    found = inverses.reach(problem, inverse_at, tolerances, to=1e-5)
    assert found is not None
    assert found.is_reached
    assert problem.error(found.inverse(problem.targets)) == found.error <= 1e-5
    looser = [value for value in tolerances if value > found.tolerance]
    errors = [problem.error(inverse_at(net, value)(problem.targets)) for value in looser]
    assert all(error > 1e-5 for error in errors)
    assert found.evaluations >= 2


def test_what_cannot_be_reached_is_said() -> None:
    net = SlowestMap(6, 0.9)
    problem = inverses.make_problem(net, torch.randn(10, 6))
    found = inverses.reach(problem, inverses.normflows_inverse, [1e-5, 1e-6], to=1e-30)
    assert found is not None
    assert not found.is_reached


def test_rows_are_counted_for_both_libraries() -> None:
    problem = frozen_problem()
    with torch.no_grad(), inverses.counted_rows(problem.net) as rows:
        problem.net(torch.zeros(4, 3, dtype=torch.float64))
        inverses.our_inverse(FixedPointIteration(), problem.net, 1e-3)(problem.targets)
        ours = sum(rows) - 4
        inverses.normflows_inverse(problem.net, 1e-6)(problem.targets)
    assert rows[0] == 4
    assert ours >= 2 * 20
    assert sum(rows) - 4 - ours >= 2 * 20
    problem.net(problem.targets)
    assert rows[-1] == 20


def test_dense_gradient_is_that_of_the_implicit_function() -> None:
    problem = frozen_problem()
    cotangent = torch.randn(20, 3, dtype=torch.float64)
    inverse = inverses.normflows_inverse(problem.net, 1e-14)
    found, gradient = inverses.pull_back(inverse, problem.net, problem.targets, cotangent)
    assert problem.error(found) < 1e-6
    truth = inverses.dense_gradient(problem, cotangent)
    assert torch.allclose(gradient, truth, rtol=1e-4, atol=1e-5)


def test_scatter_tells_bias_from_variance() -> None:
    values, gradient = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    truth = quality.Draw(values, gradient)
    draws = [quality.Draw(values + 0.5 + sign * 2, gradient * (1 + sign * 0.1)) for sign in (-1, 1)]
    numbers = quality.scatter(draws, truth)
    assert numbers["value_std"] == pytest.approx(math.sqrt(8))
    assert numbers["value_bias"] == pytest.approx(0.5)
    assert numbers["gradient_mse"] == pytest.approx(0.01)
    assert "gradient_mse" not in quality.scatter([quality.Draw(values, None)] * 2, truth)


def test_estimates_agree_on_the_mean() -> None:
    """Every estimate, normflows' with its sign and direction, is of the same log-determinant."""
    net = LipschitzMLP(2, [8, 8], coeff=0.5)
    inputs = torch.randn(4000, 2)
    exact = quality.estimates()["ours-exact"](net, inputs).mean().detach()
    for name, estimate in quality.estimates().items():
        if name != BASELINE:  # whose default value is not that of the log-determinant
            values = estimate(net, inputs).detach()
            error = float(values.std()) / math.sqrt(len(values)) + 1e-6
            assert float(values.mean()) == pytest.approx(float(exact), abs=5 * error), name


def test_checkpoints_end_at_the_budget() -> None:
    times = quality.checkpoints(256.0)
    assert times[0] == pytest.approx(1.0)
    assert times[-1] == 256.0


def test_validation_chooses_the_point_that_is_reported() -> None:
    points = [quality.Point(1.0, 5.0, 7.0), quality.Point(2.0, 3.0, 6.0)]
    points.append(quality.Point(4.0, 3.5, 1.0))
    curve = quality.Curve(points)
    assert curve.best == (2.0, 3.0, 6.0)
    assert curve.seconds_to(4.0) == 2.0
    assert curve.seconds_to(2.0) is None
    points.insert(0, quality.Point(0.5, math.nan, 0.0))
    assert curve.best.test == 6.0


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_every_model_takes_steps_on_images(name: str) -> None:
    size = ImageSize(channels=2, pixels=4, hidden=4)
    assert_takes_steps(IMAGE_MODELS[name](size), torch.randn(3, *size.shape))


def test_kernels_of_all_image_models_have_the_same_shapes() -> None:
    size = ImageSize(channels=2, pixels=4, hidden=4)
    shapes = {
        name: sorted(p.shape for p in build(size).parameters() if p.dim() == 4)
        for name, build in IMAGE_MODELS.items()
    }
    assert shapes[OURS] == shapes[BASELINE] == shapes[FLOOR]
    assert len(shapes[OURS]) == 6
