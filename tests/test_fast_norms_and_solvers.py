"""Norms in short precision, solvers that leave rows out, series that stop: still right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nflows_iresnet import logdet, nn, solvers, transforms
from nflows_iresnet.linearization import Linearization
from nflows_iresnet.nn.dense import DenseFunction


@pytest.mark.parametrize("size", [(2, 2), (64, 64), (128, 64), (256, 256), (300, 300)])
@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "rank-one", "huge", "tiny", "zero"])
def test_the_gram_iteration_in_float32_is_an_upper_bound(size: tuple[int, int], kind: str) -> None:
    torch.manual_seed(4)
    weight = torch.randn(size)
    if kind == "orthogonal":
        weight = torch.linalg.qr(weight).Q
    if kind == "rank-one":
        weight = torch.outer(weight[:, 0], weight[0])
    weight = weight * {"huge": 1e36, "tiny": 1e-36, "zero": 0.0}.get(kind, 1.0)
    true = float(torch.linalg.matrix_norm(weight.double(), 2))
    bound = float(nn.SchattenNorm()(weight))
    assert true <= bound <= 1.04 * true
    torch.testing.assert_close(bound, float(nn.SchattenNorm()(weight.double())), rtol=1e-5, atol=0)


def test_the_gram_iteration_trusts_no_short_products() -> None:
    """TensorFloat-32 has 10 bits: where it is allowed, the norm is computed in float64."""
    weight = torch.randn(32, 32)
    assert nn.SchattenNorm()._dtype(weight) == torch.float32
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert nn.SchattenNorm()._dtype(weight) == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)


class Counted:
    """x -> c - A x row by row, each with its own rate; counts the rows that it was asked for."""

    def __init__(self, rates: Tensor, offset: Tensor, tally: list[int]) -> None:
        self.rates, self.offset, self.tally = rates, offset, tally

    def __call__(self, point: Tensor) -> Tensor:
        self.tally.append(len(point))
        return self.offset - self.rates[:, None] * point.sin()

    def select(self, selected: Tensor) -> Counted:
        return Counted(self.rates[selected], self.offset[selected], self.tally)


@pytest.mark.parametrize(
    "solver", [solvers.Anderson(), solvers.Anderson(history=1), solvers.FixedPointIteration()]
)
def test_rows_that_are_done_are_no_longer_evaluated(solver: solvers.Solver) -> None:
    torch.manual_seed(5)
    rates, offset = torch.linspace(0, 0.97, 1000).double(), torch.randn(1000, 4).double()
    selectable = Counted(rates, offset, [])
    everything = Counted(rates, offset, [])
    fast = solver(selectable, offset, 0.97)
    slow = solver(lambda point: everything(point), offset, 0.97)
    assert sum(selectable.tally) < 0.8 * sum(everything.tally)
    assert len(selectable.tally) == len(everything.tally)
    torch.testing.assert_close(fast.value, slow.value, rtol=0, atol=1e-10)
    torch.testing.assert_close(fast.num_steps, slow.num_steps)
    residual = torch.linalg.vector_norm(everything(fast.value) - fast.value, dim=1)
    torch.testing.assert_close(residual, fast.residual, rtol=1e-3, atol=1e-15)


def test_a_context_follows_its_rows_through_the_inverse() -> None:
    """Contexts of very different rows: a mix-up of rows would not invert."""
    torch.manual_seed(6)
    block = transforms.ResidualTransform(nn.LipschitzMLP(3, [16, 16], 2)).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(3)
    inputs, context = torch.randn(500, 3).double(), 5 * torch.randn(500, 2).double()
    outputs, logabsdet = block(inputs, context)
    found, inverse_logabsdet = block.inverse(outputs, context)
    torch.testing.assert_close(found, inputs, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet, rtol=0, atol=1e-8)


def test_terms_that_rounding_loses_are_not_computed() -> None:
    """Powers of a tiny Jacobian become subnormal, and products with those are very slow."""
    products: list[Tensor] = []

    class Tiny(torch.nn.Module):
        lipschitz = 0.9

        def bind(self, context: Tensor | None = None) -> TinyFunction:
            return TinyFunction()

    class TinyFunction(DenseFunction):
        def __init__(self) -> None:
            eye = 1e-6 * torch.eye(3)
            super().__init__([eye], [torch.zeros(3)], [], 0.9)

        def linearize(self, inputs: Tensor) -> Linearization:
            at = super().linearize(inputs)
            original = at.vjp

            def counted(cotangent: Tensor) -> Tensor:
                products.append(cotangent)
                return original(cotangent)

            at.vjp = counted  # type: ignore[method-assign]
            return at

    with torch.no_grad():
        _, logabsdet = logdet.PowerSeries(num_terms=100)(Tiny(), torch.zeros(4, 3))
    torch.testing.assert_close(logabsdet, torch.full((4,), 3e-6), rtol=1e-4, atol=0)
    assert len(products) < 10
