"""The residual block inside nflows, and what the contract does not cover."""

from __future__ import annotations

import math

import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, InverseTransform, LULinear
from torch import Tensor

from nflows_iresnet import ResidualFlow, logdet, nn, solvers, transforms
from nflows_iresnet.testing import exact_logabsdet
from nflows_iresnet.testing.subject import Subject
from tests.cases import FixedLinear


def stretched_block(features: int, coeff: float = 0.97) -> transforms.ResidualTransform:
    """A block whose certificate is saturated: weights far above the budget."""
    torch.manual_seed(features)
    net = nn.LipschitzMLP(features, [32, 32], coeff=coeff)
    with torch.no_grad():
        for weight in net.layers.parameters():
            weight.mul_(20)
    return transforms.ResidualTransform(net).double()


@pytest.mark.parametrize("features", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("coeff", [0.5, 0.97, 0.99])
def test_round_trip_and_exactness_at_the_limit(features: int, coeff: float) -> None:
    block = stretched_block(features, coeff)
    inputs = torch.randn(16, features, dtype=torch.float64)
    with transforms.using(block, estimator=logdet.Exact()):
        outputs, logabsdet = block(inputs)
        found, back = block.inverse(outputs)
    bound = block.lipschitz_bound()
    assert 0.99 * coeff < bound <= coeff
    assert float((found - inputs).detach().abs().max()) < 1e-9
    torch.testing.assert_close(back, -logabsdet, rtol=0, atol=1e-8)
    expected = exact_logabsdet(Subject(block, inputs[:3]))
    torch.testing.assert_close(logabsdet[:3], expected, rtol=0, atol=1e-10)


def test_the_inverse_in_float32_is_as_good_as_rounding() -> None:
    block = stretched_block(2).float()
    inputs = torch.randn(256, 2)
    found, _ = block.inverse(block(inputs)[0])
    assert float((found - inputs).abs().max()) < 1e-4


def test_the_determinant_is_positive() -> None:
    block = stretched_block(5, coeff=0.99)
    inputs = torch.randn(64, 5, dtype=torch.float64)
    jacobian = block.net.bind().linearize(inputs).jacobian()  # type: ignore[operator]
    assert bool((torch.linalg.det(jacobian + torch.eye(5)) > 0).all())


def test_the_inverse_jacobian_is_the_implicit_one() -> None:
    block = stretched_block(3)
    inputs = torch.randn(1, 3, dtype=torch.float64)
    outputs = block(inputs)[0].detach()
    forward = torch.autograd.functional.jacobian(lambda x: block(x)[0], inputs)
    inverse = torch.autograd.functional.jacobian(lambda y: block.inverse(y)[0], outputs)
    product = torch.as_tensor(forward).reshape(3, 3) @ torch.as_tensor(inverse).reshape(3, 3)
    torch.testing.assert_close(product, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_implicit_gradients_are_as_accurate_for_tiny_and_huge_cotangents(scale: float) -> None:
    block = stretched_block(3)
    outputs = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (unit,) = torch.autograd.grad(block.inverse(outputs)[0].sum(), outputs)
    (scaled,) = torch.autograd.grad(scale * block.inverse(outputs)[0].sum(), outputs)
    torch.testing.assert_close(scaled / scale, unit, rtol=1e-9, atol=0)


def test_the_inverse_saves_no_more_for_more_steps() -> None:
    inputs = torch.randn(32, 2, dtype=torch.float64)

    def saved_elements(block: transforms.ResidualTransform) -> int:
        counts: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            counts.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            block.inverse(inputs)
        return sum(counts)

    quick = stretched_block(2)
    quick.solver = solvers.Anderson(atol=1e-2)
    slow = stretched_block(2)
    slow.solver = solvers.FixedPointIteration()
    assert saved_elements(quick) == saved_elements(slow)


class Nothing(torch.nn.Module):
    """g(x) = 0, as a gated network starts."""

    lipschitz = 0.9

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.zeros_like(inputs)


@pytest.mark.parametrize("has_gradient", [False, True])
def test_what_an_inverse_returns_is_no_memory_of_the_caller(has_gradient: bool) -> None:
    outputs = torch.randn(3, 2)
    kept = outputs.clone()
    with torch.set_grad_enabled(has_gradient):
        found, _ = transforms.ResidualTransform(Nothing()).inverse(outputs)
    found += 1
    assert torch.equal(outputs, kept)


def test_inside_nflows_and_inverted() -> None:
    torch.manual_seed(0)
    block = stretched_block(3)
    composite = CompositeTransform([LULinear(3), block, InverseTransform(stretched_block(3))])
    flow = Flow(composite.double(), StandardNormal([3]))
    inputs = torch.randn(8, 3, dtype=torch.float64)
    loss = -flow.log_prob(inputs).mean()
    loss.backward()
    noise = flow.transform_to_noise(inputs)
    torch.testing.assert_close(composite.inverse(noise)[0], inputs, rtol=0, atol=1e-9)
    assert all(parameter.grad is not None for parameter in flow.parameters())


def test_nan_raises_in_the_inverse() -> None:
    outputs = torch.zeros(3, 2, dtype=torch.float64)
    outputs[1, 0] = math.nan
    with pytest.raises(solvers.FixedPointNotConverged, match="not finite"):
        stretched_block(2).inverse(outputs)


def test_a_net_that_is_no_contraction_raises_or_is_verified() -> None:
    class Expanding(torch.nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return 5 * inputs.abs()

    block = transforms.ResidualTransform(Expanding())
    with pytest.raises(solvers.FixedPointNotConverged):
        block.inverse(-torch.ones(2, 2))


def test_a_net_that_changes_the_shape_is_refused() -> None:
    block = transforms.ResidualTransform(torch.nn.Linear(3, 2), estimator=logdet.Exact())
    with pytest.raises(ValueError, match="keeps the shape"):
        block(torch.zeros(4, 3))


def test_lipschitz_bound_needs_a_net_that_knows() -> None:
    assert transforms.ResidualTransform(FixedLinear(3, 0.5)).lipschitz_bound() < 0.51
    with pytest.raises(ValueError, match="Linear has no certified"):
        transforms.ResidualTransform(torch.nn.Linear(2, 2)).lipschitz_bound()


def test_using_changes_and_restores_even_after_an_error() -> None:
    block = stretched_block(2)
    before = block.estimator, block.solver
    with transforms.using(block, estimator=logdet.PowerSeries(), solver=solvers.Anderson(1e-3)):
        assert isinstance(block.estimator, logdet.PowerSeries)
        assert block.solver.atol == 1e-3
    assert (block.estimator, block.solver) == before
    with pytest.raises(KeyError), transforms.using(block, estimator=logdet.PowerSeries()):
        raise KeyError
    assert block.estimator == before[0]
    with pytest.raises(ValueError, match="no ResidualTransform"), transforms.using(LULinear(2)):
        pass


def test_strategies_are_values_shown_in_repr_and_kept_out_of_the_state() -> None:
    block = stretched_block(2)
    assert "Auto(max_exact_features=" in repr(block)
    assert "Anderson(" in repr(block)
    assert not any("estimator" in name or "solver" in name for name in block.state_dict())
    assert solvers.Anderson() == solvers.Anderson()
    with pytest.raises(AttributeError):
        solvers.Anderson().atol = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("rows", [1, 2, 0])
def test_actnorm_starts_from_any_batch(rows: int) -> None:
    norm = transforms.ActNorm(3)
    inputs = torch.randn(rows, 3)
    if rows:
        inputs[:, 1] = 4.0
    outputs, logabsdet = norm(inputs)
    assert bool(outputs.isfinite().all())
    assert bool(logabsdet.isfinite().all())
    assert bool(norm.initialized) is bool(rows)


def test_actnorm_standardises_vectors_and_channels() -> None:
    for inputs in (5 + 3 * torch.randn(500, 2), 5 + 3 * torch.randn(50, 2, 4, 4)):
        outputs, _ = transforms.ActNorm(2)(inputs)
        channels = outputs.movedim(1, -1).reshape(-1, 2)
        torch.testing.assert_close(channels.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
        torch.testing.assert_close(channels.std(0), torch.ones(2), rtol=1e-4, atol=0)


def test_actnorm_keeps_what_was_learned_through_the_inverse() -> None:
    flow = ResidualFlow(2, 8, 1)
    samples, log_prob = flow.sample_and_log_prob(6)
    torch.testing.assert_close(flow.log_prob(samples), log_prob, rtol=0, atol=1e-4)
    waiting = ResidualFlow(2, 8, 1)
    with torch.no_grad():
        waiting.sample(3)
    waiting.log_prob(5 + torch.randn(100, 2))
    start = waiting.transform_to_noise(5 + torch.randn(100, 2))
    assert float(start.mean().detach().abs()) < 1
