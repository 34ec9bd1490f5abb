"""The tests, the check of the contract and the example for GPUs, where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nflows_iresnet import ResidualFlow, testing, transforms
from nflows_iresnet.nn import LipschitzMLP
from tests import device, pretended
from tests.cases import CASES

EXAMPLE = Path(__file__).parent.parent / "examples" / "gpu.py"
MORE = "mlp-context- or act-norm- or marginal-spline or roulette-mlp"


@pytest.fixture
def on_pretended() -> None:
    if device.current().type != pretended.NAME:
        pytest.skip("about the device that is pretended: another test runs it there")


# --- the option ---------------------------------------------------------------------------------


def test_a_device_that_is_not_there_skips_the_tests_and_says_so(
    request: pytest.FixtureRequest,
) -> None:
    said = device.run_on(request.config, ["tests/test_splines.py"], name="cuda:63")
    assert "there is no device 'cuda:63' here" in said
    assert " passed" not in said


def test_tests_that_have_nothing_to_do_with_a_device_are_skipped_there(
    request: pytest.FixtureRequest,
) -> None:
    said = device.run_on(request.config, ["tests/test_renamed.py"])
    assert "nothing to do with the device" in said
    assert " passed" not in said


def test_the_files_that_run_on_a_device_are_there() -> None:
    found = {each.stem for each in Path(__file__).parent.glob("test_*.py")}
    assert found >= device.ON_DEVICE


# --- the device that is pretended -----------------------------------------------------------------


def test_the_contract_holds_on_a_device_that_is_pretended(request: pytest.FixtureRequest) -> None:
    device.run_on(request.config, [__file__, "-k", "not every_case"])


@pytest.mark.slow
def test_more_of_the_contract_holds_on_a_device_that_is_pretended(
    request: pytest.FixtureRequest,
) -> None:
    device.run_on(request.config, ["tests/test_contract.py", "-k", MORE])
    device.run_on(request.config, [__file__, "-k", "every_case"])


@pytest.mark.usefixtures("on_pretended")
def test_it_refuses_what_a_device_refuses() -> None:
    values = torch.ones(3)
    elsewhere = torch.ones(3, device="cpu")
    assert values.device.type == pretended.NAME
    with pytest.raises(RuntimeError, match="all tensors must be on pretended"):
        values + elsewhere
    with pytest.raises(RuntimeError, match="generator must be on pretended"):
        torch.randn(3, generator=torch.Generator("cpu"))
    with pytest.raises(RuntimeError, match="numpy"):
        values.numpy()
    torch.testing.assert_close(values.cpu(), elsewhere)
    assert torch.randn(3, generator=device.generator(0)).device.type == pretended.NAME


@pytest.mark.usefixtures("on_pretended")
def test_a_network_is_checked_where_it_is() -> None:
    net = LipschitzMLP(3, [8])
    testing.check_linearization(net, torch.randn(4, 3))
    assert testing.check_lipschitz(net, torch.randn(4, 3), net.lipschitz_bound(), num_steps=2) < 1


class OnTheCPU(transforms.ActNorm):
    """Makes a tensor without naming the device of its inputs."""

    def forward(self, inputs: torch.Tensor, context: Any = None) -> Any:
        outputs, logabsdet = super().forward(inputs, context)
        return outputs + torch.zeros(inputs.shape[1], device="cpu").double(), logabsdet


@pytest.mark.usefixtures("on_pretended")
def test_a_tensor_that_is_made_elsewhere_is_seen() -> None:
    with pytest.raises(AssertionError, match="must be on pretended"):
        testing.check_transform(OnTheCPU(3), torch.randn(4, 3), clauses=("round_trip",))


@pytest.mark.usefixtures("on_pretended")
def test_rows_to_start_from_are_moved_to_the_weights() -> None:
    for rows in (torch.randn(200, 3), torch.randn(200, 3, device="cpu")):
        flow, norm = ResidualFlow(3, 8, 1), transforms.ActNorm(3)
        flow.initialize(100 * rows)
        norm.initialize(100 * rows)
        assert bool(flow.log_prob(torch.zeros(1, 3)).isfinite())
        for part in (norm, *(each for each in flow.modules() if isinstance(each, type(norm)))):
            assert bool(part.initialized)
        assert float(norm.log_scale.max()) < -4


@pytest.mark.usefixtures("on_pretended")
@pytest.mark.parametrize("name", CASES)
def test_every_case_computes_where_its_tensors_are(name: str) -> None:
    """Whatever the default device is: it is the CPU here, as it is for most users."""
    case, where = CASES[name], device.current()
    with torch.device("cpu"):
        transform, inputs, context = case.factory(), case.inputs(), case.context()
        transform = transform.to(where)
        conditions = None if context is None else context.to(where)
        clauses = ("round_trip", "every_parameter_learns", "same_seed_negates")
        testing.check_transform(transform, inputs.to(where), conditions, clauses=clauses)
        if hasattr(getattr(transform, "net", None), "lipschitz_bound"):
            net: Any = transform.net
            assert net.lipschitz_bound() < 1


@pytest.mark.usefixtures("on_pretended")
@pytest.mark.parametrize("clause", testing.CLAUSES)
def test_every_clause_is_checked_where_the_tensors_are(clause: str) -> None:
    where = device.current()
    with torch.device("cpu"):
        affine = transforms.ConditionalAffine(3, 2).to(where)
        inputs, context = torch.randn(4, 3).to(where), torch.randn(4, 2).to(where)
        testing.check_transform(affine, inputs, context, clauses=(clause,))
        block = transforms.ResidualTransform(LipschitzMLP(3, [4])).to(where)
        testing.check_transform(block, inputs, clauses=(clause,))


# --- the check of the contract --------------------------------------------------------------------


def test_a_check_leaves_the_generators_as_they_were() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    testing.check_transform(transforms.ActNorm(3), torch.zeros(4, 3), clauses=("round_trip",))
    torch.testing.assert_close(torch.randn(3), expected, rtol=0, atol=0)


# --- the example ----------------------------------------------------------------------------------


@pytest.fixture
def example() -> Any:
    specification = importlib.util.spec_from_file_location("gpu_example", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def test_what_fails_and_what_comes_too_late_are_rows_of_the_table(
    example: Any, tmp_path: Path
) -> None:
    run = example.Run(torch.device("cpu"), example.QUICK, tmp_path, minutes=1)
    run.measure("step", "good", "ms", lambda: (1.5, "a | b"))
    run.measure("step", "bad", "ms", lambda: nn.Linear(2, 2)(torch.zeros(3)))
    run.minutes = 0
    run.measure("step", "late", "ms", lambda: 1.0)
    run.write()
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["value"] for row in rows] == [1.5, None, None]
    assert "RuntimeError" in rows[1]["note"]
    assert rows[2]["note"] == "no time was left"
    table = (tmp_path / "gpu.md").read_text()
    assert "| step | good | 1.5 | ms | a / b |" in table
    assert all(line.count("|") == 6 for line in table.splitlines() if line.startswith("|"))


def test_settings_of_tensor_float_32_are_restored_after_an_error(example: Any) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), example.tensor_float_32(not before[1]):
        1 // int(torch.backends.cudnn.allow_tf32 is before[1])
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.slow
def test_the_example_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {"step", "images", "round trip", "samples", "waits"} == {row["section"] for row in rows}
    measured = {row["name"] for row in rows if row["value"] is not None}
    assert {"d=2, batch=32: ours", "eager, TF32 off"} <= measured
    errors = [row["value"] for row in rows if row["name"].startswith("vectors, d=64")]
    assert len(errors) == 2
    assert max(errors) < 1e-4
