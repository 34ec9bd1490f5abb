"""The densely connected network: its certificate, its products, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nflows_iresnet import ResidualFlow, logdet, nn, testing, transforms
from nflows_iresnet.linearization import AutogradLinearization, Linearization

ACTIVATIONS: dict[str, torch.nn.Module] = {
    "mixed": nn.Mixed(nn.Sine(), nn.SmoothAbs()),
    "clipswish": nn.CLipSwish(),
    "lipswish": nn.LipSwish(),
    "elu": nn.ELU(),
    "maxmin": nn.MaxMin(),
    "of-torch": torch.nn.SiLU(),
}


def shaken(
    activation: str = "mixed", context_features: int | None = None, scale: float = 1.0
) -> nn.LipschitzDenseNet:
    torch.manual_seed(0)
    net = nn.LipschitzDenseNet(
        3, [6, 4, 2], context_features, activation=ACTIVATIONS[activation], coeff=0.9
    ).double()
    with torch.no_grad():
        for each in net.parameters():
            each.add_(scale * torch.randn_like(each))
    return net


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_certificate_of_the_whole_holds(activation: str, scale: float) -> None:
    net = shaken(activation, scale=scale)
    bound = net.lipschitz_bound()
    assert bound <= 0.9
    testing.check_lipschitz(net, 5 * torch.randn(50, 3).double(), bound, num_steps=20)


def test_the_certificate_is_the_norm_of_a_network_of_identities() -> None:
    """Linear layers alone: the bound of the parts is attained where they are one direction."""
    net = nn.LipschitzDenseNet(1, [1], activation=torch.nn.Identity(), coeff=0.9).double()
    with torch.no_grad():
        net.normed_layers[0].weight.fill_(3.0)
        net.normed_layers[1].weight.copy_(torch.tensor([[1.0, 3.0]]))
        net.log_parts.zero_()
    (slope,) = torch.autograd.functional.jacobian(net, torch.zeros(1, 1).double())
    assert float(slope) == pytest.approx(0.9, rel=1e-6)
    assert net.lipschitz_bound() == pytest.approx(0.9, rel=1e-6)


def test_a_network_within_its_budget_is_left_as_it_is() -> None:
    net = nn.LipschitzDenseNet(2, [3], coeff=0.9).double()
    with torch.no_grad():
        net.normed_layers[1].weight.mul_(1e-3)
    (_, last), _ = net.effective_weights()
    torch.testing.assert_close(last, net.normed_layers[1].weight, rtol=0, atol=0)


def answers(at: Linearization) -> list[Tensor]:
    torch.manual_seed(2)
    tangent, cotangent = torch.randn(2, *at.shape, dtype=torch.float64)
    return [
        at.jvp(tangent),
        at.vjp(cotangent),
        at.jacobian(),
        at.trace(),
        at.value,
        *at.bilinear([cotangent, tangent], tangent),
    ]


@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize("activation", ["mixed", "clipswish", "lipswish", "elu"])
def test_products_are_those_of_automatic_differentiation(
    activation: str, context_features: int | None
) -> None:
    net = shaken(activation, context_features, scale=0.3)
    inputs = torch.randn(5, 3).double().requires_grad_()
    context = None if context_features is None else torch.randn(5, 2).double()
    function = net.bind(context)
    found = answers(function.linearize(inputs))
    expected = answers(AutogradLinearization(function, inputs))
    torch.testing.assert_close(found, expected)
    sources = [inputs, *net.parameters()]
    gradients = [
        torch.autograd.grad(
            torch.stack([each.sin().sum() for each in values]).sum(), sources, retain_graph=True
        )
        for values in (found, expected)
    ]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_parts_are_learned() -> None:
    """A target that needs little of x itself: q grows beside p."""
    torch.manual_seed(0)
    net = nn.LipschitzDenseNet(2, [16, 16])
    inputs = 3 * torch.randn(256, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = (net(inputs) - 0.5 * inputs.sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    kept, added = net.log_parts.exp().unbind(0)
    assert bool((added / kept).amax() > 1.05)


def test_presets_take_it() -> None:
    flow = ResidualFlow(3, 8, 2, net=nn.LipschitzDenseNet, activation=nn.CLipSwish())
    nets = [each for each in flow.modules() if isinstance(each, nn.LipschitzDenseNet)]
    assert len(nets) == 2
    inputs = torch.randn(6, 3)
    flow.log_prob(inputs)
    with transforms.using(flow, estimator=logdet.Exact()):
        assert bool(flow.eval().log_prob(inputs).isfinite().all())
    assert math.isfinite(float(flow.sample(4).sum()))
