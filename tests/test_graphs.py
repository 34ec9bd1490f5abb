"""A training step as one graph, on an emulation of CUDA graphs (`tests/emulated_graph.py`)."""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    CompositeTransform,
    LULinear,
    PiecewiseRationalQuadraticCouplingTransform,
)
from torch import Tensor, nn

from nflows_iresnet import ResidualFlow, ResidualTransform, graphs, logdet
from nflows_iresnet.constants import made_once
from nflows_iresnet.flows import ImageResidualFlow
from nflows_iresnet.flows.base import Flow, StandardNormal
from nflows_iresnet.graphs import GraphedStep, NotCapturedWarning, graph_length
from nflows_iresnet.linearization import held_by_graphs
from nflows_iresnet.logdet import TermPlan
from nflows_iresnet.logdet.plan import planned_weights
from nflows_iresnet.precision import allow_tf32_in_training
from tests.cases import FixedLinear
from tests.emulated_graph import EmulatedRecorder, recorder, use
from tests.planted.logdet import Unweighted

__all__ = ["recorder"]

Optimizer = torch.optim.Optimizer


def rows(count: int = 12, features: int = 2, batch: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (count, batch, features)
    return list(2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1)


def make_flow(features: int = 2, **options: Any) -> ResidualFlow:
    torch.manual_seed(0)
    return ResidualFlow(features, 8, 2, **options).double()


def adam(flow: nn.Module, *, capturable: bool = True) -> torch.optim.Adam:
    return torch.optim.Adam(flow.parameters(), lr=1e-2, capturable=capturable, foreach=True)


def ordinary(flow: Any, optimizer: Optimizer, batch: Tensor, norm: float | None = None) -> Tensor:
    """What `GraphedStep` stands for, as anybody would write it."""
    optimizer.zero_grad()
    loss: Tensor = -flow.log_prob(batch).mean()
    loss.backward()
    if norm is not None:
        nn.utils.clip_grad_norm_(flow.parameters(), norm)
    optimizer.step()
    return loss.detach()


def assert_same_state(flow: nn.Module, other: nn.Module) -> None:
    for mine, its in zip(flow.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-5)


ESTIMATORS = {
    "exact": logdet.Exact(),
    "series": logdet.PowerSeries(num_terms=4),
    "gaussian": logdet.PowerSeries(num_terms=3, probe=logdet.Gaussian(), exact_trace=False),
}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_replays_are_the_steps_of_an_ordinary_loop_at_the_same_seed(
    recorder: EmulatedRecorder, estimator: logdet.LogDetEstimator
) -> None:
    flow = make_flow(4, estimator=estimator)
    other, batches = copy.deepcopy(flow), rows(features=4)
    optimizer, its_optimizer = adam(flow), adam(other, capturable=False)
    step = GraphedStep(flow, optimizer, batches[0], max_grad_norm=0.5)
    assert step.is_captured
    assert step.reason is None
    assert recorder.captures == 1
    torch.manual_seed(1)
    losses = [step(batch) for batch in batches]
    torch.manual_seed(1)
    expected = [ordinary(other, its_optimizer, batch, 0.5) for batch in batches]
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert_same_state(flow, other)
    assert recorder.replays == len(batches)  # the check, and all but the first


def test_the_constructor_trains_nothing_and_leaves_the_generators(
    recorder: EmulatedRecorder,
) -> None:
    flow, batches = make_flow(8), rows(features=8)
    optimizer = adam(flow)
    ordinary(flow, optimizer, batches[0])
    weights, state = (
        copy.deepcopy(flow.state_dict()),
        copy.deepcopy(optimizer.state_dict()["state"]),
    )
    places = [each.data_ptr() for each in flow.parameters()]
    torch.manual_seed(7)
    np.random.seed(7)
    step = GraphedStep(flow, optimizer, batches[1])
    assert step.is_captured
    drawn = torch.rand(3), np.random.rand()
    torch.manual_seed(7)
    np.random.seed(7)
    assert torch.equal(drawn[0], torch.rand(3))
    assert drawn[1] == np.random.rand()
    for name, value in flow.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            assert torch.equal(value, state[index][name])
    assert places == [each.data_ptr() for each in flow.parameters()]


def test_a_fresh_optimizer_has_no_state_until_the_first_step(recorder: EmulatedRecorder) -> None:
    flow, batches = make_flow(), rows()
    optimizer = adam(flow)
    step = GraphedStep(flow, optimizer, batches[0])
    assert not optimizer.state
    assert step.is_captured
    step(batches[0])
    state = optimizer.state[next(iter(flow.parameters()))]
    assert float(state["step"]) == 1
    step(batches[1])
    assert float(state["step"]) == 2


class Counting(nn.Module):
    """A model that counts the batches it has seen."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def log_prob(self, inputs: Tensor) -> Tensor:
        self.seen += 1
        return -(inputs - self.shift).square().sum(1)


def test_layers_start_from_the_first_batch_but_running_statistics_are_not_counted_twice(
    recorder: EmulatedRecorder,
) -> None:
    flow, other, batches = make_flow(), make_flow(), rows()
    GraphedStep(flow, adam(flow), batches[0])
    other.log_prob(batches[0])
    assert_same_state(flow, other)
    counting = Counting()
    step = GraphedStep(counting, torch.optim.SGD(counting.parameters(), 0.1), batches[0])
    assert step.is_captured
    assert float(counting.seen) == 0
    for batch in batches[:3]:
        step(batch)
    assert float(counting.seen) == 3


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda it: torch.optim.lr_scheduler.StepLR(it, 3, 0.3),
    "cosine": lambda it: torch.optim.lr_scheduler.CosineAnnealingLR(it, 12),
    "warm-up": lambda it: torch.optim.lr_scheduler.LambdaLR(it, lambda n: min(1.0, n / 5)),
    "one-cycle": lambda it: torch.optim.lr_scheduler.OneCycleLR(it, 0.05, 12, cycle_momentum=False),
    "sequence": lambda it: torch.optim.lr_scheduler.SequentialLR(
        it,
        [
            torch.optim.lr_scheduler.LinearLR(it, 0.1, 1.0, 4),
            torch.optim.lr_scheduler.ExponentialLR(it, 0.8),
        ],
        [4],
    ),
}


@pytest.mark.parametrize("is_early", [True, False], ids=["made-before", "made-after"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_change_what_is_replayed(
    recorder: EmulatedRecorder, schedule: Callable[[Optimizer], Any], is_early: bool
) -> None:
    flow, other, batches = make_flow(), make_flow(), rows()
    optimizer, its_optimizer = adam(flow), adam(other, capturable=False)
    early = schedule(optimizer) if is_early else None
    step = GraphedStep(flow, optimizer, batches[0])
    scheduler, its_scheduler = early or schedule(optimizer), schedule(its_optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for batch in batches:
            step(batch)
            scheduler.step()
    for batch in batches:
        ordinary(other, its_optimizer, batch)
        its_scheduler.step()
    assert step.reason is None
    assert recorder.replays == len(batches)
    assert_same_state(flow, other)


def test_a_learning_rate_that_is_assigned_is_replayed(recorder: EmulatedRecorder) -> None:
    flow, other, batches = make_flow(), make_flow(), rows()
    optimizer, its_optimizer = adam(flow), adam(other, capturable=False)
    step = GraphedStep(flow, optimizer, batches[0])
    for index, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = its_optimizer.param_groups[0]["lr"] = 0.01 / (1 + index)
        step(batch)
        ordinary(other, its_optimizer, batch)
    assert_same_state(flow, other)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_sgd_needs_no_flag_and_its_first_step_is_its_own(
    recorder: EmulatedRecorder, dampening: float
) -> None:
    flow, other, batches = make_flow(), make_flow(), rows()
    optimizer, its_optimizer = (
        torch.optim.SGD(each.parameters(), 0.01, momentum=0.9, dampening=dampening)
        for each in (flow, other)
    )
    step = GraphedStep(flow, optimizer, batches[0])
    for index, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = its_optimizer.param_groups[0]["lr"] = 0.01 / (1 + index)
        step(batch)
        ordinary(other, its_optimizer, batch)
    assert step.is_captured
    assert recorder.replays == len(batches)
    assert_same_state(flow, other)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda each: torch.optim.Adam(each), r"Adam\(..., capturable=True\)"),
        (lambda each: torch.optim.AdamW(each), r"AdamW\(..., capturable=True\)"),
        (lambda each: torch.optim.Adagrad(each), "Adagrad .* no option `capturable`"),
        (lambda each: torch.optim.LBFGS(each), "LBFGS .* no option `capturable`"),
    ],
)
def test_an_optimizer_that_cannot_be_captured_is_refused_by_name(
    recorder: EmulatedRecorder, make: Callable[[Any], Optimizer], remedy: str
) -> None:
    flow = make_flow()
    with pytest.raises(ValueError, match=remedy):
        GraphedStep(flow, make(list(flow.parameters())), rows()[0])


def test_what_a_graph_does_not_serve_runs_eagerly_and_says_once_why(
    recorder: EmulatedRecorder,
) -> None:
    flow, batches = make_flow(), rows()
    optimizer = adam(flow)
    step = GraphedStep(flow, optimizer, batches[0])
    step(batches[0])
    with pytest.warns(NotCapturedWarning, match=r"\(5, 2\)"):
        step(batches[1][:5])
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotCapturedWarning)
        step(batches[1][:7])
    assert step.reason is not None
    assert "(7, 2)" in step.reason
    step(batches[2])
    assert step.reason is None
    assert step.is_captured
    flow.eval()
    with pytest.warns(NotCapturedWarning, match="evaluation mode"):
        step(batches[3])
    flow.train()
    optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    with pytest.warns(NotCapturedWarning, match="betas changed"):
        step(batches[4])
    assert float(optimizer.state[next(iter(flow.parameters()))]["step"]) == 6


def test_the_mode_of_a_part_is_that_of_its_capture(recorder: EmulatedRecorder) -> None:
    """As that of an embedding whose batch normalisation is frozen."""
    flow, batch = make_flow(), rows()[0]
    step = GraphedStep(flow, adam(flow), batch)
    step(batch)
    step(batch)
    assert step.is_captured
    next(flow.children()).eval()
    with pytest.warns(NotCapturedWarning, match="a part of the model is in evaluation mode"):
        step(batch)


def test_the_learning_rate_is_given_back_where_nothing_is_captured(
    recorder: EmulatedRecorder,
) -> None:
    flow = Flow(CompositeTransform([LULinear(3)]), StandardNormal([3])).double()
    optimizer = adam(flow)
    with pytest.warns(NotCapturedWarning):
        GraphedStep(flow, optimizer, rows(features=3)[0])
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert not optimizer.state


def test_a_transform_that_copies_from_the_host_is_named(recorder: EmulatedRecorder) -> None:
    block = ResidualTransform(FixedLinear(3, 0.5).double())
    flow = Flow(CompositeTransform([block, LULinear(3)]), StandardNormal([3])).double()
    with pytest.warns(NotCapturedWarning, match=r"_transform._transforms.1 \(LULinear\)"):
        step = GraphedStep(flow, adam(flow, capturable=True), rows(features=3)[0])
    assert not step.is_captured
    assert "LULinear" in str(step.reason)


class _RefusedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        if torch.utils._python_dispatch._get_current_dispatch_mode_stack():
            raise RuntimeError("would make the legacy stream depend on a capturing stream")
        return cotangent


def _refused_in_the_backward(flow: Any, batch: Tensor) -> Tensor:
    loss: Tensor = _RefusedBackward.apply(-flow.log_prob(batch).mean())
    return loss


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_graph_that_is_kept_from_an_earlier_pass_is_named(
    recorder: EmulatedRecorder, is_kept: bool
) -> None:
    """On a GPU its nodes belong to another stream than the capture."""
    flow, batch = make_flow(), rows()[0]
    kept = -flow.log_prob(batch).mean()
    if not is_kept:
        del kept
    with pytest.warns(NotCapturedWarning, match="the backward pass cannot be part") as said:
        GraphedStep(flow, adam(flow), batch, loss=_refused_in_the_backward)
    count = sum(1 for _ in flow.parameters())
    remedy = f"of an earlier pass is alive, with {count} parameters"
    assert (remedy in str(said[0].message)) == is_kept


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_step_that_is_made_where_nothing_is_recorded_is_an_error_of_torch(
    without_gradients: Callable[[], Any],
) -> None:
    flow, batch = make_flow(), rows()[0]
    with without_gradients(), pytest.raises(RuntimeError, match="does not require grad"):
        GraphedStep(flow, adam(flow), batch)


class DrawsOnTheHost(Counting):
    def log_prob(self, inputs: Tensor) -> Tensor:
        return super().log_prob(inputs) * (1 + np.random.rand())


def test_splines_of_nflows_wait_and_are_named(recorder: EmulatedRecorder) -> None:
    spline = PiecewiseRationalQuadraticCouplingTransform(
        [1, 0, 1], lambda inputs, outputs: ResidualNet(inputs, outputs, 4), tails="linear"
    )
    flow = Flow(CompositeTransform([spline]), StandardNormal([3])).double()
    with pytest.warns(NotCapturedWarning, match=r"\(PiecewiseRationalQuadraticCouplingTransform\)"):
        GraphedStep(flow, adam(flow), rows(features=3)[0])


def test_a_step_that_draws_on_the_host_is_not_captured(recorder: EmulatedRecorder) -> None:
    flow = DrawsOnTheHost()
    with pytest.warns(NotCapturedWarning, match=r"numpy\.random"):
        step = GraphedStep(flow, torch.optim.SGD(flow.parameters(), 0.1), rows()[0])
    assert not step.is_captured


def test_recomputed_activations_are_not_captured_and_named(recorder: EmulatedRecorder) -> None:
    flow = make_flow(recompute=True)
    with pytest.warns(NotCapturedWarning, match="recompute=False"):
        step = GraphedStep(flow, adam(flow, capturable=True), rows()[0])
    assert not step.is_captured


@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_a_replay_that_differs_from_an_eager_step_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    flow = make_flow()

    def distort() -> None:
        for each in flow.parameters():
            if each.grad is not None:
                each.grad.mul_(1.1)

    emulated = EmulatedRecorder(distort if what == "gradients" else None)
    use(emulated, monkeypatch)
    calls: list[int] = []

    def loss(flow: Any, batch: Tensor) -> Tensor:
        calls.append(1)
        offset = len(calls) if what == "loss" else 0
        mean: Tensor = -flow.log_prob(batch).mean()
        return mean + float(offset)

    with pytest.warns(NotCapturedWarning, match="first replay gave the loss .* eager step"):
        step = GraphedStep(flow, adam(flow), rows()[0], loss=loss)
    assert not step.is_captured


def test_a_replay_is_not_trusted_where_the_eager_step_was_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flow, batches = make_flow(), rows()

    def distort() -> None:
        for each in flow.parameters():
            if each.grad is not None:
                each.grad.mul_(1.1)

    use(EmulatedRecorder(distort), monkeypatch)
    scale = torch.tensor(torch.nan)

    def loss(flow: Any, batch: Tensor) -> Tensor:
        return -flow.log_prob(batch).mean() * scale

    step = GraphedStep(flow, adam(flow), batches[0], loss=loss)
    scale.fill_(1.0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for batch in batches:
            step(batch)
    assert any("first replay gave the loss" in str(each.message) for each in found)
    assert not step.is_captured


def test_loaded_states_are_replayed(recorder: EmulatedRecorder) -> None:
    flow, batches = make_flow(), rows()
    optimizer = adam(flow)
    step = GraphedStep(flow, optimizer, batches[0])
    for batch in batches[:4]:
        step(batch)
    kept = copy.deepcopy((flow.state_dict(), optimizer.state_dict()))
    expected = torch.stack([step(batch) for batch in batches[4:8]])
    flow.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    found = torch.stack([step(batch) for batch in batches[4:8]])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert recorder.captures == 1
    assert step.reason is None


def test_parameters_that_are_replaced_or_frozen_are_captured_anew(
    recorder: EmulatedRecorder,
) -> None:
    flow, batches = make_flow(), rows()
    step = GraphedStep(flow, torch.optim.SGD(flow.parameters(), 0.01), batches[0])
    first = next(iter(flow.parameters()))
    first.data = first.data.clone()
    before = first.detach().clone()
    step(batches[0])
    assert recorder.captures == 2
    assert not torch.equal(first, before)
    first.requires_grad_(False)
    before = first.detach().clone()
    step(batches[1])
    assert recorder.captures == 3
    assert torch.equal(first, before)


def test_gradients_may_be_dropped_and_losses_kept(recorder: EmulatedRecorder) -> None:
    flow, other, batches = make_flow(), make_flow(), rows()
    optimizer, its_optimizer = adam(flow), adam(other, capturable=False)
    step = GraphedStep(flow, optimizer, batches[0])
    losses = []
    for batch in batches:
        losses.append(step(batch))
        ordinary(other, its_optimizer, batch)
        for mine, its in zip(flow.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-2, atol=1e-4)
        optimizer.zero_grad(set_to_none=True)
    assert len({float(loss) for loss in losses}) == len(batches)
    assert_same_state(flow, other)


def test_steps_with_a_context_read_it(recorder: EmulatedRecorder) -> None:
    flow = make_flow(context_features=3)
    other, batches = copy.deepcopy(flow), rows()
    contexts = rows(features=3)
    optimizer, its_optimizer = adam(flow), adam(other, capturable=False)
    step = GraphedStep(flow, optimizer, batches[0], context=contexts[0])
    for batch, context in zip(batches, contexts, strict=True):
        loss = step(batch, context)
        its_optimizer.zero_grad()
        expected = -other.log_prob(batch, context).mean()
        expected.backward()
        its_optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert recorder.replays == len(batches)


def test_mistakes_of_the_loss_are_errors(recorder: EmulatedRecorder) -> None:
    flow, batch = make_flow(), rows()[0]
    with pytest.raises(ValueError, match=r"scalar, got shape \(16,\)"):
        GraphedStep(flow, adam(flow), batch, loss=lambda flow, batch: -flow.log_prob(batch))
    with pytest.raises(ValueError, match="max_grad_norm must be positive"):
        GraphedStep(flow, adam(flow), batch, max_grad_norm=0.0)
    flow.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is to be trained"):
        GraphedStep(flow, adam(flow), batch)


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_no_graph_is_alive_when_a_step_is_captured(
    recorder: EmulatedRecorder, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On a GPU its nodes would belong to the stream of an earlier pass, which cannot wait."""
    torch.manual_seed(0)
    flow = ResidualFlow(8, 8, 2) if kind == "vectors" else ImageResidualFlow((1, 8, 8), 4, 1)
    batch = torch.rand(6, 8) if kind == "vectors" else torch.rand(6, 1, 8, 8)
    alive, capture = [], recorder.capture

    def watched(body: graphs.Body) -> graphs.Body:
        alive.append(held_by_graphs(list(flow.parameters())))
        return capture(body)

    monkeypatch.setattr(recorder, "capture", watched)
    GraphedStep(flow, torch.optim.Adam(flow.parameters(), 1e-3, capturable=True), batch)
    assert alive == [0]


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_flows_with_their_defaults_are_captured(recorder: EmulatedRecorder, kind: str) -> None:
    torch.manual_seed(0)
    flow = ResidualFlow(8, 8, 2) if kind == "vectors" else ImageResidualFlow((1, 8, 8), 4, 1)
    batch = torch.rand(6, 8) if kind == "vectors" else torch.rand(6, 1, 8, 8)
    other = copy.deepcopy(flow)
    other.log_prob(batch)
    step = GraphedStep(flow, torch.optim.Adam(flow.parameters(), 1e-3, capturable=True), batch)
    assert step.is_captured, step.reason
    its_optimizer = torch.optim.Adam(other.parameters(), 1e-3)
    losses = [float(step(batch)) for _ in range(20)]
    expected = [float(ordinary(other, its_optimizer, batch)) for _ in range(20)]
    assert recorder.replays > 8
    assert losses[-1] == pytest.approx(expected[-1], abs=0.5 * abs(expected[-1] - expected[0]))


def test_on_a_cpu_it_is_the_ordinary_step() -> None:
    flow, other, batches = make_flow(8), make_flow(8), rows(features=8)
    optimizer, its_optimizer = adam(flow, capturable=False), adam(other, capturable=False)
    step = GraphedStep(flow, optimizer, batches[0], max_grad_norm=1.0)
    assert not step.is_captured
    assert "cpu" in str(step.reason)
    torch.manual_seed(1)
    losses = [float(step(batch)) for batch in batches]
    torch.manual_seed(1)
    assert losses == [float(ordinary(other, its_optimizer, batch, 1.0)) for batch in batches]


@pytest.mark.parametrize(
    ("num_terms", "length"),
    [(0, 0), (1, 1), (8, 8), (9, 12), (12, 12), (13, 16), (17, 24), (25, 32), (33, 48), (49, 64)],
)
def test_the_length_of_a_graph_is_at_least_that_of_the_series(num_terms: int, length: int) -> None:
    assert graph_length(num_terms) == length


def linear_flow(estimator: logdet.LogDetEstimator) -> Flow:
    """A flow whose Jacobians are large enough that wrong weights show."""
    blocks = []
    for _ in range(3):
        net = FixedLinear(3, 0.8)
        net.weight.data = 0.5 * (net.weight.data + 0.8 * torch.eye(3))
        blocks.append(ResidualTransform(net, estimator=estimator))
    return Flow(CompositeTransform(blocks), StandardNormal([3])).double()


def deviations(roulette: logdet.LogDetEstimator, steps: int = 600) -> list[float]:
    """How many standard errors the means of loss and gradients over replays are off."""
    flow, batch = linear_flow(roulette), rows(features=3, batch=2)[0]
    exact = linear_flow(logdet.Exact())
    expected = -exact.log_prob(batch).mean()
    expected.backward()
    wanted = [expected.item(), *(float(each.grad.sum()) for each in exact.parameters())]
    step = GraphedStep(flow, torch.optim.SGD(flow.parameters(), 0.0), batch)
    assert step.is_captured
    torch.manual_seed(5)
    found = []
    for _ in range(steps):
        loss = float(step(batch))
        found.append([loss, *(float(each.grad.sum()) for each in flow.parameters())])
    values = torch.tensor(found, dtype=torch.float64)
    error = values.std(0) / steps**0.5
    return ((values.mean(0) - torch.tensor(wanted)) / error).abs().tolist()


ROULETTES = {
    "default": logdet.RussianRoulette(),
    "short": logdet.RussianRoulette(num_exact_terms=1),
    "two probes": logdet.RussianRoulette(num_exact_terms=1, num_probes=2),
    "automatic": logdet.Auto(max_exact_features=1),
    "fitted": logdet.Krylov(num_exact_terms=2, truncation=logdet.LipschitzTruncation(1.0)),
    "geometric": logdet.RussianRoulette(
        num_exact_terms=1, truncation=logdet.GeometricTruncation(0.85)
    ),
}


@pytest.mark.parametrize("roulette", ROULETTES.values(), ids=ROULETTES)
def test_replays_of_the_roulette_are_unbiased(
    recorder: EmulatedRecorder, roulette: logdet.LogDetEstimator
) -> None:
    assert max(deviations(roulette)) < 4.5
    assert recorder.replays > 500
    assert recorder.captures > 2


def test_a_replay_that_forgets_the_probability_is_seen(recorder: EmulatedRecorder) -> None:
    assert max(deviations(Unweighted(num_exact_terms=1))) > 9


def test_one_number_of_terms_for_ever_is_seen(
    recorder: EmulatedRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = TermPlan.draw

    def once(plan: TermPlan) -> int:
        return max(map(len, plan._drawn)) if plan._drawn else draw(plan)

    monkeypatch.setattr(TermPlan, "draw", once)
    roulette, steps = logdet.RussianRoulette(num_exact_terms=1), 300
    flow, batch = linear_flow(roulette), rows(features=3, batch=2)[0]
    expected = -linear_flow(logdet.Exact()).log_prob(batch).mean().item()
    step = GraphedStep(flow, torch.optim.SGD(flow.parameters(), 0.0), batch)
    losses = torch.stack([step(batch) for _ in range(steps)])
    assert abs(float(losses.mean()) - expected) > 9 * float(losses.std()) / steps**0.5


def losses_of_training(num_probes: int = 1, steps: int = 40) -> list[float]:
    """The losses of a flow that learns with the roulette, until a step gives its capture up."""
    roulette = logdet.RussianRoulette(num_exact_terms=1, num_probes=num_probes)
    flow, batches = linear_flow(roulette), rows(8, 3)
    optimizer = torch.optim.SGD(flow.parameters(), 0.01, momentum=0.9)
    step = GraphedStep(flow, optimizer, batches[0], max_grad_norm=1.0)
    torch.manual_seed(11)
    losses: list[float] = []
    while len(losses) < steps and step.is_captured:
        losses.append(float(step(batches[len(losses) % len(batches)])))
    return losses


def losses_without_replays(monkeypatch: pytest.MonkeyPatch, num_probes: int = 1) -> list[float]:
    """The same at lengths that are never met again, so that none is captured."""
    lengths, emulated = itertools.count(100), EmulatedRecorder()
    with monkeypatch.context() as patched:
        use(emulated, patched)
        patched.setattr(graphs, "graph_length", lambda num_terms: next(lengths))
        losses = losses_of_training(num_probes)
    assert emulated.replays == 1
    return losses


@pytest.mark.parametrize("num_probes", [1, 2])
def test_a_capture_between_steps_moves_neither_weights_nor_random_numbers(
    recorder: EmulatedRecorder, monkeypatch: pytest.MonkeyPatch, num_probes: int
) -> None:
    """With two probes, the weights of one length are not those of the next step."""
    expected = losses_without_replays(monkeypatch, num_probes)
    assert losses_of_training(num_probes) == pytest.approx(expected, rel=1e-6)
    assert recorder.captures > 1
    assert recorder.replays > 10


class FailsLater(EmulatedRecorder):
    """Captures one length; the second one fails while it is recorded, or when it is replayed."""

    def __init__(self, *, in_replay: bool) -> None:
        super().__init__()
        self._in_replay = in_replay

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        replay = super().capture(body)
        if self.captures == 1:
            return replay
        if not self._in_replay:
            raise RuntimeError("there is no memory left")

        def replay_twice() -> None:
            replay()
            replay()

        return replay_twice


@pytest.mark.parametrize("in_replay", [False, True])
def test_a_capture_that_fails_between_steps_moves_neither_weights_nor_random_numbers(
    monkeypatch: pytest.MonkeyPatch, *, in_replay: bool
) -> None:
    expected = losses_without_replays(monkeypatch)
    emulated = FailsLater(in_replay=in_replay)
    use(emulated, monkeypatch)
    with pytest.warns(NotCapturedWarning):
        found = losses_of_training()
    assert emulated.captures == 2
    assert 2 < len(found) < len(expected)
    assert found == pytest.approx(expected[: len(found)], rel=1e-6)


def test_blocks_share_a_random_number_and_probes_do_not() -> None:
    plan = TermPlan(torch.device("cpu"))
    roulette = logdet.RussianRoulette(num_probes=2, num_exact_terms=1)
    tight = logdet.RussianRoulette(num_probes=2, num_exact_terms=1, lipschitz=0.3)
    nets = [FixedLinear(3, 0.5).double() for _ in range(2)]
    batch = rows(features=3)[0]

    def step() -> None:
        for net, estimator in zip([*nets, nets[0]], [tight, tight, roulette], strict=True):
            estimator.estimate(net, batch)

    nets[0].lipschitz = nets[1].lipschitz = 0.95
    with plan.recording():
        step()
    assert plan.num_draws == 6
    together = []
    for _ in range(300):
        plan.draw()
        lengths = [len(each) for each in plan._drawn]
        assert lengths[0] == lengths[2] <= lengths[4]
        assert lengths[1] == lengths[3] <= lengths[5]
        together.append(lengths[4:])
    correlation = torch.tensor(together, dtype=torch.float64).T.corrcoef()[0, 1]
    assert abs(float(correlation)) < 0.3
    plan.draw()
    with plan.applied():
        step()
    with pytest.raises(RuntimeError, match="other numbers of terms"), plan.applied():
        roulette.estimate(nets[0], batch)
    with pytest.raises(RuntimeError, match="other numbers of terms"), plan.applied():
        tight.estimate(nets[0], batch)


class AnyNumber(logdet.RussianRoulette):
    """Another law of the same numbers."""


CHANGES: dict[str, dict[str, Any]] = {
    "estimator": {"estimator": logdet.RussianRoulette(num_exact_terms=3)},
    "law": {"estimator": AnyNumber(num_exact_terms=1)},
    "bound": {"lipschitz": 0.6},
    "no bound": {"lipschitz": None},
    "generator": {"generator": torch.Generator()},
    "probe": {"probe": 1},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_draw_that_is_another_one_than_was_recorded_is_an_error(change: dict[str, Any]) -> None:
    plan = TermPlan(torch.device("cpu"))
    recorded: dict[str, Any] = {
        "estimator": logdet.RussianRoulette(num_exact_terms=1),
        "lipschitz": 0.5,
        "generator": None,
        "probe": 0,
    }
    with plan.recording():
        planned_weights(**recorded)
    plan.draw()
    with plan.applied():
        planned_weights(**recorded)
    with pytest.raises(RuntimeError, match="other numbers of terms"), plan.applied():
        planned_weights(**recorded | change)


def test_blocks_that_changed_places_since_they_were_recorded_are_an_error() -> None:
    plan, batch = TermPlan(torch.device("cpu")), rows(features=3)[0]
    roulette, nets = logdet.RussianRoulette(), [FixedLinear(3, 0.5), FixedLinear(3, 0.5)]
    nets[0].lipschitz, nets[1].lipschitz = 0.4, 0.9

    def step(order: list[int]) -> None:
        for index in order:
            roulette.estimate(nets[index].double(), batch)

    with plan.recording():
        step([0, 1])
    plan.draw()
    with pytest.raises(RuntimeError, match="their order"), plan.applied():
        step([1, 0])


def test_weights_on_the_device_give_the_same_estimate_as_numbers() -> None:
    plan, net = TermPlan(torch.device("cpu")), FixedLinear(3, 0.8).double()
    roulette, batch = logdet.RussianRoulette(lipschitz=0.9), rows(features=3)[0]
    with plan.recording():
        roulette(net, batch)
    plan.draw()
    torch.manual_seed(1)
    with plan.applied():
        expected = roulette(net, batch)[1]
    plan.fill(capacity=64)
    torch.manual_seed(1)
    with plan.applied(capacity=64):
        found = roulette(net, batch)[1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("fault", ["rates", "weights", "gradients"])
def test_the_emulation_shows_what_a_graph_would_not_read(
    recorder: EmulatedRecorder, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Planted: learning rates that stay, weights of terms that stay, gradients that add up."""
    if fault == "rates":
        monkeypatch.setattr(graphs._LearningRates, "settle", lambda self: None)
        with pytest.raises(AssertionError):
            test_a_learning_rate_that_is_assigned_is_replayed(recorder)
    elif fault == "gradients":
        monkeypatch.setattr(torch, "_foreach_zero_", lambda gradients: None)
        with pytest.raises(AssertionError):
            test_gradients_may_be_dropped_and_losses_kept(recorder)
    else:
        fill = TermPlan.fill

        def once(plan: TermPlan, *, capacity: int) -> None:
            if capacity not in plan._tables:
                fill(plan, capacity=capacity)

        monkeypatch.setattr(TermPlan, "fill", once)
        monkeypatch.setattr(graphs, "graph_length", lambda num_terms: 256)
        assert max(deviations(logdet.RussianRoulette(num_exact_terms=1), 100)) > 9


def test_tensor_float_32_is_part_of_what_was_captured(recorder: EmulatedRecorder) -> None:
    flow, batches = make_flow(), rows()
    with allow_tf32_in_training():
        step = GraphedStep(flow, adam(flow), batches[0])
        step(batches[1])
        assert step.is_captured
    replays = recorder.replays
    with pytest.warns(NotCapturedWarning, match="captured inside of allow_tf32.*is outside now"):
        step(batches[2])
    assert recorder.replays == replays


def test_autocast_is_part_of_what_was_captured(recorder: EmulatedRecorder) -> None:
    batches = rows()
    first_layer = nn.Linear(2, 4)
    model = nn.Sequential(first_layer, nn.Tanh(), nn.Linear(4, 1)).double()

    def loss(model: Any, batch: Tensor) -> Tensor:
        return model(batch).float().square().mean()

    step = GraphedStep(model, torch.optim.SGD(model.parameters(), 0.1), batches[0], loss=loss)
    assert step.is_captured
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.warns(NotCapturedWarning, match="autocast is to torch.bfloat16"),
    ):
        step(batches[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = GraphedStep(model, torch.optim.SGD(model.parameters(), 0.1), batches[0], loss=loss)
        assert other.is_captured
        before = first_layer.weight.detach().clone()
        first, second = other(batches[0]), other(batches[0])
    assert float(second) < float(first)
    assert not torch.equal(before, first_layer.weight)


def test_constants_that_a_graph_reads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = partial(made_once(1)(lambda device, size: torch.zeros(size)), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    passing = weakref.ref(kept(2))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    read = weakref.ref(kept(3))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kept(4)
    assert passing() is None
    assert read() is not None


def test_draws_of_a_plan_go_on_after_one_that_draws_nothing() -> None:
    class Fixed(logdet.RussianRoulette):
        def term_weights(
            self, lipschitz: float | None, generator: torch.Generator | None = None
        ) -> list[float]:
            return [1.0, 1.0]

    roulettes, inputs = [logdet.RussianRoulette(lipschitz=0.9), Fixed()], torch.randn(2, 3)
    plan = TermPlan(torch.device("cpu"))
    torch.manual_seed(0)
    with plan.recording():
        for each in roulettes:
            each(lambda x: 0.1 * x, inputs)
    assert len({plan.draw() for _ in range(50)}) > 3
