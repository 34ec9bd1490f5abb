"""The fitted roulette: unbiased whatever the fit, row by row, with a variance within its bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor

from nflows_iresnet import logdet, nn
from nflows_iresnet.linearization import SecondDerivativeError, linearize
from nflows_iresnet.logdet import Krylov
from tests import theory
from tests.cases import FixedLinear
from tests.planted import logdet as planted_logdet

DOUBLE = torch.float64


class Fixed:
    """The same vectors in each call."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def sample_like(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.vectors.to(inputs.dtype)


def value_and_weighted_gradient(
    estimator: logdet.LogDetEstimator, net: nn.LipschitzMLP, inputs: Tensor, weights: Tensor
) -> Tensor:
    """The estimates of all rows, and the derivative of their weighted sum, as one vector."""
    _, logabsdet = estimator(net, inputs)
    targets = [inputs, *net.parameters()]
    gradient = torch.autograd.grad(
        weights @ logabsdet, targets, allow_unused=True, materialize_grads=True
    )
    return torch.cat([logabsdet.detach(), *(each.flatten() for each in gradient)])


def mean_over_the_law(
    estimator: logdet.RussianRoulette, lipschitz: float, draw: Callable[[], Tensor]
) -> Tensor:
    """E[draw()] over the truncation, by summing over its law."""
    total: Tensor | None = None
    for probability, number in theory.law(estimator, lipschitz):
        with theory.uniform(number):
            part = probability * draw()
        total = part if total is None else total + part
    assert total is not None
    return total


@pytest.mark.parametrize("exact_trace", [True, False])
@pytest.mark.parametrize("num_exact_terms", [2, 3, 5])
def test_the_mean_over_all_signs_and_truncations_is_exact_in_value_and_weighted_gradient(
    num_exact_terms: int, exact_trace: bool
) -> None:
    """No randomness: every vector of signs, and every truncation with its probability."""
    errors = errors_of_the_mean(
        Krylov(
            num_exact_terms=num_exact_terms,
            num_probes=8,
            probe=theory.AllSigns(3),
            exact_trace=exact_trace,
        )
    )
    assert errors < 1e-7, (
        "more than the truncations that are left out, rarer than 1e-12, may change"
    )


@pytest.mark.parametrize(
    "wrong", [planted_logdet.FittedWithoutWhatFollows, planted_logdet.FittedWhereItEnds]
)
def test_a_biased_fit_is_seen(wrong: type[Krylov]) -> None:
    estimator = wrong(num_probes=8, probe=theory.AllSigns(3), exact_trace=False)
    assert errors_of_the_mean(estimator) > 1e-4


def errors_of_the_mean(estimator: Krylov) -> float:
    """The largest error of the mean value and weighted gradient of a net, beside `Exact`.

    All probes of one call share the truncation that is patched in, which changes no mean.
    """
    torch.manual_seed(0)
    net = nn.LipschitzMLP(3, [6], coeff=0.6).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4.0)
    inputs = torch.randn(4, 3, dtype=DOUBLE, requires_grad=True)
    weights = torch.tensor([0.0, 2.0, -1.0, 0.5], dtype=DOUBLE)

    def draw(each: logdet.LogDetEstimator) -> Tensor:
        return value_and_weighted_gradient(each, net, inputs, weights)

    mean = mean_over_the_law(estimator, 0.6, lambda: draw(estimator))
    return float((mean - draw(logdet.Exact())).abs().max())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "estimator",
    [
        Krylov(num_probes=800, lipschitz=0.9),
        Krylov(num_probes=800, lipschitz=0.9, num_exact_terms=2),
        Krylov(num_probes=800, lipschitz=0.9, probe=logdet.Gaussian()),
        Krylov(num_probes=800, lipschitz=0.9, truncation=logdet.GeometricTruncation(0.85)),
    ],
    ids=["default", "two-terms", "gaussian", "geometric"],
)
def test_it_is_unbiased_within_its_standard_error(estimator: Krylov, grad: bool) -> None:
    torch.manual_seed(3)
    net = FixedLinear(4, norm=0.9).double()
    with torch.set_grad_enabled(grad):
        estimate = estimator.estimate(net, torch.zeros(1, 4, dtype=DOUBLE))
    assert estimate.standard_error is not None
    expected = theory.slogdet(net.weight.detach())[1]
    error = (estimate.logabsdet.detach() - expected).abs()
    assert float(error) < 6 * float(estimate.standard_error)


def test_one_probe_knows_no_standard_error() -> None:
    net, inputs = FixedLinear(3).double(), torch.zeros(2, 3, dtype=DOUBLE)
    assert Krylov().estimate(net, inputs).standard_error is None


@pytest.mark.parametrize("number", [0.999, 0.02, 0.001])
def test_a_row_has_the_same_estimate_in_every_batch(number: float) -> None:
    """Whether nothing follows the certain terms, a few terms do, or many."""
    torch.manual_seed(0)
    net = nn.LipschitzMLP(3, [8, 8]).double()
    inputs = torch.randn(5, 3, dtype=DOUBLE)
    probe = logdet.Rademacher().sample_like(inputs)

    def estimates(rows: slice, kind: type[Krylov] = Krylov) -> Tensor:
        with theory.uniform(number), torch.no_grad():
            return kind(probe=Fixed(probe[rows]), exact_trace=False)(net, inputs[rows])[1]

    torch.testing.assert_close(estimates(slice(1, 3)), estimates(slice(None))[1:3])
    shared = planted_logdet.FittedToTheBatch
    difference = estimates(slice(1, 3), shared) - estimates(slice(None), shared)[1:3]
    assert float(difference.abs().max()) > 1e-6


@pytest.mark.parametrize("factor", [-0.9, -0.5, 0.5, 0.9])
@pytest.mark.parametrize("num_exact_terms", [2, 3, 6])
def test_the_fit_solves_what_a_multiple_of_the_identity_leaves(
    factor: float, num_exact_terms: int
) -> None:
    """(I + J)^{-1} v = v / (1 + c) for J = c I, without any scatter: the residual is zero."""
    estimator = Krylov(num_exact_terms=num_exact_terms, exact_trace=False)
    slope = torch.tensor(factor, dtype=DOUBLE, requires_grad=True)
    for number in (0.999, 0.3, 0.01):
        at = linearize(lambda x: slope * x, torch.zeros(2, 3, dtype=DOUBLE))
        with theory.uniform(number):
            value, _ = estimator.logabsdet(at, 0.95)
        (gradient,) = torch.autograd.grad(value[0], slope)
        assert float(gradient) == pytest.approx(3 / (1 + factor), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_leaves_the_least_residual_and_never_more_than_the_series(seed: int) -> None:
    torch.manual_seed(seed)
    weight = theory.matrix(6, 0.9, seed=seed)
    before = torch.randn(4, 6, dtype=DOUBLE)
    last = before @ weight
    excess = Krylov().excess(before, last)

    def residual(d: Tensor) -> Tensor:
        return (last + d * (before + last)).norm(dim=1)

    assert bool((residual(excess) <= last.norm(dim=1)).all())
    for change in (-0.01, 0.01):
        assert bool((residual(excess) < residual(excess + change)).all())
    assert float(excess.abs().max()) <= 0.9 / (1 - 0.9)


def test_zero_jacobians_are_estimated_without_a_division_by_zero() -> None:
    for estimator in (Krylov(lipschitz=0.5), Krylov(lipschitz=0.5, num_exact_terms=2)):
        inputs = torch.ones(2, 3, requires_grad=True)
        _, logabsdet = estimator(lambda x: 0 * x.square(), inputs)
        (gradient,) = torch.autograd.grad(logabsdet.sum(), inputs)
        assert torch.equal(logabsdet.detach(), torch.zeros(2))
        assert torch.equal(gradient, torch.zeros(2, 3))


def variance_at_multiple(factor: float, estimator: Krylov, lipschitz: float) -> float:
    """The variance over the law of the truncation at J = c I in one dimension."""

    def draw() -> Tensor:
        value = estimator(theory.multiple(factor), torch.zeros(1, 1, dtype=DOUBLE))[1]
        return torch.cat([value, value.square()])

    mean, second = mean_over_the_law(estimator, lipschitz, draw)
    assert float(mean) == pytest.approx(math.log1p(factor), abs=1e-6)
    return float(second - mean**2)


@pytest.mark.parametrize("lipschitz", [0.5, 0.9])
@pytest.mark.parametrize("num_exact_terms", [2, 3, 4])
def test_the_variance_is_within_its_bound(lipschitz: float, num_exact_terms: int) -> None:
    """Summed over the law of the truncation, where the probe adds no variance."""
    estimator = Krylov(lipschitz=lipschitz, num_exact_terms=num_exact_terms, exact_trace=False)
    for factor in (-lipschitz, -lipschitz / 2, lipschitz):
        found = variance_at_multiple(factor, estimator, lipschitz)
        assert found <= estimator.variance_bound(lipschitz, features=1)


def test_the_bound_of_the_variance_is_its_formula() -> None:
    """D^2 (log(1 - L)^2 + sum_{i,j} (1 / p_min - 1) b_i b_j), here with two plain loops."""
    estimator, bound = Krylov(), 0.8
    sizes = {
        k: bound**k / (1 - bound) * (1 / (k - 1) + 1 / k)
        for k in range(estimator.num_exact_terms + 1, 300)
    }
    pairs = math.fsum(
        (1 / estimator.survival(min(i, j), bound) - 1) * sizes[i] * sizes[j]
        for i in sizes
        for j in sizes
    )
    expected = 9 * (math.log1p(-bound) ** 2 + pairs)
    found = estimator.variance_bound(bound, features=3)
    assert expected <= found <= 1.5 * expected
    assert estimator.variance_bound(0.0, features=3) == 0
    assert math.isfinite(estimator.variance_bound(0.999, features=3))
    geometric = Krylov(truncation=logdet.GeometricTruncation(0.5))
    assert geometric.variance_bound(0.9, features=3) == math.inf


@pytest.mark.parametrize("centre", [-0.5, 0.5])
def test_the_fit_scatters_less_where_the_jacobian_shrinks_or_stretches(centre: float) -> None:
    """What the truncation adds to the derivative, with the same probes and the same law.

    Where the spectrum is a disc around zero the powers are as good as any polynomial.
    """
    torch.manual_seed(0)
    probe = Fixed(logdet.Rademacher().sample_like(torch.zeros(20, 8, dtype=DOUBLE)))
    fitted = Krylov(probe=probe)
    plain = logdet.RussianRoulette(
        num_exact_terms=fitted.num_exact_terms, truncation=fitted.truncation, probe=probe
    )
    weight = centre * torch.eye(8, dtype=DOUBLE) + theory.matrix(8, 0.3)
    ratio = scatter_of_the_derivative(fitted, weight) / scatter_of_the_derivative(plain, weight)
    assert ratio < 0.5


def scatter_of_the_derivative(estimator: logdet.RussianRoulette, weight: Tensor) -> float:
    """The sum of the variances, over the law of the truncation, in the entries of J."""
    weight = weight.clone().requires_grad_()

    def draw() -> Tensor:
        at = linearize(theory.linear(weight), torch.zeros(20, 8, dtype=DOUBLE))
        value, _ = estimator.logabsdet(at, 0.8)
        (gradient,) = torch.autograd.grad(value.mean(), weight)
        return torch.stack([gradient, gradient.square()])

    mean, second = mean_over_the_law(estimator, 0.8, draw)
    return float((second - mean.square()).sum())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("number", [0.999, 0.05])
def test_n_terms_take_n_products(number: float, grad: bool) -> None:
    """n - 1 with the transpose of J, and one with J for value and derivative together."""
    net, inputs = nn.LipschitzMLP(3, [4]), torch.zeros(2, 3)
    estimator = Krylov(exact_trace=False, lipschitz=0.8)
    with theory.uniform(number), torch.set_grad_enabled(grad):
        terms = len(estimator.term_weights(None))
        at = linearize(net, inputs)
        with (
            mock.patch.object(at, "vjp", wraps=at.vjp) as vjp,
            mock.patch.object(at, "jvp", wraps=at.jvp) as jvp,
            mock.patch.object(at, "surrogate", wraps=at.surrogate) as surrogate,
        ):
            estimator.logabsdet(at, None)
    assert vjp.call_count + jvp.call_count + surrogate.call_count == terms
    assert jvp.call_count + surrogate.call_count == 1


def test_only_torch_decides_and_a_generator_too() -> None:
    net, inputs = FixedLinear(3).double(), torch.zeros(2, 3, dtype=DOUBLE)
    draws = []
    for _ in range(2):
        torch.manual_seed(1)
        draws.append(Krylov(num_probes=2)(net, inputs)[1])
        own = torch.Generator().manual_seed(7)
        draws.append(Krylov(num_probes=2).estimate(net, inputs, generator=own).logabsdet)
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])


def test_a_second_derivative_is_refused() -> None:
    inputs = torch.randn(2, 3, dtype=DOUBLE, requires_grad=True)
    _, logabsdet = Krylov(lipschitz=0.9)(lambda x: 0.5 * x.sin(), inputs)
    (gradient,) = torch.autograd.grad(logabsdet.sum(), inputs, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="Exact"):
        torch.autograd.grad(gradient.sum(), inputs)


@dataclass(frozen=True)
class Bad:
    arguments: dict[str, float]
    message: str


@pytest.mark.parametrize(
    "bad",
    [
        Bad({"num_exact_terms": 1}, "at least 2, got 1"),
        Bad({"num_exact_terms": 0}, "at least 1, got 0"),
        Bad({"num_probes": 0}, "num_probes"),
        Bad({"lipschitz": 1.0}, "less than 1"),
    ],
    ids=lambda bad: str(bad.arguments),
)
def test_bad_arguments_are_named(bad: Bad) -> None:
    with pytest.raises(ValueError, match=bad.message):
        Krylov(**bad.arguments)  # type: ignore[arg-type]


def test_a_network_without_a_guarantee_is_refused() -> None:
    with pytest.raises(ValueError, match="lipschitz="):
        Krylov()(torch.nn.Linear(2, 2), torch.zeros(1, 2))


def test_the_fit_changes_the_weights_from_the_last_certain_term_on() -> None:
    for num_exact in (2, 3, 5):
        weights = [1.0] * num_exact + [2.0, 3.5]
        found = logdet.Krylov(num_exact_terms=num_exact, lipschitz=0.5).corrections(weights)
        assert found == [0.0] * (num_exact - 1) + [-1.0, -1.5, 3.5]
