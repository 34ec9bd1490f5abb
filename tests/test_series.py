"""The weighted series: what it costs in products and memory, and where it stops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nflows_iresnet import logdet, nn
from nflows_iresnet.linearization import linearize
from nflows_iresnet.logdet.power_series import weighted_series
from nflows_iresnet.nn.mlp import DenseLinearization


def test_the_graph_does_not_grow_with_the_number_of_terms() -> None:
    net = nn.LipschitzMLP(6, [16, 16], coeff=0.9)
    inputs = torch.randn(32, 6)

    def saved_elements(num_terms: int) -> int:
        elements = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logdet.PowerSeries(num_terms=num_terms)(net, inputs)
        return elements

    assert saved_elements(3) == saved_elements(100) > 0


def test_weighted_series_without_terms_beyond_the_trace() -> None:
    net = nn.LipschitzMLP(3, [4]).double()
    at_inputs = linearize(net, torch.randn(2, 3, dtype=torch.float64))
    probe = torch.ones(2, 3, dtype=torch.float64)
    value = weighted_series(at_inputs, probe, [1.0], exact_trace=True)
    torch.testing.assert_close(value, at_inputs.trace())


class Counted(DenseLinearization):
    """J = c I with the products written down."""

    def __init__(self, factor: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(torch.zeros(2, 3, dtype=dtype), [factor * torch.eye(3, dtype=dtype)], [])
        self.multiplied: list[Tensor] = []

    def vjp(self, cotangent: Tensor) -> Tensor:
        self.multiplied.append(cotangent)
        return super().vjp(cotangent)

    def jvp(self, tangent: Tensor) -> Tensor:
        self.multiplied.append(tangent)
        return super().jvp(tangent)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("exact_trace", [True, False])
def test_a_series_of_n_terms_takes_n_products(grad: bool, exact_trace: bool) -> None:
    """The last product of the value is the one that the derivative needs."""
    at = Counted(-0.5)
    probe = torch.ones(2, 3, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        value = weighted_series(at, probe, [1.0] * 7, exact_trace)
    assert len(at.multiplied) == 7
    expected = -3 * sum(0.5**term / term for term in range(1, 8))
    torch.testing.assert_close(value, torch.full_like(value, expected), rtol=0, atol=1e-14)


def test_products_that_are_lost_in_rounding_are_left_out() -> None:
    """They would be with subnormal numbers, for which a CPU takes a hundred times as long."""
    at = Counted(0.05, torch.float32)
    value = weighted_series(at, torch.ones(2, 3), [1.0] * 100, exact_trace=False)
    smallest = min(float(each.abs().amax()) for each in at.multiplied)
    assert smallest > torch.finfo(torch.float32).tiny ** 0.75
    assert len(at.multiplied) < 40
    torch.testing.assert_close(value, torch.full((2,), 3 * math.log1p(0.05)))
