"""Solvers that leave rows out, series that stop: still right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nflows_iresnet import logdet, nn, solvers, transforms
from nflows_iresnet.linearization import Linearization
from nflows_iresnet.nn.mlp import DenseFunction


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
    assert sum(selectable.tally) < 0.9 * sum(everything.tally)
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
    assert len(products) < 20
