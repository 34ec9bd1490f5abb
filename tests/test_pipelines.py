"""What pipelines do with a model: checkpoints, precision, function transforms, no waiting."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from nflows_iresnet import ResidualFlow, logdet
from nflows_iresnet.transforms import ResidualTransform


def bounds(flow: ResidualFlow) -> list[float]:
    blocks = [each for each in flow.modules() if isinstance(each, ResidualTransform)]
    return [block.lipschitz_bound() for block in blocks]


def trained_flow() -> ResidualFlow:
    torch.manual_seed(0)
    flow = ResidualFlow(3, 16, 2, context_features=2)
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    for _ in range(5):
        loss = -flow.log_prob(torch.randn(16, 3), torch.randn(16, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow


def stored(flow: ResidualFlow) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_checkpoint_loads_into_a_fresh_model_of_another_dtype(dtype: torch.dtype) -> None:
    flow = trained_flow()
    fresh = ResidualFlow(3, 16, 2, context_features=2).to(dtype)
    fresh.load_state_dict(stored(flow))
    assert bounds(fresh) == pytest.approx(bounds(flow), rel=1e-5)
    rows, context = torch.randn(4, 3), torch.randn(4, 2)
    actual = fresh.log_prob(rows.to(dtype), context.to(dtype))
    torch.testing.assert_close(actual.float(), flow.log_prob(rows, context), rtol=0, atol=1e-4)


def test_wrong_keys_give_the_errors_of_torch() -> None:
    state = stored(trained_flow())
    name, value = state.popitem()
    with pytest.raises(RuntimeError, match=r"Missing key.*" + name.split(".")[-1]):
        ResidualFlow(3, 16, 2, context_features=2).load_state_dict(state)
    flow = ResidualFlow(3, 16, 2, context_features=2)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        flow.load_state_dict(state | {name: value, "stranger": value})
    with pytest.raises(RuntimeError, match="size mismatch"):
        ResidualFlow(3, 17, 2, context_features=2).load_state_dict(state | {name: value})


def test_an_optimiser_state_resumes_to_the_same_numbers() -> None:
    def steps(flow: ResidualFlow, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            loss = -flow.log_prob(torch.ones(4, 2).double().cumsum(0)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    torch.manual_seed(0)
    whole = ResidualFlow(2, 8, 1).double()
    optimizer = torch.optim.Adam(whole.parameters())
    steps(whole, optimizer, 3)
    resumed = ResidualFlow(2, 8, 1).double()
    resumed.load_state_dict(stored(whole))
    continued = torch.optim.Adam(resumed.parameters())
    continued.load_state_dict(deepcopy(optimizer.state_dict()))
    for flow, each in ((whole, optimizer), (resumed, continued)):
        steps(flow, each, 3)
    for left, right in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimator", [logdet.Exact(), logdet.PowerSeries(num_terms=3)])
def test_a_training_step_never_waits_for_the_device(
    estimator: logdet.LogDetEstimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value of a tensor is asked for in forward and backward of a flow that has started.

    Three questions are asked on the CPU alone, where nothing waits; they are left out here.
    """
    monkeypatch.setattr("nflows_iresnet.precision.require_finite_rows", lambda name, rows: None)
    monkeypatch.setattr("nflows_iresnet.nn.layers._check_finite", lambda norms: None)
    monkeypatch.setattr("nflows_iresnet.logdet.power_series._is_negligible", lambda power: False)
    flow = ResidualFlow(4, 16, 2, estimator=estimator)
    rows = torch.randn(8, 4)
    flow.log_prob(rows)

    def refuse(name: str) -> Callable[[Tensor], Any]:
        def method(tensor: Tensor, *_: Any) -> Any:
            raise AssertionError(f"Tensor.{name} was called")

        return method

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, refuse(name))
    flow.log_prob(rows).sum().backward()


def test_autocast_keeps_the_numbers_of_single_precision() -> None:
    flow = trained_flow()
    rows, context = torch.randn(32, 3), torch.randn(32, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob = flow.log_prob(rows, context)
        samples = flow.sample(2, context)
    assert log_prob.dtype == samples.dtype == torch.float32
    torch.testing.assert_close(log_prob, flow.log_prob(rows, context), rtol=0, atol=1e-4)


def test_per_sample_gradients_by_vmap() -> None:
    """torch.func.vmap(grad(...)) over rows equals one backward pass per row."""
    flow = ResidualFlow(3, 8, 1).double().eval()
    parameters = dict(flow.named_parameters())
    rows = torch.randn(4, 3, dtype=torch.float64)

    class LogProb(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, row: Tensor) -> Tensor:
            values: Tensor = self.flow.log_prob(row[None])
            return values.sum()

    def log_prob(state: dict[str, Tensor], row: Tensor) -> Tensor:
        named = {f"flow.{name}": value for name, value in state.items()}
        value: Tensor = torch.func.functional_call(LogProb(), named, (row,))
        return value

    gradients = torch.func.vmap(torch.func.grad(log_prob), (None, 0))(parameters, rows)
    for index, row in enumerate(rows):
        flow.zero_grad()
        flow.log_prob(row[None]).sum().backward()
        for name, parameter in flow.named_parameters():
            torch.testing.assert_close(gradients[name][index], parameter.grad)
