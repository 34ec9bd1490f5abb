"""The monotone block: against its closed form, its constants, and every kind of estimator."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nflows_iresnet import flows, logdet, solvers, transforms
from nflows_iresnet.flows.lipschitz import lipschitz_constants
from nflows_iresnet.linearization import Linearization, ResidualFunction
from nflows_iresnet.logdet.power_series import SeriesEstimator
from nflows_iresnet.nn import LipschitzMLP
from nflows_iresnet.transforms import MonotoneTransform
from nflows_iresnet.transforms.monotone import cayley
from tests.cases import FixedLinear


class Scaled(nn.Module):
    """g(x) = a x: everything is known."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.lipschitz = abs(slope)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.slope * inputs

    def lipschitz_bound(self) -> float:
        return abs(float(self.slope.detach()))


def mlp(features: int = 3) -> LipschitzMLP:
    torch.manual_seed(2)
    return LipschitzMLP(features, [16, 16])


def rows(count: int = 6, features: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, features, generator=generator, dtype=torch.float64)


def odd_series(matrix: Tensor, num_terms: int) -> float:
    odd = range(1, num_terms + 1, 2)
    return -2 * sum(float(torch.linalg.matrix_power(matrix, k).trace()) / k for k in odd)


def test_it_is_the_cayley_transform_of_its_network() -> None:
    net = FixedLinear(norm=0.8).double()
    matrix, identity = net.weight.detach(), torch.eye(3, dtype=torch.float64)
    cayley_of = (identity - matrix) @ torch.linalg.inv(identity + matrix)
    outputs, logabsdet = transforms.MonotoneTransform(net, estimator=logdet.Exact())(rows())
    torch.testing.assert_close(outputs, rows() @ cayley_of.mT)
    expected = torch.linalg.slogdet(cayley_of).logabsdet
    torch.testing.assert_close(logabsdet, expected.expand(6))
    assert float(expected) == pytest.approx(odd_series(matrix, 400))


def test_with_the_negative_network_it_is_its_own_inverse() -> None:
    net, negative = FixedLinear(norm=0.8).double(), FixedLinear(norm=0.8).double()
    with torch.no_grad():
        negative.weight.neg_()
    inverse, inverse_logabsdet = transforms.MonotoneTransform(net).inverse(rows())
    forward, logabsdet = transforms.MonotoneTransform(negative)(rows())
    torch.testing.assert_close(forward, inverse)
    torch.testing.assert_close(logabsdet, inverse_logabsdet)


def test_it_is_monotone_where_a_residual_block_would_be_too_weak() -> None:
    block = transforms.MonotoneTransform(Scaled(-0.96)).double()
    points = torch.randn(200, 2, 3, dtype=torch.float64)
    images = block(points.flatten(0, 1))[0].unflatten(0, (200, 2))
    products = ((points[:, 0] - points[:, 1]) * (images[:, 0] - images[:, 1])).sum(1)
    assert bool((products > 0).all())
    torch.testing.assert_close(images, 49 * points, rtol=1e-5, atol=0)


@pytest.mark.parametrize("slope", [0.9, -0.9])
def test_its_constants_are_reached_both_ways(slope: float) -> None:
    block = transforms.MonotoneTransform(Scaled(slope)).double()
    forward, inverse = lipschitz_constants(block)
    assert forward == inverse == pytest.approx(19)
    stretch = float((block(torch.ones(1, 2, dtype=torch.float64))[0][0, 0]).detach())
    assert max(stretch, 1 / stretch) == pytest.approx(forward, rel=1e-6)
    assert max(stretch, 1 / stretch) <= forward


def test_its_constants_bound_the_singular_values_of_a_network_at_its_bound() -> None:
    block = transforms.MonotoneTransform(mlp()).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=5.0)
    points = rows(20)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: block(x[None])[0][0]))(points)
    values = torch.linalg.svdvals(jacobian).detach()
    forward, inverse = lipschitz_constants(block)
    assert 1.05 < float(values.max()) <= forward
    assert 1.05 < float(1 / values.min()) <= inverse
    bound = flows.Flow(block, flows.StandardNormal([3])).lipschitz_bound()
    assert bound.blocks == (block.lipschitz_bound(),)
    assert (bound.forward, bound.inverse) == (forward, inverse)


class Overridden(transforms.MonotoneTransform):
    """A block of a user, who may do anything with it."""


def test_what_is_not_certified_is_unbounded() -> None:
    unknown = (math.inf, math.inf)
    assert lipschitz_constants(transforms.MonotoneTransform(nn.Tanh())) == unknown
    assert lipschitz_constants(transforms.MonotoneTransform(Scaled(1.5))) == unknown
    assert lipschitz_constants(Overridden(Scaled(0.5))) == unknown


def test_the_series_keeps_the_odd_terms_alone_and_none_after_the_last() -> None:
    net = FixedLinear(norm=0.6).double()
    for num_terms in (5, 6):
        series = logdet.PowerSeries(num_terms=num_terms, num_probes=4000)
        estimate = cayley(series).estimate(net, rows(1))
        assert estimate.standard_error is not None
        error = abs(float(estimate.logabsdet.detach()) - odd_series(net.weight.detach(), num_terms))
        assert error < 6 * float(estimate.standard_error.detach())
    even, odd = (
        cayley(logdet.PowerSeries(num_terms=count)).term_weights(0.6)  # type: ignore[attr-defined]
        for count in (6, 5)
    )
    assert even == odd == [1.0, 0.0, 1.0, 0.0, 1.0]


@dataclass(frozen=True)
class Half(logdet.LogDetEstimator):
    """Of a user: tr J - tr J^2 / 2, which has an error to be told."""

    def logabsdet(
        self, at_inputs: Linearization, lipschitz: float | None, generator: object = None
    ) -> tuple[Tensor, Tensor]:
        jacobian = at_inputs.jacobian()
        traces = [each.diagonal(dim1=1, dim2=2).sum(1) for each in (jacobian, jacobian @ jacobian)]
        return traces[0] - traces[1] / 2, torch.full_like(traces[0], 3.0)


@dataclass(frozen=True)
class Late(logdet.Exact):
    """Of a user: overrides what the closed form would pass by."""

    def logabsdet(
        self, at_inputs: Linearization, lipschitz: float | None, generator: object = None
    ) -> tuple[Tensor, Tensor]:
        value, error = super().logabsdet(at_inputs, lipschitz)
        return 10 * value, error


def test_an_estimator_of_a_user_is_asked_for_both_signs() -> None:
    net = FixedLinear(norm=0.6).double()
    estimate = cayley(Half()).estimate(net, rows())
    torch.testing.assert_close(estimate.logabsdet, -2 * net.weight.trace().expand(6))
    torch.testing.assert_close(estimate.outputs, net(rows()))
    assert estimate.standard_error is not None
    assert float(estimate.standard_error[0]) == pytest.approx(3 * math.sqrt(2))
    exact = cayley(logdet.Exact()).estimate(net, rows()).logabsdet
    torch.testing.assert_close(cayley(Late()).estimate(net, rows()).logabsdet, 10 * exact)


@pytest.mark.parametrize("features", [3, 40])
def test_the_default_chooses_by_dimension_as_for_residual_blocks(features: int) -> None:
    block = transforms.MonotoneTransform(mlp(features)).double()
    torch.manual_seed(0)
    first = block(rows(4, features))[1]
    second = block(rows(4, features))[1]
    assert torch.equal(first, second) == (features == 3)


def test_exact_takes_rows_in_chunks_without_changing_them() -> None:
    block = transforms.MonotoneTransform(mlp(), estimator=logdet.Exact()).double()
    chunked = transforms.MonotoneTransform(block.net, estimator=logdet.Exact(chunk_size=2))
    for expected, value in zip(block(rows()), chunked(rows()), strict=True):
        torch.testing.assert_close(value, expected)


def test_using_replaces_its_strategies_for_a_while() -> None:
    block = transforms.MonotoneTransform(mlp(), estimator=logdet.RussianRoulette()).double()
    before = block.estimator, block.solver
    with transforms.using(block, estimator=logdet.Exact()):
        exact = [block(rows())[1] for _ in range(2)]
    assert torch.equal(*exact)
    assert (block.estimator, block.solver) == before
    draws = torch.stack([block(rows())[1].detach() for _ in range(400)])
    error = (draws.mean(0) - exact[0]).abs()
    assert bool((error < 6 * draws.std(0) / 20 + 1e-9).all())


@pytest.mark.parametrize("recompute", [False, True])
def test_a_composite_binds_it_with_others_and_changes_nothing(recompute: bool) -> None:
    blocks = [transforms.MonotoneTransform(mlp()), transforms.ResidualTransform(mlp())]
    together = transforms.CompositeTransform(blocks, recompute=recompute).double()
    assert all(block.takes_function for block in blocks)
    weights = list(blocks[0].net.parameters())
    outputs, logabsdet = together(rows())
    gradients = torch.autograd.grad(outputs.square().sum() - logabsdet.sum(), weights)
    first, first_logabsdet = blocks[0](rows())
    second, second_logabsdet = blocks[1](first)
    torch.testing.assert_close(outputs, second)
    torch.testing.assert_close(logabsdet, first_logabsdet + second_logabsdet)
    loss = second.square().sum() - (first_logabsdet + second_logabsdet).sum()
    expected = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(together.inverse(outputs)[0], rows(), rtol=0, atol=1e-9)


def test_a_flow_of_it_samples_what_its_density_says() -> None:
    block = transforms.MonotoneTransform(Scaled(-0.5), estimator=logdet.Exact())
    flow = flows.Flow(block, flows.StandardNormal([2])).double()
    torch.manual_seed(0)
    samples, log_prob = flow.sample_and_log_prob(2000)
    torch.testing.assert_close(log_prob, flow.log_prob(samples))
    assert float(samples.std()) == pytest.approx(1 / 3, rel=0.1)
    assert float(flow.sample(2000).std()) == pytest.approx(1 / 3, rel=0.1)


def test_it_does_not_stop_before_its_tolerance() -> None:
    block = transforms.MonotoneTransform(
        Scaled(0.99), solver=solvers.FixedPointIteration(max_steps=5)
    )
    for direction in (block, block.inverse):
        with pytest.raises(solvers.FixedPointNotConverged):
            direction(torch.ones(2, 2))


def test_a_series_that_is_fitted_is_asked_for_both_determinants() -> None:
    """Its odd weights alone would be another estimator."""
    assert type(cayley(logdet.Krylov())) is type(cayley(Halved()))
    assert type(cayley(logdet.Krylov())) is not type(cayley(logdet.RussianRoulette()))


@dataclass(frozen=True)
class Halved(logdet.LogDetEstimator):
    """An estimator of no kind that is known."""


@pytest.mark.parametrize(
    "estimator",
    [
        logdet.PowerSeries(num_terms=5, num_probes=2),
        logdet.Krylov(num_probes=2, lipschitz=0.7, num_exact_terms=4),
    ],
    ids=str,
)
def test_its_standard_error_is_told_by_the_draws(estimator: SeriesEstimator) -> None:
    """Half of the difference of two for one series; for two series the root of both squares."""
    net, inputs = FixedLinear(12, norm=0.7).double().requires_grad_(False), rows(6, 12)
    generator = torch.Generator().manual_seed(3)
    found = cayley(estimator).estimate(net, inputs, generator=generator)
    generator.manual_seed(3)
    if isinstance(estimator, logdet.Krylov):
        plus = estimator.estimate(net, inputs, generator=generator)
        minus = estimator.estimate(lambda x: -net(x), inputs, generator=generator)
        assert plus.standard_error is not None
        assert minus.standard_error is not None
        mean = minus.logabsdet - plus.logabsdet
        error = torch.hypot(plus.standard_error, minus.standard_error)
    else:
        one = cayley(replace(estimator, num_probes=1))
        first, second = [one.estimate(net, inputs, generator=generator).logabsdet for _ in range(2)]
        mean, error = (first + second) / 2, (first - second).abs() / 2
    assert found.standard_error is not None
    assert float(error.min()) > 0
    torch.testing.assert_close(found.logabsdet, mean)
    torch.testing.assert_close(found.standard_error, error)


def test_exact_keeps_its_chunks() -> None:
    """They bound the memory, and change no number."""
    assert cayley(logdet.Exact(chunk_size=2)).chunk_size == 2  # type: ignore[attr-defined]


class PerRow(ResidualFunction):
    """g(x) = x sin(c) / 2 with a number c for each row."""

    lipschitz = 0.5

    def __init__(self, angles: Tensor) -> None:
        self.angles = angles

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs * self.angles.sin() / 2

    def select(self, chosen: Tensor | slice) -> PerRow:
        return PerRow(self.angles[chosen])


def test_rows_that_go_on_keep_their_branch_in_the_inverse() -> None:
    """Rows that are done are left out, so that the others are no longer the first ones."""
    angles = torch.linspace(0, 1.5, 2000, dtype=torch.float64)[:, None]
    solver = solvers.FixedPointIteration(rtol=1e-9)
    block = transforms.MonotoneTransform(Scaled(0.1), solver=solver).double()
    inputs = torch.ones(2000, 1, dtype=torch.float64)
    found = block.inverse(inputs, function=PerRow(angles))[0]
    expected = inputs * (1 + angles.sin() / 2) / (1 - angles.sin() / 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_a_way_to_choose_of_ones_own_is_asked() -> None:
    @dataclass(frozen=True)
    class Mine(logdet.Auto):
        def choose(self, *args: Any, **kwargs: Any) -> logdet.LogDetEstimator:
            return logdet.Exact()

    torch.manual_seed(0)
    block = MonotoneTransform(LipschitzMLP(2, [16]), estimator=logdet.Exact())
    inputs = torch.randn(5, 2)
    expected = block(inputs)[1]
    block.estimator = Mine()
    torch.testing.assert_close(block(inputs)[1], expected)

    @dataclass(frozen=True)
    class Later(logdet.Auto):
        max_exact_features: int = 10

    assert type(cayley(Later())) is Later
