"""The command `nflows-iresnet compare`: fair, exact, honest about failures, safe to interrupt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nflows_iresnet.experiments import adapters, models, runs
from nflows_iresnet.experiments.adapters import NflowsModel
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.config import RunConfig
from nflows_iresnet.experiments.evaluation import exact_log_prob, peak_megabytes
from nflows_iresnet.experiments.folder import Folder
from nflows_iresnet.experiments.models import MODELS, Architecture, ModelSpec, count_parameters
from nflows_iresnet.experiments.record import Record
from nflows_iresnet.experiments.report import render
from nflows_iresnet.training.processes import seed_everything
from nflows_iresnet.training.progress import Steps, TrainingPlan
from nflows_iresnet.training.rows import Batches
from tests.optional import named
from tests.trained import train

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

TINY = ["--steps", "3", "--num-layers", "2", "--hidden-features", "16", "--batch-size", "32"]
SMALL = Architecture(features=2, hidden_features=16, num_layers=2, num_blocks_per_layer=2)


def rows(num_rows: int = 200, features: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(num_rows, features))


@pytest.fixture
def table(tmp_path: Path) -> str:
    np.save(tmp_path / "table.npy", rows())
    return str(tmp_path / "table.npy")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    arguments = ["compare", "moons", "--models", "residual-flow", "realnvp", *TINY]
    assert main([*arguments, "--out", str(out), "--quiet"]) == 0
    return out


# --- fair -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [2, 10, 64])
@pytest.mark.parametrize("name", named(MODELS, slow=["normflows-residual"]))
def test_parameter_counts_are_within_ten_percent(name: str, features: int) -> None:
    reference = Architecture(features, 64, 3, 2)
    target = count_parameters(MODELS["residual-flow"].build(reference))
    model = MODELS[name].build(models.match_parameters(name, reference))
    assert abs(count_parameters(model) - target) <= 0.1 * target


def test_unmatchable_parameters_name_the_model_and_the_counts() -> None:
    message = r"'maf' cannot match the \d+ parameters .* nearest is \d+"
    with pytest.raises(ValueError, match=message):
        models.match_parameters("maf", Architecture(2, 1, 1, 1))


def test_unmatchable_parameters_name_a_width_that_matches() -> None:
    with pytest.raises(ValueError, match=r"give --hidden-features \d+ \(now 8\)") as caught:
        models.match_parameters("maf", Architecture(2, 8, 2, 2))
    width = int(str(caught.value).split("--hidden-features ")[1].split()[0])
    models.match_parameters("maf", Architecture(2, width, 2, 2))


def test_every_model_sees_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    log_prob = NflowsModel.log_prob

    def spy(self: NflowsModel, inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return log_prob(self, inputs)

    monkeypatch.setattr(NflowsModel, "log_prob", spy)
    config = RunConfig(
        ("8-gaussians",), ("residual-flow", "realnvp", "maf"), 3, batch_size=8, num_layers=2
    )
    for run in runs.prepare(config):
        runs.train_run(MODELS[run.model].build(run.size), runs.Job(run, config))
    first, second, third = (seen[start : start + 3] for start in (0, 3, 6))
    assert len(seen) == 9
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, third))
    assert not torch.equal(first[0], first[1])


def test_batches_cover_an_epoch_once() -> None:
    stream = Batches(torch.arange(10.0)[:, None], batch_size=5, seed=0)
    epoch = torch.cat([next(stream), next(stream)]).flatten()
    assert sorted(epoch.tolist()) == list(range(10))


def test_training_restores_the_best_validated_state() -> None:
    seed_everything(0)
    model = MODELS["realnvp"].build(SMALL)
    states: list[Tensor] = []
    losses = iter([3.0, 1.0, 2.0, float("nan")])

    def validate() -> float:
        states.append(next(model.parameters()).detach().clone())
        return next(losses)

    plan = TrainingPlan(1e-2, Steps(4), validations=4)
    log = train(model, Batches(torch.randn(64, 2), 16, 0), validate, plan)
    assert (log.best_step, log.best_validation, log.steps) == (2, 1.0, 4)
    assert torch.equal(next(model.parameters()), states[1])


def test_what_follows_a_step_follows_the_average_of_the_weights_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """normflows' residual blocks keep vectors of the weights that they had then."""
    calls: list[None] = []
    model = MODELS["realnvp"].build(SMALL)
    monkeypatch.setattr(model, "after_step", lambda: calls.append(None))
    config = RunConfig(("moons",), ("realnvp",), 3, num_layers=2)
    (run,) = runs.prepare(config)
    log = runs.train_run(model, runs.Job(run, config))
    assert len(calls) == log.steps + len(log.curve) + 1, "and the best weights, too"


def test_training_stops_early() -> None:
    model, values = MODELS["nice"].build(SMALL), iter(range(100))
    plan = TrainingPlan(1e-3, Steps(20), validations=20, patience=3)
    stream = Batches(torch.randn(64, 2), 16, 0)
    assert train(model, stream, lambda: float(next(values)), plan).steps == 4


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", named(MODELS))
def test_exact_log_prob_and_round_trip(name: str) -> None:
    """Against slogdet of the Jacobian of the whole model, after steps that move it off zero."""
    size = Architecture(features=3, hidden_features=16, num_layers=2, num_blocks_per_layer=2)
    seed_everything(1)
    model, inputs = MODELS[name].build(size), torch.randn(64, 3)
    falling = iter(range(20, 0, -1))
    stream = Batches(inputs.exp(), 32, 0)
    train(model, stream, lambda: float(next(falling)), TrainingPlan(2e-2, Steps(15)))
    points = inputs[:5].exp().clamp_max(9)  # NAF of zuko inverts within [-10, 10]
    _, jacobian = adapters.value_and_jacobian(model.encode, points, chunk_size=2)
    noise = model.encode(points).detach()
    base = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(dim=1)
    expected = base + torch.linalg.slogdet(jacobian).logabsdet
    rounding = 1e-3 if name == "ffjord" else 1e-4  # its steps are as long as they may be
    found = exact_log_prob(model, points)
    torch.testing.assert_close(found, expected, atol=rounding, rtol=rounding)
    with torch.no_grad():
        tolerance = 1e-2 if name == "normflows-residual" else 1e-4
        torch.testing.assert_close(model.decode(noise), points, atol=tolerance, rtol=tolerance)


def test_glow_step_mixes_all_features_and_inverts() -> None:
    torch.manual_seed(0)
    step = models.glow_step(Architecture(4, 16, 1, 1), parity=1)
    inputs = torch.randn(50, 4) * 3 + 1
    outputs, logabsdet = step(inputs)
    torch.testing.assert_close(outputs.mean(dim=0)[::2], torch.zeros(2), atol=1e-5, rtol=0)
    back, inverse_logabsdet = step.inverse(outputs)
    torch.testing.assert_close(back, inputs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet, atol=1e-4, rtol=1e-4)


def test_normflows_lipschitz_is_the_true_product_of_norms() -> None:
    bound = MODELS["normflows-residual"].build(SMALL).lipschitz()
    assert bound is not None
    assert not bound.certified
    assert 0 < bound.value < 1


def test_our_lipschitz_bound_is_certified() -> None:
    bound = MODELS["residual-flow"].build(SMALL).lipschitz()
    assert bound is not None
    assert bound.certified
    assert bound.value <= 0.97


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def work() -> None:
        kept = torch.zeros(250_000)
        for _ in range(5):
            kept = kept + 1

    assert peak_megabytes(work, torch.device("cpu")) == pytest.approx(2.0)


# --- the command ----------------------------------------------------------------------------------


def test_everything_is_written(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} - {"tensorboard"} == {
        "results.json",
        "results.csv",
        "weights",
        "report.html",
        "moons.png",
        "runs",
    }
    assert (finished / "moons.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "residual-flow" in page
    assert "http" not in page.replace("http-equiv", "")


def test_results_reproduce(finished: Path) -> None:
    data = json.loads((finished / "results.json").read_text())
    assert {"torch", "nflows", "normflows", "nflows-iresnet"} <= set(
        data["environment"]["versions"]
    )
    assert {"python", "device", "device_name", "platform"} <= set(data["environment"])
    assert {"seed", "steps", "batch_size", "learning_rate", "threads"} <= set(data["arguments"])
    assert data["started"]
    for result in data["results"]:
        assert result["hyperparameters"]["hidden_features"] > 0
        assert result["training"]["curve"]
        assert result["metrics"]["above_optimum_se"] > 0
        assert not result["failures"]


def test_same_seed_same_likelihood(finished: Path) -> None:
    data = json.loads((finished / "results.json").read_text())
    config = RunConfig(
        ("moons",),
        ("residual-flow", "realnvp"),
        steps=3,
        num_layers=2,
        hidden_features=16,
        batch_size=32,
        learning_rate=data["arguments"]["learning_rate"],
    )
    for run, stored in zip(runs.prepare(config), data["results"], strict=True):
        result, _, weights = runs.execute(runs.Job(run, config))
        assert weights
        assert result.metrics.test_nll == pytest.approx(stored["metrics"]["test_nll"], abs=1e-6)


def test_report_can_be_rendered_again(finished: Path) -> None:
    folder = Folder(finished)
    assert render(folder.load(Record.from_json), folder) == (finished / "report.html").read_text()


def test_table_and_verdict_are_printed(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(Path(table).parent / "out")
    arguments = ["compare", table, "--models", "realnvp", "nice", "--repeats", "2", *TINY]
    assert main([*arguments, "--out", out]) == 0
    printed = capsys.readouterr()
    assert "± over" in printed.out
    assert "on the same test rows" in printed.out
    assert "repeat 1: test NLL" in printed.err
    assert (Path(out) / "table.png").exists()


def test_digits_are_shown_as_images_with_bits_per_dim(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    arguments = ["compare", "digits", "--models", "nice", *TINY, "--budget", "0.05"]
    arguments[arguments.index("--steps") : arguments.index("--steps") + 2] = []
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "per dim" in capsys.readouterr().out
    assert (tmp_path / "out" / "digits.png").exists()


# --- failures are results -------------------------------------------------------------------------


class Broken(NflowsModel):
    """Trains, but cannot be inverted."""

    def decode(self, noise: Tensor) -> Tensor:
        raise RuntimeError("the inverse did not converge\nat all")


class Diverging(NflowsModel):
    """Its loss is not a number."""

    def log_prob(self, inputs: Tensor) -> Tensor:
        return super().log_prob(inputs) * float("nan")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Broken, "round trip: RuntimeError: the inverse did not converge"),
        (
            Diverging,
            "TrainingDivergedError: the training loss was nan at step 1; lower the learning rate",
        ),
    ],
)
def test_a_failure_is_reported_and_the_rest_goes_on(
    kind: type[NflowsModel],
    reason: str,
    table: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def build(size: Architecture) -> NflowsModel:
        return kind(MODELS["realnvp"].build(size).flow)

    monkeypatch.setitem(models.MODELS, "faulty", ModelSpec("for this test", build))
    out = str(Path(table).parent / "out")
    assert main(["compare", table, "--models", "faulty", "nice", *TINY, "--out", out]) == 0
    assert f"faulty FAILED {reason}" in " ".join(capsys.readouterr().out.split())
    data = json.loads((Path(out) / "results.json").read_text())
    assert [bool(result["failures"]) for result in data["results"]] == [True, False]
