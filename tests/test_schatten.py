"""The Schatten norm in short precision: an upper bound of hostile weights, and who needs it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nflows_iresnet import ResidualFlow, nn
from nflows_iresnet.nn import norms as schatten

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


def test_it_trusts_no_short_products() -> None:
    """TensorFloat-32 has 10 bits: where it is allowed, the norm is computed in float64."""
    weight = torch.randn(32, 32)
    assert nn.SchattenNorm()._dtype(weight) == torch.float32
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert nn.SchattenNorm()._dtype(weight) == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)


def test_it_uses_float32_as_far_as_it_says() -> None:
    norm = nn.SchattenNorm()
    dtypes = [norm._dtype(torch.empty(2000, size)) for size in (16, 17, 608, 640)]
    assert dtypes == [torch.float64, torch.float32, torch.float32, torch.float64]


def test_weights_of_a_float64_network_may_have_any_size() -> None:
    """The squares of the entries are neither zero nor infinite."""
    for factor in (1e-200, 1e200):
        weight = factor * torch.eye(3, dtype=torch.float64)
        assert factor <= float(nn.SchattenNorm()(weight)) <= 1.01 * factor
