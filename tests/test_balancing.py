"""The node that balances all weights: against its slow twin, and what it asks for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nflows_iresnet import nn
from nflows_iresnet.experiments.bench.steps import OperationCounter
from nflows_iresnet.linearization import bind_all
from nflows_iresnet.nn.balancing import Balanced, Stored, balanced, differentiable

NETS = 3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def stored_weights(kernel: tuple[int, ...], widening: int, *, has_scales: bool) -> Stored:
    torch.manual_seed(11)
    shapes = [(5, 2), (4, 5 * widening), (2, 4 * widening)]
    weights = [random(NETS, *shape, *kernel) for shape in shapes]
    if not has_scales:
        return Stored(weights, [], [])
    log_scales = [random(NETS, 5), random(NETS, 4)]
    with torch.no_grad():
        log_scales[0][0, :2] = torch.tensor([8.0, -9.0])
    return Stored(weights, [random(NETS, 5), random(NETS, 4)], log_scales)


def loss(found: Balanced, *, with_scales: bool) -> Tensor:
    groups = found if with_scales else found[:2]
    return torch.stack([each.sin().sum() for group in groups for each in group]).sum()


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("widening", [1, 2])
@pytest.mark.parametrize("log_budget", [-1.0, 100.0])
@pytest.mark.parametrize("with_scales", [False, True])
@pytest.mark.parametrize("has_scales", [False, True])
def test_the_node_is_its_slow_twin_to_the_second_derivative(
    kernel: tuple[int, ...], widening: int, log_budget: float, with_scales: bool, has_scales: bool
) -> None:
    stored = stored_weights(kernel, widening, has_scales=has_scales)
    norms = (torch.rand(3, NETS, dtype=torch.float64) + 0.5).requires_grad_()
    moving = [norms, *(each for group in stored for each in group)]
    values, gradients, seconds = [], [], []
    for make in (balanced, differentiable):
        found = make(stored, norms, log_budget)
        values.append([each for group in found for each in group])
        total = loss(found, with_scales=with_scales)
        gradients.append(torch.autograd.grad(total, moving, retain_graph=True))
        once = torch.autograd.grad(total, moving, create_graph=True)
        bent = torch.stack([each.cos().sum() for each in once]).sum()
        seconds.append(torch.autograd.grad(bent, moving))
    for ours, wanted in (values, gradients, seconds):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_outputs_that_are_not_used_and_weights_that_are_frozen_are_no_obstacle() -> None:
    stored = stored_weights((), 1, has_scales=True)
    stored.weights[0].requires_grad_(False)
    norms = torch.ones(3, NETS, dtype=torch.float64)
    moving = [stored.weights[1], *stored.log_scales]
    found, wanted = [
        torch.autograd.grad(make(stored, norms, 0.0).weights[1].square().sum(), moving)
        for make in (balanced, differentiable)
    ]
    torch.testing.assert_close(found, wanted)


def test_the_gradient_of_all_blocks_weights_asks_for_few_operations() -> None:
    nets = [nn.LipschitzMLP(2, [64, 64]) for _ in range(6)]
    functions = bind_all(nets)
    outputs = [each for one in functions for each in (*one.weights, *one.shifts)]  # type: ignore[attr-defined]
    parameters = [each for net in nets for each in net.parameters()]
    with OperationCounter() as counter:
        torch.autograd.grad(outputs, parameters, [torch.ones_like(each) for each in outputs])
    assert counter.count - len(outputs) < 70
