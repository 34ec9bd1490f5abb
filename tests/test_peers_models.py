"""The peers in `compare`: their sizes, what they say of a density, and the same start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from nflows_iresnet.experiments import adapters, runs
from nflows_iresnet.experiments.adapters import DensityModel, StartedModel
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.config import RunConfig, UsageError
from nflows_iresnet.experiments.models import (
    IMAGE_MODELS,
    MODELS,
    SAME_START,
    Architecture,
    count_parameters,
    find_model,
    match_parameters,
    with_same_start,
)
from nflows_iresnet.experiments.options import CompareOptions, parse, to_config
from nflows_iresnet.graphs import GraphedStep
from nflows_iresnet.training.processes import seed_everything
from nflows_iresnet.training.progress import Steps, TrainingPlan
from nflows_iresnet.training.rows import Batches
from nflows_iresnet.transforms import (
    ActNorm,
    ElementwiseRationalQuadraticSpline,
    LinearTransform,
    ResidualTransform,
)
from tests.emulated_graph import EmulatedRecorder, recorder
from tests.optional import named
from tests.trained import train

__all__ = ["recorder"]

NEW = (
    "hybrid",
    "hybrid-autoregressive",
    "nsf-coupling",
    "nsf-autoregressive",
    "normflows-residual-linear",
    "zuko-nsf",
    "zuko-naf",
)
STARTED = [name for name in with_same_start(MODELS) if name.endswith(SAME_START)]
SMALL = Architecture(features=3, hidden_features=8, num_layers=2, num_blocks_per_layer=2)
INVERSE_ERRORS = {"normflows": 1e-2, "ffjord": 1e-2, "zuko-naf": 1e-3}
"""Of iterations, integrations and bisections that stop at tolerances of their libraries."""
INVERTS_IN_PLACES = ("zuko-naf",)
"""Noise whose sample lies beyond 10 is mapped to 10; with few steps of training that is most."""


def table(count: int = 400) -> Tensor:
    """Columns that are skewed and correlated."""
    torch.manual_seed(1)
    rows = torch.randn(count, 3) @ torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.2, 0.0], [0.0, 0.3, 1.0]])
    return rows + 0.3 * rows.exp() - 0.5


def trained(name: str, steps: int = 5) -> DensityModel:
    """Return a model after a few steps, in evaluation mode and in float64."""
    seed_everything(1)
    model = find_model(name).build(SMALL)
    model.initialize(table())
    falling = iter(range(steps + 1, 0, -1))
    stream = Batches(table(), 64, 0)
    plan = TrainingPlan(5e-3, Steps(steps))
    train(model, stream, lambda: float(next(falling)), plan)
    return model.eval().double()


def log_prob_by_slogdet(model: DensityModel, rows: Tensor) -> Tensor:
    noise, jacobian = adapters.value_and_jacobian(model.encode, rows)
    base = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(dim=1)
    return base + torch.linalg.slogdet(jacobian).logabsdet


# --- fair -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [2, 10, 64])
@pytest.mark.parametrize(
    "name", named(STARTED, slow=[name for name in STARTED if name.startswith("normflows")])
)
def test_parameters_are_within_ten_percent_with_those_of_the_start(
    name: str, features: int
) -> None:
    reference = Architecture(features, 64, 3, 2)
    target = count_parameters(MODELS["residual-flow"].build(reference))
    size = match_parameters(name, reference)
    model = find_model(name).build(size)
    assert isinstance(model, StartedModel)
    assert abs(count_parameters(model) - target) <= 0.1 * target
    assert count_parameters(model) == count_parameters(model.start) + count_parameters(model.model)
    behind = find_model(name.removesuffix(SAME_START)).build(size)
    assert count_parameters(model.model) == count_parameters(behind)


@pytest.mark.parametrize("name", named(NEW))
def test_sizes_mean_for_peers_what_they_mean_for_ours(name: str) -> None:
    def count(**changes: int) -> int:
        return count_parameters(MODELS[name].build(replace(SMALL, **changes)))

    assert count() < count(hidden_features=16)
    assert count() < count(num_layers=3)
    assert count() < count(num_blocks_per_layer=3)


def test_the_linear_layers_of_normflows_are_one_for_each_block() -> None:
    import normflows

    model = MODELS["normflows-residual-linear"].build(SMALL)
    kinds = [type(each) for each in model.flow.flows]
    assert kinds.count(normflows.flows.LULinearPermute) == kinds.count(normflows.flows.Residual)
    plain = MODELS["normflows-residual"].build(SMALL)
    assert normflows.flows.LULinearPermute not in map(type, plain.flow.flows)


@pytest.mark.parametrize("name", ["residual-flow-plain", "i-resnet"])
def test_the_flows_of_the_papers_have_neither_splines_nor_linear_layers(name: str) -> None:
    kinds = {type(each) for each in MODELS[name].build(SMALL).flow._transform._transforms}
    assert kinds == {ActNorm, ResidualTransform}
    ours = {type(each) for each in MODELS["residual-flow"].build(SMALL).flow.modules()}
    assert {LinearTransform, ElementwiseRationalQuadraticSpline} <= ours


@pytest.mark.parametrize("name", ["nsf-coupling", "nsf-autoregressive"])
def test_nsf_has_a_linear_layer_before_each_step_and_after_the_last(name: str) -> None:
    parts = MODELS[name].build(SMALL).flow._transform._transforms
    assert [isinstance(each, LinearTransform) for each in parts[1::3]] == [True, True, True]
    assert len(parts) == 3 * SMALL.num_layers + 2


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", named([*NEW, *(name for name in STARTED if name.removesuffix(SAME_START) in NEW)])
)
def test_the_density_is_the_determinant_of_the_whole_jacobian(name: str) -> None:
    model, rows = trained(name), table()[:6].double()
    expected = log_prob_by_slogdet(model, rows)
    torch.testing.assert_close(model.exact_log_prob(rows), expected, rtol=1e-7, atol=1e-7)
    if not model.estimates:
        torch.testing.assert_close(model.log_prob(rows), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", named([*NEW, "maf-same-start", "ffjord-same-start"]))
def test_noise_and_samples_go_through_the_same_map_as_the_density(name: str) -> None:
    model, rows = trained(name), table()[:20].double()
    atol = next((INVERSE_ERRORS[kind] for kind in INVERSE_ERRORS if kind in name), 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(model.encode(rows)), rows, rtol=0, atol=atol)
        if name in INVERTS_IN_PLACES:
            return
        model.float()
        torch.manual_seed(0)
        samples = model.sample(2000)
        assert samples.shape == (2000, 3)
        assert model.exact_log_prob(samples[:500]).isfinite().all()
    noise = model.encode(samples).detach()
    torch.testing.assert_close(noise.mean(0), torch.zeros(3), rtol=0, atol=0.2)
    torch.testing.assert_close(noise.std(0), torch.ones(3), rtol=0, atol=0.2)


@pytest.mark.parametrize("name", named(["maf-same-start", "residual-flow-plain-same-start"]))
def test_the_start_is_in_front_and_began_with_the_rows(name: str) -> None:
    seed_everything(1)
    model = find_model(name).build(SMALL)
    assert isinstance(model, StartedModel)
    model.eval().initialize(table(2000))
    values = model.start(table(2000))[0].detach()
    torch.testing.assert_close(values.mean(0), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(values.T.cov(), torch.eye(3), rtol=0, atol=1e-2)
    before = {key: value.clone() for key, value in model.start.state_dict().items()}
    model.train()
    model.log_prob(3 * table() - 2)
    for key, value in model.start.state_dict().items():
        assert torch.equal(value, before[key]), f"a batch started {key} again"


def test_the_start_is_trained_with_the_model() -> None:
    before = find_model("maf-same-start")
    seed_everything(1)
    model = before.build(SMALL)
    assert isinstance(model, StartedModel)
    model.initialize(table())
    old = [parameter.detach().clone() for parameter in model.start.parameters()]
    falling = iter(range(9, 0, -1))
    train(
        model, Batches(table(), 64, 0), lambda: float(next(falling)), TrainingPlan(1e-2, Steps(3))
    )
    for parameter, value in zip(model.start.parameters(), old, strict=True):
        assert not torch.equal(parameter, value)


def test_a_model_behind_a_start_keeps_its_certificate_and_its_estimates() -> None:
    model = find_model("residual-flow-plain-same-start").build(SMALL)
    plain = find_model("residual-flow-plain").build(SMALL)
    bound = model.lipschitz()
    assert bound is not None
    assert bound.certified
    assert model.estimates == plain.estimates
    assert model.flow_class == plain.flow_class


@pytest.mark.parametrize("name", ["hybrid", "hybrid-autoregressive", "maf-same-start"])
def test_a_training_step_is_captured_with_the_start(recorder: EmulatedRecorder, name: str) -> None:
    seed_everything(1)
    model = find_model(name).build(SMALL).double()
    model.initialize(table().double())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True, foreach=True)
    step = GraphedStep(
        model,
        optimizer,
        table(32).double(),
        loss=lambda flow, batch: -flow.log_prob(batch).mean(),
    )
    step(table(32).double())
    step(table(32).double())
    assert step.is_captured, step.reason


# --- the command ----------------------------------------------------------------------------------


def config_of(*words: str) -> RunConfig:
    return to_config(cast(CompareOptions, parse(["compare", "moons", *words])))


def test_same_start_adds_a_row_for_each_model_that_has_no_such_start() -> None:
    config = config_of("--models", "hybrid", "maf", "glow", "--same-start")
    assert config.models == ("hybrid", "maf", "maf-same-start", "glow", "glow-same-start")
    assert config_of("--models", "maf").models == ("maf",)
    assert with_same_start(config.models) == config.models
    everything = with_same_start(MODELS)
    assert {name for name in MODELS if f"{name}-same-start" not in everything} == {
        "hybrid",
        "hybrid-autoregressive",
        "hybrid-autoregressive-lipswish",
        "residual-flow",
        "residual-flow-lipswish",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "hybrid-same-start"], "'hybrid' has this start itself"),
        (["--models", "mfa-same-start"], "unknown model 'mfa-same-start'"),
        (["--models", "mfa", "--same-start"], "unknown model 'mfa': did you mean 'maf'"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    with pytest.raises((ValueError, UsageError), match=message):
        runs.prepare(config_of(*words))


def test_images_have_no_such_start(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="unknown model 'glow-same-start'"):
        find_model("glow-same-start", IMAGE_MODELS)
    assert main(["compare", "digits", "--images", "--same-start"]) == 2
    assert "--same-start is for rows" in capsys.readouterr().err


def test_a_comparison_with_the_same_start_is_written_and_resumed(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    np.save(tmp_path / "table.npy", table().numpy())
    command = ["compare", str(tmp_path / "table.npy"), "--models", "maf", "--same-start"]
    command += ["--steps", "3", "--num-layers", "2", "--hidden-features", "16"]
    command += ["--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert "maf-same-start" in capsys.readouterr().out
    assert main([*command, "--resume"]) == 0
    assert main([*command[:4], *command[5:], "--resume"]) == 2


def test_names_and_descriptions_do_not_run_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, spec in MODELS.items():
        assert any(line.split() == [name, *spec.description.split()] for line in lines), name


def test_every_model_that_needs_zuko_says_so_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nflows_iresnet.experiments.models.find_spec", lambda name: None)
    for name in ("zuko-nsf", "zuko-naf"):
        with pytest.raises(ImportError, match=r"pip install '\.\[ffjord\]'"):
            MODELS[name].build(SMALL)
