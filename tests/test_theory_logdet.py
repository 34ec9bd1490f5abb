"""The equations of the method, II: log-determinants, traces, truncations and densities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nflows_iresnet import flows, logdet
from tests import theory


@pytest.mark.parametrize("norm", [0.3, 0.9])
def test_log_det_is_trace_of_log(norm: float) -> None:
    """ln det(I + J) = tr ln(I + J) (Jacobi; Behrmann et al., 2019, section 3).

    ln(I + J) = V diag(ln(1 + lambda)) V^{-1}, the matrix logarithm, from the eigenvalues lambda.
    """
    weight = theory.matrix(5, norm)
    values, vectors = torch.linalg.eig(weight)
    log = vectors @ torch.diag((1 + values).log()) @ torch.linalg.inv(vectors)
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.matrix_exp(log).real, identity + weight)
    _, logabsdet = logdet.Exact()(theory.linear(weight), torch.zeros(1, 5, dtype=torch.float64))
    torch.testing.assert_close(logabsdet[0], log.trace().real, rtol=0, atol=1e-12)
    assert abs(float(log.trace().imag)) < 1e-12


@pytest.mark.parametrize("num_terms", [1, 2, 5, 12])
def test_the_power_series_of_traces(num_terms: int) -> None:
    """E[estimate] = sum_{k <= N} (-1)^{k+1} tr(J^k) / k (Behrmann et al., 2019, algorithm 2)."""
    theory.check_series(all_signs(num_terms), theory.matrix(4, 0.9))


def test_the_power_series_converges_to_the_log_determinant() -> None:
    """ln det(I + J) = sum_k (-1)^{k+1} tr(J^k) / k for |J| < 1 (Mercator; ibid.)."""
    weight = theory.matrix(4, 0.8)
    expected = float(theory.slogdet(weight)[1])
    assert theory.series_of(weight, 200) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("lipschitz", [0.5, 0.9])
@pytest.mark.parametrize("num_terms", [1, 4, 15])
def test_the_truncation_error_is_bounded(num_terms: int, lipschitz: float) -> None:
    """|PS_N - ln det(I + J)| <= -d (ln(1 - L) + sum_{k <= N} L^k / k).

    Behrmann et al., 2019, theorem 3. The bound is attained by J = -L I, and `bias_bound`, which
    needs no logarithm, is above it by at most the factor 1 / (1 - L).
    """
    series = all_signs(num_terms, features=3)
    tail = theory.tail_bound(lipschitz, 3, num_terms)
    attained = theory.check_bias(series, lipschitz, 3)
    assert attained == pytest.approx(tail, rel=1e-9)
    closed = -3 * (math.log1p(-lipschitz) + sum(lipschitz**k / k for k in range(1, num_terms + 1)))
    assert tail == pytest.approx(closed, rel=1e-9)
    assert series.bias_bound(lipschitz, 3) <= tail / (1 - lipschitz)
    for seed in range(10):
        weight = theory.matrix(3, lipschitz, seed=seed)
        expected = float(theory.slogdet(weight)[1])
        assert abs(theory.series_of(weight, num_terms) - expected) <= tail


def test_the_truncation_error_shrinks_like_the_lipschitz_constant() -> None:
    """PS_N - ln det(I + J) = O(L^N): its ratio tends to L (Behrmann et al., 2019, section 3)."""
    errors = {
        n: theory.check_bias(all_signs(n, features=1), 0.8, 1) for n in (5, 6, 20, 21, 60, 61)
    }
    distances = [abs(errors[n + 1] / errors[n] - 0.8) for n in (5, 20, 60)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.02


def test_hutchinson_with_all_signs() -> None:
    """E[v^T A v] = tr A and Var = 2 sum_{i != j} S_ij^2 for signs, S = (A + A^T) / 2.

    Hutchinson, 1989; here with every vector of signs, so that both are exact.
    """
    weight = theory.matrix(5, 0.9)
    draws = quadratic_forms(weight, theory.AllSigns(5), 2**5)
    symmetric = (weight + weight.mT) / 2
    off_diagonal = symmetric - torch.diag(symmetric.diagonal())
    torch.testing.assert_close(draws.mean(), weight.trace(), rtol=0, atol=1e-13)
    torch.testing.assert_close(draws.var(correction=0), 2 * off_diagonal.square().sum())


def test_the_probe_of_signs_takes_every_vector() -> None:
    """P(v) = 2^{-d} for each vector of signs: `Rademacher` draws from the law above."""
    torch.manual_seed(0)
    vectors = logdet.Rademacher().sample_like(torch.zeros(16_000, 3))
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        share = float((vectors == torch.tensor(signs)).all(1).double().mean())
        assert share == pytest.approx(1 / 8, abs=6 * math.sqrt(7 / 64 / 16_000))


def test_hutchinson_with_gaussians() -> None:
    """E[v^T A v] = tr A and Var = 2 sum_ij S_ij^2 for normal entries (Girard, 1987)."""
    weight = theory.matrix(5, 0.9)
    torch.manual_seed(0)
    count = 20_000
    probes = logdet.Gaussian().sample_like(torch.zeros(count, 5, dtype=torch.float64))
    draws = (probes @ weight * probes).sum(1)
    centred = draws - draws.mean()
    variance = 2 * (weight + weight.mT).div(2).square().sum()
    mean_error = (variance / count).sqrt()
    variance_error = ((centred**4).mean() - variance**2).div(count).sqrt()
    assert float((draws.mean() - weight.trace()).abs() / mean_error) < 6
    assert float((draws.var() - variance).abs() / variance_error) < 6


LAWS = {
    "matched": logdet.RussianRoulette(),
    "matched-one": logdet.RussianRoulette(num_exact_terms=1),
    "matched-1/k": logdet.RussianRoulette(truncation=logdet.LipschitzTruncation(power=1)),
    "geometric": logdet.RussianRoulette(truncation=logdet.GeometricTruncation(0.9)),
}


@pytest.mark.parametrize("estimator", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("lipschitz", [0.5, 0.9])
def test_every_term_of_the_roulette_weighs_one(
    estimator: logdet.RussianRoulette, lipschitz: float
) -> None:
    """E[1{k <= N} / P(N >= k)] = 1 for every k (Kahn, 1955; Chen et al., 2019, theorem 1)."""
    theory.check_weights(estimator, lipschitz)


@pytest.mark.parametrize("lipschitz", [0.5, 0.9, 0.97])
def test_the_matched_law_has_finite_variance_and_its_bound_is_attained(lipschitz: float) -> None:
    """E[estimate^2] <= D^2 sum_{j,k} a_j a_k / p_min(j,k), a_k = L^k / k, equal at J = -L I.

    Summed over the law of N; with signs as probes there is no other randomness at that Jacobian.
    """
    estimator = logdet.RussianRoulette(lipschitz=lipschitz, exact_trace=False)
    mean = second = 0.0
    for index, (probability, number, value) in enumerate(theory.moments(estimator, lipschitz)):
        mean, second = mean + probability * value, second + probability * value**2
        if index < 12:
            assert value == pytest.approx(-estimate_at(number, estimator, lipschitz), abs=1e-9)
    assert mean == pytest.approx(-math.log1p(-lipschitz), abs=1e-6)
    assert second == pytest.approx(estimator.variance_bound(lipschitz, features=1), rel=1e-4)
    assert second - mean**2 < second < math.inf


@pytest.mark.parametrize("power", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("lipschitz", [0.5, 0.97, 0.99999])
def test_the_expected_number_of_terms_is_bounded_for_every_bound(
    power: float, lipschitz: float
) -> None:
    """E[N] = n + sum_{k > n} L^{k-n} (n / k)^s < n + n / (s - 1): the sum is below the integral."""
    for num_exact in (1, 4):
        estimator = logdet.RussianRoulette(
            num_exact_terms=num_exact, truncation=logdet.LipschitzTruncation(power)
        )
        tail = num_exact / (power - 1)
        assert estimator.expected_terms(lipschitz) - num_exact < tail
        if lipschitz > 0.9999 and num_exact == 4:
            assert estimator.expected_terms(lipschitz) - num_exact > 0.7 * tail


def estimate_at(number: float, estimator: logdet.RussianRoulette, lipschitz: float) -> float:
    """The estimate of ln(1 - L) for the truncation that this uniform number stands for."""
    with theory.uniform(number):
        _, logabsdet = estimator(
            theory.multiple(-lipschitz), torch.zeros(1, 1, dtype=torch.float64)
        )
    return float(logabsdet)


def test_the_geometric_law_of_one_half_has_infinite_variance() -> None:
    """P(N = n) estimate(n)^2 ~ (L^2 / q)^n / n^2 grows without end for L^2 > q.

    q = 1/2 is the law of Chen et al., 2019; at L = 0.97 the ratio is 1.88, at L = 0.6 it is 0.72.
    """
    steep = growth_of_second_moments(0.97)
    assert steep == pytest.approx(2 * 0.97**2, rel=0.06)
    assert growth_of_second_moments(0.6) < 1 < steep
    estimator = logdet.RussianRoulette(truncation=logdet.GeometricTruncation(0.5))
    assert estimator.variance_bound(0.97, features=1) == math.inf
    assert estimator.variance_bound(0.6, features=1) < math.inf


def growth_of_second_moments(lipschitz: float) -> float:
    """The ratio of the contributions of two long truncations that follow each other."""
    half = logdet.RussianRoulette(truncation=logdet.GeometricTruncation(0.5))
    parts = [probability * value**2 for probability, _, value in theory.moments(half, lipschitz)]
    return parts[-1] / parts[-2]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_density_on_the_line_integrates_to_one(seed: int) -> None:
    """int p(x) dx = 1 with p(x) = N(F(x)) |F'(x)| (change of variables)."""
    theory.check_density(line_flow(seed))


def test_change_of_variables() -> None:
    """log p_X(x) = log p_Z(F(x)) + log|det DF(x)|, and P(X <= x) = P(Z <= F(x)) as F' > 0.

    Rezende, Mohamed, 2015; here with F' by automatic differentiation, and P by quadrature.
    """
    flow = line_flow(0)
    points = torch.linspace(-40, 3, 10_001, dtype=torch.float64).requires_grad_()
    noise = flow.transform_to_noise(points[:, None])[:, 0]
    (slope,) = torch.autograd.grad(noise.sum(), points)
    log_prob = flow.log_prob(points[:, None]).detach()
    log_normal = -0.5 * noise.detach().square() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(log_prob, log_normal + slope.log(), rtol=0, atol=1e-9)
    probability = torch.trapezoid(log_prob.exp(), points.detach())
    torch.testing.assert_close(
        probability, torch.special.ndtr(noise[-1].detach()), rtol=0, atol=1e-5
    )


def line_flow(seed: int) -> flows.Flow:
    """A flow on the line that is far from the identity."""
    torch.manual_seed(seed)
    flow = flows.ResidualFlow(1, 16, num_layers=3, coeff=0.9).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
        flow.train(False)
        points = torch.linspace(-3, 3, 50, dtype=torch.float64)[:, None]
        assert float(flow._transform(points)[1].std()) > 0.02
    return flow


def all_signs(num_terms: int, features: int = 4) -> logdet.PowerSeries:
    return logdet.PowerSeries(
        num_terms=num_terms,
        num_probes=2**features,
        probe=theory.AllSigns(features),
        exact_trace=False,
    )


def quadratic_forms(weight: Tensor, probe: logdet.Probe, count: int) -> Tensor:
    """v^T A v, as the series of one term computes it."""
    series = logdet.PowerSeries(num_terms=1, probe=probe, exact_trace=False)
    origin = torch.zeros(1, len(weight), dtype=torch.float64)
    return torch.cat([series(theory.linear(weight), origin)[1] for _ in range(count)])
