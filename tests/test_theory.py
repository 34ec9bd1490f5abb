"""The equations of the method, I: contraction, inverses, compositions, differential equations."""

from __future__ import annotations

import math

import pytest
import torch
from nflows.transforms import CompositeTransform
from torch import Tensor, nn

from nflows_iresnet import logdet, solvers, testing
from nflows_iresnet.linearization import linearize
from nflows_iresnet.transforms import ResidualTransform
from tests import device, theory
from tests.planted import logdet as planted_logdet
from tests.planted import theory as planted_theory

PICARD = solvers.FixedPointIteration()


@pytest.mark.parametrize("lipschitz", [0.3, 0.5, 0.9, 0.97])
def test_banach_rate_is_attained_by_a_multiple_of_the_identity(lipschitz: float) -> None:
    """|x_n - x*| <= L^n / (1 - L) |x_1 - x_0| (Banach, 1922; Behrmann et al., 2019, section 2).

    For g(x) = -L x, the iteration x <- y + L x has exactly this error.
    """
    targets = torch.randn(5, 3, generator=device.generator(0)).double()
    sharpness = theory.check_banach_rate(
        PICARD, lambda x: targets + lipschitz * x, targets, lipschitz
    )
    assert sharpness == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("lipschitz", [0.5, 0.9, 0.97])
def test_banach_rate_of_a_nonlinear_net(lipschitz: float) -> None:
    """|x_n - x*| <= L^n / (1 - L) |x_1 - x_0| with L the certificate (Behrmann et al., 2019)."""
    net = theory.steep_net(3, lipschitz)
    targets = torch.randn(16, 3, dtype=torch.float64)
    with torch.no_grad():
        sharpness = theory.check_banach_rate(PICARD, lambda x: targets - net(x), targets, lipschitz)
    assert 0.02 < sharpness <= 1


@pytest.mark.parametrize("lipschitz", [0.5, 0.97])
def test_steps_shrink_by_the_lipschitz_constant(lipschitz: float) -> None:
    """|x_{n+1} - x_n| <= L |x_n - x_{n-1}| (Banach, 1922)."""
    net = theory.steep_net(3, lipschitz)
    targets = torch.randn(16, 3, dtype=torch.float64)
    with torch.no_grad():
        points = torch.stack(theory.iterates(PICARD, lambda x: targets - net(x), targets))
    steps = points.diff(dim=0).norm(dim=2)
    assert bool((steps[1:] <= lipschitz * steps[:-1] + 1e-14).all())


@pytest.mark.parametrize("coeff", [0.5, 0.9, 0.97])
def test_lipschitz_constants_of_the_block_and_of_its_inverse(coeff: float) -> None:
    """Lip(F) <= 1 + L and Lip(F^{-1}) <= 1 / (1 - L) (Behrmann et al., 2019, lemma 2)."""
    block = ResidualTransform(theory.steep_net(3, coeff))
    torch.manual_seed(1)
    first, second = 2 * torch.randn(2, 300, 3, dtype=torch.float64)
    second = first + 0.1 * (second - first)
    with torch.no_grad():
        stretch = distance(*(block(x)[0] for x in (first, second))) / distance(first, second)
        undone = distance(*(block.inverse(x)[0] for x in (first, second))) / distance(first, second)
    assert float(stretch.max()) <= 1 + coeff
    assert float(undone.max()) <= 1 / (1 - coeff)
    assert float(undone.max()) > 1 > float(stretch.min()) >= 1 - coeff


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_both_lipschitz_constants_are_attained(sign: float) -> None:
    """g = L x stretches by 1 + L, and the inverse of g = -L x by 1 / (1 - L) (ibid.)."""
    block = ResidualTransform(Linear(sign * 0.9 * torch.eye(2, dtype=torch.float64)))
    inputs = torch.randn(4, 2, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(inputs)[0], (1 + sign * 0.9) * inputs)
        torch.testing.assert_close(block.inverse(inputs)[0], inputs / (1 + sign * 0.9))


@pytest.mark.parametrize("features", [1, 2, 5])
def test_the_determinant_is_positive(features: int) -> None:
    """det(I + J) >= (1 - L)^d > 0, so that |det| needs no bars (Behrmann et al., 2019)."""
    net = theory.steep_net(features, 0.97)
    jacobian = jacobians(net, features)
    sign, logabsdet = theory.slogdet(jacobian)
    assert bool((sign == 1).all())
    assert bool((logabsdet >= features * math.log1p(-0.97)).all())
    assert bool((logabsdet <= features * math.log1p(0.97)).all())


def test_no_determinant_vanishes_on_the_way_from_the_identity() -> None:
    """det(I + t J) > 0 for 0 <= t <= 1 and det(I) = 1: the sign cannot change (homotopy)."""
    jacobian = jacobians(theory.steep_net(4, 0.97), 4)
    for time in torch.linspace(0, 1, 101, dtype=torch.float64):
        sign, logabsdet = theory.slogdet(time * jacobian)
        assert bool((sign == 1).all())
        assert bool((logabsdet >= 4 * torch.log1p(-time * 0.97)).all())
    sign, _ = theory.slogdet(-2.0 * torch.eye(3, dtype=torch.float64))
    assert float(sign) == -1, "a Lipschitz constant above one can turn the sign"


def test_composition_multiplies_lipschitz_constants() -> None:
    """Lip(F_2 o F_1) <= prod (1 + L_i), inverse <= prod 1 / (1 - L_i) (Behrmann et al., 2019)."""
    coeffs = (0.3, 0.6, 0.9)
    nets = [theory.steep_net(2, coeff, seed=index) for index, coeff in enumerate(coeffs)]
    chain = CompositeTransform([ResidualTransform(net) for net in nets])
    inputs = torch.randn(8, 2, dtype=torch.float64)
    forward = math.prod(1 + net.lipschitz_bound() for net in nets)
    backward = math.prod(1 / (1 - net.lipschitz_bound()) for net in nets)
    assert testing.check_lipschitz(lambda x: chain(x)[0], inputs, forward) > 0.4
    outputs = chain(inputs)[0].detach()
    assert (
        testing.check_lipschitz(lambda y: chain.inverse(y)[0], outputs, backward, num_steps=5) > 1
    )


def test_composition_adds_logarithms_of_determinants() -> None:
    """log|det D(F_2 o F_1)| = sum_i log|det DF_i| at the points on the way (chain rule).

    The inverse has the same with the opposite sign (inverse function theorem).
    """
    nets = [theory.steep_net(3, 0.9, seed=index) for index in range(3)]
    chain = CompositeTransform([ResidualTransform(net) for net in nets])
    inputs = torch.randn(4, 3, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: chain(x[None])[0][0]))(inputs)
    outputs, logabsdet = chain(inputs)
    torch.testing.assert_close(logabsdet, torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(chain.inverse(outputs)[1], -logabsdet)


@pytest.mark.parametrize("step", [0.1, 0.5, 0.99])
def test_an_euler_step_below_one_over_the_lipschitz_constant_is_invertible(step: float) -> None:
    """y = x + h f(x) with h Lip(f) < 1 is invertible (Behrmann et al., 2019, section 2)."""
    field = Linear(step * rotation())
    block = ResidualTransform(field, solver=PICARD)
    inputs = torch.randn(5, 2, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block.inverse(block(inputs)[0])[0], inputs)


def test_an_euler_step_that_is_too_long_is_not() -> None:
    """y = x + h f(x) with h Lip(f) = 1 can map a line to a point: f(x) = -x, h = 1 (ibid.)."""
    block = ResidualTransform(Linear(-torch.eye(2, dtype=torch.float64)), estimator=logdet.Exact())
    inputs = torch.randn(5, 2, dtype=torch.float64)
    outputs, logabsdet = block(inputs)
    assert bool((outputs == 0).all())
    assert bool((logabsdet == -math.inf).all())
    with pytest.raises(solvers.FixedPointNotConverged):
        block.inverse(torch.ones(1, 2, dtype=torch.float64))


def test_a_deep_net_of_euler_steps_tends_to_the_flow_of_the_ode() -> None:
    """x(1) of dx/dt = A x is exp(A) x, log|det| is tr A; Euler's error is O(h).

    Chen et al., Neural ordinary differential equations, 2018, theorem 1 (Liouville's formula).
    """
    field = theory.matrix(3, 1.5, seed=4)
    inputs = torch.randn(6, 3, dtype=torch.float64)
    expected, errors = inputs @ torch.linalg.matrix_exp(field).mT, []
    for depth in (32, 64, 128, 256):
        steps = [ResidualTransform(Linear(field / depth)) for _ in range(depth)]
        with torch.no_grad():
            outputs, logabsdet = CompositeTransform(steps)(inputs)
        drift = (logabsdet - field.trace()).abs()
        errors.append(torch.tensor([(outputs - expected).abs().max(), drift.max()]))
    ratios = torch.stack(errors[:-1]) / torch.stack(errors[1:])
    assert bool(((ratios > 1.7) & (ratios < 2.4)).all())


class Linear(nn.Module):
    """g(x) = A x with the norm of A as its constant, where that is below one."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        norm = float(torch.linalg.matrix_norm(weight, ord=2))
        self.lipschitz = norm if norm < 1 else None

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.mT


def rotation() -> Tensor:
    """f(x) = R x turns by a right angle: Lip(f) = 1, and no eigenvalue is real."""
    return torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)


def distance(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).norm(dim=1)


def jacobians(net: nn.Module, features: int) -> Tensor:
    inputs = torch.randn(200, features, dtype=torch.float64)
    with torch.no_grad():
        jacobian = linearize(net, inputs).jacobian()
    assert float(torch.linalg.matrix_norm(jacobian, ord=2).max()) > 0.3, "a flat net proves nothing"
    return jacobian


SERIES = (
    planted_theory.WithoutOneOverK,
    planted_theory.WithoutSigns,
    planted_theory.OneTermShort,
)


@pytest.mark.parametrize("series", SERIES)
def test_a_wrong_series_is_seen(series: type[logdet.PowerSeries]) -> None:
    wrong = series(num_terms=5, num_probes=8, probe=theory.AllSigns(3), exact_trace=False)
    with pytest.raises(AssertionError):
        theory.check_series(wrong, theory.matrix(3, 0.9))


def test_a_bound_that_is_off_by_one_is_seen() -> None:
    with pytest.raises(AssertionError, match="below the tail"):
        theory.check_bias(
            planted_theory.BoundOfOneMoreTerm(num_terms=4, exact_trace=False), 0.5, features=3
        )


@pytest.mark.parametrize("roulette", [planted_logdet.Unweighted, planted_logdet.OffByOne])
def test_wrong_weights_of_the_roulette_are_seen(roulette: type[logdet.RussianRoulette]) -> None:
    with pytest.raises(AssertionError):
        theory.check_weights(roulette(), 0.9)


@pytest.mark.parametrize("lipschitz", [0.3, 0.9])
def test_a_slow_iteration_is_seen(lipschitz: float) -> None:
    targets = torch.ones(1, 3, dtype=torch.float64)
    for solver, is_slow in (
        (solvers.FixedPointIteration(), False),
        (planted_theory.Damped(), True),
    ):
        arguments = (solver, lambda x: targets + lipschitz * x, targets, lipschitz)
        if is_slow:
            with pytest.raises(AssertionError, match="step"):
                theory.check_banach_rate(*arguments)
        else:
            theory.check_banach_rate(*arguments)


def test_a_density_with_the_wrong_sign_is_seen() -> None:
    torch.manual_seed(0)
    flow = planted_theory.WrongSign(1, 16, num_layers=3, coeff=0.9).double().eval()
    with pytest.raises(AssertionError):
        theory.check_density(flow)
