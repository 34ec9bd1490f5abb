"""The Schatten norm in short precision: an upper bound of hostile weights, and who needs it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nflows_iresnet import ResidualFlow, nn
from nflows_iresnet.nn import norms as schatten
from nflows_iresnet.nn.norms import FrobeniusNorm, PowerIteration, SchattenNorm, SpectralNorm
from tests import theory

SIZES = [(2, 2), (16, 17), (64, 64), (128, 64), (256, 256), (300, 700), (512, 512), (620, 620)]


def orthogonal(size: tuple[int, int]) -> Tensor:
    return torch.linalg.qr(torch.randn(max(size), min(size)))[0].reshape(size)


def toeplitz(size: tuple[int, int]) -> Tensor:
    """Rows of a filter, shifted: singular values that lie densely below the largest."""
    distance = torch.arange(size[0])[:, None] - torch.arange(size[1])
    return torch.exp(-distance.abs() / 3.0) * (1 - 0.1 * distance.sign())


def hadamard(size: tuple[int, int]) -> Tensor:
    """Signs with orthogonal rows: all that can be lost to rounding is lost here."""
    signs = torch.ones(1, 1)
    while len(signs) < max(size):
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs[: size[0], : size[1]]


KINDS: dict[str, Callable[[tuple[int, int]], Tensor]] = {
    "gaussian": torch.randn,
    "equal singular values": orthogonal,
    "rank one": lambda size: torch.outer(torch.randn(size[0]), torch.randn(size[1])),
    "one value": torch.ones,
    "toeplitz": toeplitz,
    "hadamard": hadamard,
    "huge": lambda size: 1e36 * torch.randn(size),
    "tiny": lambda size: 1e-36 * torch.randn(size),
    "subnormal": lambda size: 1e-42 * torch.randn(size),
    "zero": torch.zeros,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_an_upper_bound_in_float32_and_the_same_in_float64(
    size: tuple[int, int], kind: str
) -> None:
    torch.manual_seed(4)
    weight = KINDS[kind](size)
    true = float(torch.linalg.matrix_norm(weight.double(), 2))
    norm = nn.SchattenNorm()
    bound, gradient = norm.value_and_gradient(weight, {})
    slack = min(size) ** (1 / norm._order) * norm._allowance(weight)
    assert true <= float(bound) <= slack * true * (1 + 1e-6)
    assert slack <= 1.031
    of_double, gradient_of_double = norm.value_and_gradient(weight.double(), {})
    torch.testing.assert_close(bound, of_double, rtol=4e-6, atol=0)
    torch.testing.assert_close(gradient.double(), gradient_of_double, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (256, 200), (512, 512)])
@pytest.mark.parametrize("num_squarings", [0, 1, 7, 10])
def test_the_gradient_belongs_to_the_value(size: tuple[int, int], num_squarings: int) -> None:
    """<grad |W|, W> = |W|, the allowance included: else normalising would not be a projection."""
    torch.manual_seed(5)
    weight = torch.randn(size)
    value, gradient = nn.SchattenNorm(num_squarings).value_and_gradient(weight, {})
    torch.testing.assert_close((gradient * weight).sum().double(), value, rtol=1e-5, atol=0)


def test_trained_weights_are_certified() -> None:
    torch.manual_seed(6)
    flow = ResidualFlow(8, 300, 1)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    inputs = torch.randn(64, 8).sign() + 0.1 * torch.randn(64, 8)
    for _ in range(5):
        optimizer.zero_grad()
        (-flow.log_prob(inputs).mean()).backward()
        optimizer.step()
    for weight in (each.detach() for each in flow.parameters() if each.dim() == 2):
        true = float(torch.linalg.matrix_norm(weight.double(), 2))
        assert true <= float(nn.SchattenNorm()(weight)) <= 1.02 * true


def conference(prime: int) -> Tensor:
    """Paley's symmetric matrix C of zeros on the diagonal and signs, C^2 = prime I."""
    squares = torch.zeros(prime, dtype=torch.bool)
    squares[torch.arange(1, prime) ** 2 % prime] = True
    residues = torch.where(squares, 1.0, -1.0).double()
    residues[0] = 0
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = residues[(torch.arange(prime)[:, None] - torch.arange(prime)) % prime]
    matrix[0, 0] = 0
    return matrix


def hostile_to_rounding(prime: int) -> tuple[Tensor, Tensor]:
    """Return W and x, W x = x, W^T W = 0.9 Q + 0.1 x x^T: |Q| attains the lemma of the proof."""
    torch.manual_seed(7)
    identity = torch.eye(prime + 1, dtype=torch.float64)
    projection = (identity + conference(prime) / prime**0.5) / 2
    top = torch.randn(prime + 1, dtype=torch.float64)
    for _ in range(50):
        top = torch.nn.functional.normalize(projection @ top.sign(), dim=0)
    outer = torch.outer(top, top)
    return 0.9**0.5 * (projection - outer) + outer, top


def test_the_allowance_is_needed_and_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that err as much as float32 products of any order may, and in the worst direction.

    A quarter of the allowance would not do. Actual rounding errors cancel.
    """
    weight, top = hostile_to_rounding(509)
    signs = torch.outer(top.sign(), top.sign()).float()

    def worst(matrix: Tensor, out: Tensor | None = None) -> Tensor:
        product = matrix.mT @ matrix
        if matrix.dtype == torch.float64:
            return product
        return product - len(matrix) * 2.0**-24 * signs * (matrix.abs().mT @ matrix.abs())

    monkeypatch.setattr(schatten, "gram_matrix", worst)
    norm, rounded = nn.SchattenNorm(), weight.float()
    true = float(torch.linalg.matrix_norm(rounded.double(), 2))
    value, allowance = float(norm(rounded)), norm._allowance(rounded)
    assert true <= value
    assert value / allowance * (1 + (allowance - 1) / 4) < true


def test_derivatives_of_a_norm_are_those_of_the_state_that_it_was_taken_with() -> None:
    """A backward pass that is recorded comes after the vectors have moved on."""
    torch.manual_seed(0)
    norm = nn.PowerIteration(num_initial_steps=1)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    state = norm.initial_state(weight.detach())
    _, expected = norm.value_and_gradient(weight.detach(), state)
    expected = expected.clone()
    (value,) = schatten.norms_of([weight[None]], [norm], [[state]])
    for each in state.values():
        each.copy_(torch.nn.functional.normalize(torch.randn_like(each), dim=0))
    (gradient,) = torch.autograd.grad(value.sum(), weight, create_graph=True)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [64, 4096])
def test_the_allowance_counts_the_rows_of_a_tall_weight(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int
) -> None:
    """A Gram matrix adds up as many products as there are rows, and may lose a rounding at each."""

    def worst(matrix: Tensor, out: Tensor | None = None) -> Tensor:
        product = matrix.mT @ matrix
        return product - matrix.shape[-2] * 2.0**-53 * (matrix.abs().mT @ matrix.abs())

    monkeypatch.setattr(schatten, "gram_matrix", worst)
    value = float(nn.SchattenNorm()(torch.ones(rows, 1, dtype=dtype)))
    assert rows**0.5 <= value <= rows**0.5 * (1 + 1e-9)


@pytest.mark.parametrize("size", [255, 257, 300, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_blocks_of_a_gram_matrix_are_in_their_places(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    matrices = torch.randn(2, size + 3, size, dtype=dtype)
    expected = matrices.double().mT @ matrices.double()
    sums = matrices.double().abs().mT @ matrices.double().abs()
    rounding = (size + 3) * torch.finfo(dtype).eps * sums
    spare = torch.full((2, size, size), torch.nan, dtype=dtype)
    for out in (None, spare):
        error = (schatten.gram_matrix(matrices, out=out) - expected).abs()
        assert bool((error <= rounding).all())


def test_it_uses_float32_as_far_as_it_says() -> None:
    norm = nn.SchattenNorm()
    dtypes = [norm._dtype(torch.empty(2000, size)) for size in (16, 17, 608, 640)]
    assert dtypes == [torch.float64, torch.float32, torch.float32, torch.float64]


def test_weights_of_a_float64_network_may_have_any_size() -> None:
    """The squares of the entries are neither zero nor infinite."""
    for factor in (1e-200, 1e200):
        weight = factor * torch.eye(3, dtype=torch.float64)
        assert factor <= float(nn.SchattenNorm()(weight)) <= 1.01 * factor


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


def test_power_iteration_is_a_lower_bound_from_its_start() -> None:
    """Vectors of ones as they are would be longer than 1."""
    torch.manual_seed(0)
    for _ in range(5):
        weight = torch.randn(6, 4, dtype=torch.float64)
        norm = nn.PowerIteration(num_initial_steps=0)
        estimate = norm.differentiable(weight, norm.initial_state(weight))
        assert abs(float(estimate)) <= float(torch.linalg.matrix_norm(weight, ord=2))


@pytest.mark.parametrize("norm", [SpectralNorm(), FrobeniusNorm()], ids=str)
@pytest.mark.parametrize("factor", [1e-200, 1e-163, 1e160, 1e200])
def test_norms_and_gradients_are_those_of_the_same_weight_times_any_factor(
    norm: SpectralNorm | FrobeniusNorm, factor: float
) -> None:
    """The squares of these would be zero or infinite in float64."""
    weights = torch.stack([rectangular((5, 4)), 1e3 * rectangular((5, 4)).cos()])
    value, gradient = norm.value_and_gradient(factor * weights, {})
    expected, its_gradient = norm.value_and_gradient(weights, {})
    torch.testing.assert_close(value / factor, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, its_gradient, rtol=0, atol=1e-10)
    slow = norm.differentiable(factor * weights[0], {})
    torch.testing.assert_close(slow / factor, expected[0], rtol=1e-12, atol=0)
