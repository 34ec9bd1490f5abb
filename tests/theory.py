"""The laws of the method as checks of any solver, series, roulette or flow that claims to obey."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from unittest import mock

import torch
from torch import Tensor

from nflows_iresnet import flows, logdet, nn, solvers

Map = Callable[[Tensor], Tensor]
DOUBLE = torch.float64
RAREST = 1e-12
"""Truncations less likely than this are left out of sums over their law."""


@lru_cache
def steep_net(features: int, coeff: float, *, seed: int = 0) -> nn.LipschitzMLP:
    """A network trained until its certificate binds: g(x) = -tanh(2 x), as far as it is allowed."""
    torch.manual_seed(seed)
    net = nn.LipschitzMLP(features, [16, 16], coeff=coeff).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(60):
        inputs = torch.randn(64, features, dtype=DOUBLE)
        loss = (net(inputs) + (2 * inputs).tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)


def matrix(features: int, norm: float, *, seed: int = 0) -> Tensor:
    """A random matrix without any symmetry, of a given spectral norm."""
    torch.manual_seed(seed)
    entries = torch.randn(features, features, dtype=DOUBLE)
    return norm * entries / torch.linalg.matrix_norm(entries, ord=2)


def linear(weight: Tensor) -> Map:
    """g(x) = A x."""
    return lambda inputs: inputs @ weight.mT


def multiple(factor: float) -> Map:
    """g(x) = factor x."""
    return lambda inputs: factor * inputs


def slogdet(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and log of |det(I + J)|."""
    identity = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype)
    sign, logabsdet = torch.linalg.slogdet(identity + jacobian)
    return sign, logabsdet


def traces(weight: Tensor, count: int) -> list[float]:
    """tr A, tr A^2, ..., tr A^count."""
    power, found = torch.eye(len(weight), dtype=weight.dtype), []
    for _ in range(count):
        power = power @ weight
        found.append(float(power.trace()))
    return found


class AllSigns:
    """Every vector of signs, once: the mean over them is the expectation, without randomness."""

    def __init__(self, features: int) -> None:
        self._vectors = itertools.cycle(itertools.product((-1.0, 1.0), repeat=features))

    def sample_like(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.tensor(next(self._vectors), dtype=inputs.dtype).expand_as(inputs)


# --- Banach ---------------------------------------------------------------------------------------


def iterates(solver: solvers.Solver, fn: Map, init: Tensor) -> list[Tensor]:
    """The points x_0, x_1, ... at which a solver evaluates the map."""
    seen: list[Tensor] = []

    def recorded(point: Tensor) -> Tensor:
        seen.append(point.clone())
        return fn(point)

    solver(recorded, init)
    return seen


def check_banach_rate(solver: solvers.Solver, fn: Map, init: Tensor, lipschitz: float) -> float:
    """Check |x_n - x*| <= L^n / (1 - L) |x_1 - x_0|; return the largest ratio of the two sides."""
    points = iterates(solver, fn, init)
    first = (points[1] - points[0]).norm(dim=1)
    largest = 0.0
    for n, point in enumerate(points):
        bound = lipschitz**n / (1 - lipschitz) * first
        error = (point - points[-1]).norm(dim=1)
        is_resolved = bound > 1e-8 * (1 + points[-1].norm(dim=1))
        assert bool((error <= bound * (1 + 1e-3))[is_resolved].all()), f"step {n}: {error / bound}"
        if bool(is_resolved.any()):
            largest = max(largest, float((error / bound)[is_resolved].max()))
    return largest


# --- series ---------------------------------------------------------------------------------------


def series_of(weight: Tensor, num_terms: int) -> float:
    """sum_{k <= N} (-1)^{k+1} tr(J^k) / k, from the powers of the matrix."""
    return sum((-1) ** k * trace / (k + 1) for k, trace in enumerate(traces(weight, num_terms)))


def tail_bound(lipschitz: float, features: int, num_terms: int) -> float:
    """-d (ln(1 - L) + sum_{k <= N} L^k / k) = d sum_{k > N} L^k / k, summed from the end."""
    terms = (lipschitz**k / k for k in range(num_terms + 20_000, num_terms, -1))
    return features * math.fsum(terms)


def check_series(estimator: logdet.PowerSeries, weight: Tensor) -> None:
    """Check that the mean over all probes is the power series cut after `num_terms` terms."""
    origin = torch.zeros(1, len(weight), dtype=DOUBLE)
    _, logabsdet = estimator(linear(weight), origin)
    torch.testing.assert_close(
        float(logabsdet), series_of(weight, estimator.num_terms), rtol=0, atol=1e-12
    )


def check_bias(series: logdet.PowerSeries, lipschitz: float, features: int) -> float:
    """Check error <= tail <= bias_bound at J = -L I, the worst Jacobian; return the error."""
    origin = torch.zeros(1, features, dtype=DOUBLE)
    _, logabsdet = series(multiple(-lipschitz), origin)
    error = abs(float(logabsdet) - features * math.log1p(-lipschitz))
    tail = tail_bound(lipschitz, features, series.num_terms)
    assert error <= tail * (1 + 1e-9) + 1e-13
    assert tail <= series.bias_bound(lipschitz, features), "the bound is below the tail"
    return error


# --- roulette -------------------------------------------------------------------------------------


@contextmanager
def uniform(value: float) -> Iterator[None]:
    """Make the roulette draw its truncation from this uniform number, u in (0, 1]."""
    with mock.patch("torch.rand", return_value=torch.tensor(1 - value, dtype=DOUBLE)):
        yield


def law(estimator: logdet.RussianRoulette, lipschitz: float) -> Iterator[tuple[float, float]]:
    """P(N = n), and a uniform number that makes N = n, for n = num_exact_terms, ...."""
    reached, term = 1.0, estimator.num_exact_terms
    while reached > RAREST:
        passed = estimator.survival(term + 1, lipschitz)
        yield reached - passed, (reached + passed) / 2
        reached, term = passed, term + 1


def check_weights(estimator: logdet.RussianRoulette, lipschitz: float) -> None:
    """Check E[c_k] = sum_n P(N = n) c_k(n) = 1 for each term k, by summing the law."""
    mean = torch.zeros(2000, dtype=DOUBLE)
    for probability, number in law(estimator, lipschitz):
        with uniform(number):
            weights = torch.tensor(estimator.term_weights(lipschitz), dtype=DOUBLE)
        mean[: len(weights)] += probability * weights
    likely = [term for term in range(20) if estimator.survival(term + 1, lipschitz) > 1e6 * RAREST]
    torch.testing.assert_close(
        mean[likely], torch.ones(len(likely), dtype=DOUBLE), rtol=0, atol=1e-5
    )


def moments(
    estimator: logdet.RussianRoulette, lipschitz: float
) -> Iterator[tuple[float, float, float]]:
    """P(N = n), its uniform number, and sum_{k <= n} (L^k / k) / P(N >= k), the estimate at -L."""
    total = sum(lipschitz**k / k for k in range(1, estimator.num_exact_terms))
    for index, (probability, number) in enumerate(law(estimator, lipschitz)):
        term = index + estimator.num_exact_terms
        total += lipschitz**term / term / estimator.survival(term, lipschitz)
        yield probability, number, total


# --- densities ------------------------------------------------------------------------------------


def check_density(flow: flows.Flow, low: float = -40.0, high: float = 40.0) -> None:
    """Check that a density on the line integrates to one, by the trapezoidal rule."""
    points = torch.linspace(low, high, 20_001, dtype=DOUBLE)
    with torch.no_grad():
        density = flow.log_prob(points[:, None]).exp()
    assert abs(float(torch.trapezoid(density, points)) - 1) < 1e-6
