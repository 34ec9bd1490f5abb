"""Training steps as true CUDA graphs: `pytest --device cuda`; elsewhere an emulation is tested.

`tests/test_graphs.py` has the same claims on an emulation of CUDA graphs, and those that need
faults planted in it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nflows.flows import MaskedAutoregressiveFlow
from nflows.flows.base import Flow as NflowsFlow
from nflows.transforms import CompositeTransform
from torch import Tensor, nn

from nflows_iresnet import flows, logdet, transforms
from nflows_iresnet import nn as lipschitz_nn
from nflows_iresnet.classifiers import InvertibleClassifier
from nflows_iresnet.graphs import GraphedStep, NotCapturedWarning
from tests import device


@pytest.fixture(autouse=True)
def on_cuda() -> None:
    if device.current().type != "cuda":
        pytest.skip("CUDA graphs need CUDA: pytest --device cuda")


def tabular(features: int) -> NflowsFlow:
    layers: list[nn.Module] = [
        transforms.ActNorm(features),
        transforms.ElementwiseRationalQuadraticSpline(features, 8, initialization="quantiles"),
        transforms.LinearTransform(features, initialization="whitening"),
    ]
    for _ in range(2):
        net = lipschitz_nn.LipschitzMLP(features, [16, 16])
        layers += [transforms.LinearTransform(features), transforms.ResidualTransform(net)]
    return flows.Flow(CompositeTransform(layers), flows.StandardNormal([features]))


def monotone() -> NflowsFlow:
    block = transforms.MonotoneTransform(lipschitz_nn.LipschitzMLP(4, [16, 16]))
    return flows.Flow(block, flows.StandardNormal([4]))


def vectors(features: int, rows: int = 64) -> Callable[[], Tensor]:
    return lambda: torch.randn(rows, features)


def pixels(*shape: int) -> Callable[[], Tensor]:
    return lambda: 256 * torch.rand(8, *shape)


SERIES = logdet.PowerSeries(num_terms=4)
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "exact": (lambda: flows.ResidualFlow(2, 16, 2), vectors(2)),
    "roulette": (lambda: flows.ResidualFlow(8, 16, 2), vectors(8)),
    "series": (lambda: flows.ResidualFlow(8, 16, 2, estimator=SERIES), vectors(8)),
    "krylov": (lambda: flows.ResidualFlow(8, 16, 2, estimator=logdet.Krylov()), vectors(8)),
    "wide": (lambda: flows.ResidualFlow(300, 300, 1, estimator=SERIES), vectors(300)),
    "paper": (lambda: flows.InvertibleResNet(4, 16, 2), vectors(4)),
    "dense": (lambda: flows.ResidualFlow(4, 16, 2, net=lipschitz_nn.LipschitzDenseNet), vectors(4)),
    "tabular": (lambda: tabular(10), vectors(10)),
    "images": (
        lambda: flows.ImageResidualFlow((1, 8, 8), 8, 1, estimator=SERIES),
        pixels(1, 8, 8),
    ),
    "images, roulette": (lambda: flows.ImageResidualFlow((1, 8, 8), 8, 1), pixels(1, 8, 8)),
    "maf": (lambda: MaskedAutoregressiveFlow(4, 16, 2, 2), vectors(4)),
}


def adam(model: nn.Module, rate: float = 1e-3) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=rate, capturable=True, foreach=True)


def made(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    build, draw = MODELS[name]
    model = build().train()
    return model, draw()


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_captured_and_trains(name: str) -> None:
    model, batch = made(name)
    step = GraphedStep(model, adam(model), batch, max_grad_norm=10.0)
    assert step.is_captured, step.reason
    losses = torch.stack([step(batch) for _ in range(40)])
    assert step.is_captured, step.reason
    assert bool(losses.isfinite().all())
    assert losses[-10:].mean() < losses[:10].mean()


@pytest.mark.parametrize("name", ["exact", "series", "wide", "dense", "images", "maf"])
def test_replays_are_the_steps_of_an_eager_loop_at_the_same_seed(name: str) -> None:
    model, batch = made(name)
    step = GraphedStep(model, adam(model), batch)
    other = copy.deepcopy(model)
    optimizer = adam(other)
    torch.manual_seed(1)
    losses = [float(step(batch)) for _ in range(8)]
    torch.manual_seed(1)
    eager = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = -other.log_prob(batch).mean()
        loss.backward()
        optimizer.step()
        eager.append(float(loss))
    assert step.is_captured, step.reason
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(eager), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["roulette", "krylov", "images, roulette"])
def test_replays_draw_anew_and_are_unbiased(name: str) -> None:
    model, batch = made(name)
    step = GraphedStep(model, adam(model, rate=0.0), batch)
    losses = torch.stack([step(batch) for _ in range(400)]).double()
    assert step.is_captured, step.reason
    with torch.no_grad(), transforms.using(model, estimator=logdet.Exact()):
        expected = -model.log_prob(batch).mean()
    error = float(losses.std()) / math.sqrt(len(losses))
    assert error > 0
    assert abs(float(losses.mean() - expected)) < 5 * error + 1e-4 * abs(float(expected))


def test_a_captured_step_never_waits_for_the_device() -> None:
    model, batch = made("exact")
    step = GraphedStep(model, adam(model), batch)
    step(batch), step(batch)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_schedule_is_followed() -> None:
    model, batch = made("exact")
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 3))
    step = GraphedStep(model, optimizer, batch)
    for _ in range(3):
        step(batch)
        schedule.step()
    before = [each.clone() for each in model.parameters()]
    step(batch)
    assert step.is_captured, step.reason
    for mine, its in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)


def test_other_batches_run_eagerly_and_the_model_can_be_evaluated_between() -> None:
    model, batch = made("roulette")
    step = GraphedStep(model, adam(model), batch)
    for _ in range(3):
        step(batch)
    with pytest.warns(NotCapturedWarning, match="was captured for"):
        step(batch[:10])
    model.eval()
    with torch.no_grad():
        density, samples = model.log_prob(batch), model.sample(16)
    model.train()
    assert bool(density.isfinite().all() & samples.isfinite().all())
    assert math.isfinite(float(step(batch)))
    assert step.reason is None


def test_what_cannot_be_captured_runs_eagerly_and_leaves_the_device_as_it_was() -> None:
    model, batch = made("exact")

    def loss(flow: Any, rows: Tensor) -> Tensor:
        value: Tensor = -flow.log_prob(rows).mean()
        return value * (1.0 if float(value) > -1e9 else 0.0)

    with pytest.warns(NotCapturedWarning):
        step = GraphedStep(model, adam(model), batch, loss=loss)
    assert not step.is_captured
    assert math.isfinite(float(step(batch)))
    again, _ = made("exact")
    assert GraphedStep(again, adam(again), batch).is_captured
    torch.randn(3)


def test_a_block_whose_forward_is_solved_for_runs_eagerly_and_is_named() -> None:
    """The host looks at the residual of the solver."""
    torch.manual_seed(0)
    model, batch = monotone(), torch.randn(16, 4)
    with pytest.warns(NotCapturedWarning, match="MonotoneTransform"):
        step = GraphedStep(model, adam(model), batch)
    assert math.isfinite(float(step(batch)))


def test_steps_with_a_context_are_captured() -> None:
    torch.manual_seed(0)
    model = flows.ResidualFlow(2, 16, 2, context_features=3)
    batch, context = torch.randn(32, 2), torch.randn(32, 3)
    step = GraphedStep(model, adam(model), batch, context=context)
    first = float(step(batch, context))
    for _ in range(40):
        last = float(step(batch, context))
    assert step.is_captured, step.reason
    assert last < first


def test_a_classifier_is_captured() -> None:
    torch.manual_seed(0)
    model = InvertibleClassifier((1, 8, 8), 3, hidden_channels=8, num_blocks=1)
    images, labels = 255 * torch.rand(8, 1, 8, 8), torch.arange(8) % 3

    def loss(classifier: Any, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(classifier(rows), labels)

    step = GraphedStep(model, adam(model), images, loss=loss)
    assert step.is_captured, step.reason
    losses = [float(step(images)) for _ in range(20)]
    assert losses[-1] < losses[0]
