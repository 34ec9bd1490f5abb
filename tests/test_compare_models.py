"""The registry of models: one entry adds a model, and the face of its library is found."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from nflows.flows import Flow as NflowsFlow
from nflows.flows import SimpleRealNVP
from torch import nn

from nflows_iresnet import datasets
from nflows_iresnet.experiments import adapters, models
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.models import (
    IMAGE_MODELS,
    MODELS,
    Architecture,
    ImageArchitecture,
    ModelSpec,
    count_parameters,
    match_parameters,
)
from nflows_iresnet.flows import ResidualFlow

ROOT = Path(__file__).parents[1]
SMALL = Architecture(features=3, hidden_features=8, num_layers=2, num_blocks_per_layer=1)
TINY = ["--steps", "3", "--num-layers", "2", "--hidden-features", "16", "--device", "cpu"]


# --- by one entry ---------------------------------------------------------------------------------


def my_flow(size: Architecture) -> NflowsFlow:
    return SimpleRealNVP(*size.as_tuple(), use_volume_preserving=True)


def test_a_model_is_added_in_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its function of a size returns a flow, and knows nothing of comparisons."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(200, 3)))
    monkeypatch.setitem(models.MODELS, "mine", ModelSpec("a flow of mine", my_flow))
    wanted = ["compare", str(tmp_path / "table.npy"), "--models", "mine", "mine-same-start"]
    assert main([*wanted, *TINY, "--out", str(tmp_path / "out")]) == 0
    assert main(["compare", "--list"]) == 0
    assert "a flow of mine" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [result["failures"] for result in found] == [[], []]
    target = count_parameters(MODELS["residual-flow"].build(Architecture(3, 16, 2, 2)))
    for result in found:
        assert abs(result["num_parameters"] - target) <= 0.1 * target
        assert result["model_class"] == "nflows.flows.realnvp.SimpleRealNVP"
        assert result["metrics"]["round_trip_max"] < 1e-3


def test_a_data_set_is_added_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    entry = datasets._toy("mine", "half circles", datasets.Moons())
    monkeypatch.setitem(datasets._ENTRIES, "mine", entry)
    wanted = ["compare", "mine", "--models", "nice", *TINY, "--quiet"]
    assert main([*wanted, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "mine.png").exists()
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert result["metrics"]["above_optimum"] is not None


def test_names_and_descriptions_are_there_without_torch() -> None:
    program = (
        "import sys; from nflows_iresnet.experiments.models import *\n"
        "print(MODELS['maf'].description, *IMAGE_MODELS)\n"
        "print(*({'torch', 'nflows', 'normflows', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    described, imported = done.stdout.splitlines()
    assert described == " ".join(["MaskedAutoregressiveFlow of nflows", *IMAGE_MODELS])
    assert imported == ""


@pytest.mark.parametrize("kind", [Architecture, ImageArchitecture])
def test_a_size_is_plain_values_of_types_that_can_be_looked_up(kind: type[Architecture]) -> None:
    """So that a record can rebuild it, and the model from it."""
    more: Any = {"shape": (1, 4, 4), "levels": 17, "num_scales": 1}
    size = kind(*SMALL.as_tuple(), **(more if kind is ImageArchitecture else {}))
    plain = json.loads(json.dumps(asdict(size)))
    again: dict[str, Any] = {
        key: tuple(value) if key == "shape" else value for key, value in plain.items()
    }
    assert get_type_hints(kind).keys() == plain.keys()
    assert kind(**again) == size


# --- faces ----------------------------------------------------------------------------------------


def test_the_face_of_a_flow_is_that_of_its_library() -> None:
    import normflows

    class Mine(NflowsFlow):
        pass

    plain = SimpleRealNVP(2, 4, 1, 1)
    theirs = MODELS["normflows-residual"].build_flow(SMALL)
    assert isinstance(theirs, normflows.NormalizingFlow)
    faces = {
        adapters.NflowsModel: [plain, Mine(plain._transform, plain._distribution)],
        adapters.ResidualModel: [ResidualFlow(2, 4, 1)],
        adapters.NormflowsResidualModel: [theirs],
    }
    for face, flows in faces.items():
        assert [type(adapters.as_density_model(flow)) for flow in flows] == [face] * len(flows)
    model = adapters.NflowsModel(plain)
    assert adapters.as_density_model(model) is model


def test_flows_of_zuko_have_the_face_that_their_density_needs() -> None:
    zuko = pytest.importorskip("zuko")
    assert type(adapters.as_density_model(zuko.flows.NSF(2))) is adapters.ZukoModel
    assert type(adapters.as_density_model(zuko.flows.CNF(2))) is adapters.ContinuousModel


def test_what_is_no_flow_is_refused_by_name() -> None:
    spec = ModelSpec("a layer", lambda size: nn.Linear(size.features, 1))
    with pytest.raises(ValueError, match=r"got Linear: derive from nflows\.flows\.Flow"):
        spec.build(SMALL)


def test_a_flow_of_normflows_without_residual_blocks_has_no_lipschitz_bound() -> None:
    import normflows

    torch.manual_seed(0)
    flow = normflows.flows.LULinearPermute(3)
    base = normflows.distributions.DiagGaussian(3, trainable=False)
    model = adapters.as_density_model(normflows.NormalizingFlow(base, [flow])).eval()
    rows = torch.randn(5, 3)
    assert model.lipschitz() is None
    torch.testing.assert_close(model.exact_log_prob(rows), model.flow.log_prob(rows))
    with torch.no_grad():
        torch.testing.assert_close(model.decode(model.encode(rows)), rows)


# --- the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["realnvp", "made", "nsf-coupling"])
def test_the_width_that_is_found_is_the_best_of_all(name: str) -> None:
    reference = Architecture(4, 12, 2, 1)
    target = count_parameters(MODELS["residual-flow"].build(reference))

    def gap(width: int) -> int:
        size = Architecture(4, width, 2, 1)
        return abs(count_parameters(MODELS[name].build(size)) - target)

    found = match_parameters(name, reference)
    assert (found.features, found.num_layers, found.num_blocks_per_layer) == (4, 2, 1)
    assert gap(found.hidden_features) == min(map(gap, range(1, 120)))
