"""The equations of the method, III: norms of weights, and why power iteration certifies nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nflows_iresnet import nn
from nflows_iresnet.nn.norms import FrobeniusNorm, PowerIteration, SchattenNorm, SpectralNorm
from tests import theory

SHAPES = [(4, 4), (7, 3), (3, 8)]


def rectangular(shape: tuple[int, int]) -> Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_spectral_norm_is_the_root_of_the_largest_eigenvalue(shape: tuple[int, int]) -> None:
    """|W|_2 = max |W x| / |x| = sqrt(lambda_max(W^T W)) (Miyato et al., 2018, section 2.1)."""
    weight = rectangular(shape)
    expected = torch.linalg.eigvalsh(weight.mT @ weight)[-1].sqrt()
    torch.testing.assert_close(SpectralNorm()(weight), expected, rtol=1e-11, atol=0)
    directions = torch.randn(2000, shape[1], dtype=torch.float64)
    assert bool(((directions @ weight.mT).norm(dim=1) <= expected * directions.norm(dim=1)).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_power_iteration_from_ones_converges_from_below(shape: tuple[int, int]) -> None:
    """u^T W v <= |W|_2 increases to |W|_2 (Gouk et al., 2018; Behrmann et al., 2019)."""
    weight = rectangular(shape)
    estimator = PowerIteration(num_initial_steps=1)
    state, norm = estimator.initial_state(weight), float(SpectralNorm()(weight))
    values = []
    for _ in range(500):
        values.append(float(estimator(weight, state)))
        estimator.advance(weight, state)
    assert all(later >= sooner - 1e-12 for sooner, later in itertools.pairwise(values))
    assert values[0] < 0.999 * norm
    assert max(values) <= norm
    assert values[-1] == pytest.approx(norm, rel=1e-9)


def test_power_iteration_misses_a_direction_orthogonal_to_its_start() -> None:
    """W = 2 e e^T + f f^T, e = (1, 1, -1, -1) / 2, f = (1, 1, 1, 1) / 2: ones are 2 f, |W|_2 = 2.

    Started from ones the iteration stays at 1, for ever (all of its numbers are exact here, so that
    rounding does not help it out): it is no certificate. What a network says of itself does not
    rely on it.
    """
    top, start = torch.tensor([[1.0, 1, -1, -1], [1, 1, 1, 1]], dtype=torch.float64) / 2
    weight = 2 * torch.outer(top, top) + torch.outer(start, start)
    estimator = PowerIteration(num_initial_steps=1000)
    assert float(estimator(weight, estimator.initial_state(weight))) == 1
    assert float(SpectralNorm()(weight)) == pytest.approx(2)
    assert nn.lipschitz_bound(linear_layer(weight)) == pytest.approx(2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_frobenius_norm_is_an_upper_bound(shape: tuple[int, int]) -> None:
    """|W|_2 <= |W|_F <= sqrt(rank) |W|_2, as |W|_F^2 = sum_i sigma_i^2 (Golub, Van Loan, 2.3)."""
    spectral, frobenius = norms(rectangular(shape), FrobeniusNorm())
    assert spectral <= frobenius <= math.sqrt(min(shape)) * spectral


def test_the_frobenius_bounds_are_attained() -> None:
    """|W|_F = |W|_2 for rank one, and sqrt(d) |W|_2 for the identity (ibid.)."""
    outer = torch.outer(torch.arange(1.0, 4.0), torch.ones(5)).double()
    spectral, frobenius = norms(outer, FrobeniusNorm())
    assert frobenius == pytest.approx(spectral)
    spectral, frobenius = norms(torch.eye(9, dtype=torch.float64), FrobeniusNorm())
    assert frobenius == pytest.approx(3 * spectral)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_squarings", [0, 2, 7])
def test_the_schatten_norm_is_an_upper_bound(shape: tuple[int, int], num_squarings: int) -> None:
    """|W|_2 <= (sum_i sigma_i^p)^{1/p} <= min(out, in)^{1/p} |W|_2, p = 2^{s+1} + 2.

    Delattre et al., 2023, for the Gram iteration; the powers of W W^T are traces of sigma^p.
    """
    weight = rectangular(shape)
    order = 2 ** (num_squarings + 1) + 2
    spectral, schatten = norms(weight, SchattenNorm(num_squarings))
    scaled = torch.linalg.svdvals(weight) / spectral
    expected = spectral * float(scaled.pow(order).sum()) ** (1 / order)
    assert schatten == pytest.approx(expected, rel=1e-4)
    assert spectral <= schatten <= min(shape) ** (1 / order) * spectral * (1 + 1e-4)


def test_a_norm_of_a_product_is_at_most_the_product_of_norms() -> None:
    """Lip(g) <= prod |W_i|_2 for slopes of at most one (Szegedy et al., 2014, section 4.3)."""
    net = theory.steep_net(3, 0.9)
    assert net.lipschitz_bound() == pytest.approx(0.9, rel=0.02)
    first, second = torch.randn(2, 500, 3, dtype=torch.float64)
    with torch.no_grad():
        stretch = (net(first) - net(second)).norm(dim=1) / (first - second).norm(dim=1)
    assert 0.1 < float(stretch.max()) <= net.lipschitz_bound()


def norms(weight: Tensor, norm: FrobeniusNorm | SchattenNorm) -> tuple[float, float]:
    return float(torch.linalg.matrix_norm(weight, ord=2)), float(norm(weight))


def linear_layer(weight: Tensor) -> torch.nn.Linear:
    outputs, inputs = weight.shape
    layer = torch.nn.Linear(inputs, outputs, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight)
    return layer
