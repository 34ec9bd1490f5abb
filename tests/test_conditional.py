"""ConditionalAffine: its arguments, its limits, and what it refuses."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nflows_iresnet import nn as lipschitz_nn
from nflows_iresnet.transforms import ConditionalAffine


def test_its_sizes_come_first_and_its_network_by_keyword() -> None:
    parameters = inspect.signature(ConditionalAffine).parameters
    assert list(parameters)[:2] == ["features", "context_features"]
    assert all(each.kind is each.KEYWORD_ONLY for each in list(parameters.values())[2:])
    affine = ConditionalAffine(np.int64(3), np.int64(2))
    outputs, logabsdet = affine(torch.randn(5, 3), torch.randn(5, 2))
    assert (outputs.shape, logabsdet.shape) == ((5, 3), (5,))


@pytest.mark.parametrize(
    "options",
    [
        {"features": 0},
        {"features": True},
        {"features": nn.Linear(2, 6)},
        {"context_features": 0},
        {"context_features": None},
        {"net": 3},
        {"net": nn.Linear},
        {"net": len},
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} must be"):
        ConditionalAffine(**{"features": 3, "context_features": 2, **options})


def test_a_network_with_another_number_of_outputs_is_named() -> None:
    affine = ConditionalAffine(3, 2, net=nn.Linear(2, 5))
    with pytest.raises(ValueError, match=r"net must return 6 values .* shape \(4, 5\)"):
        affine(torch.zeros(4, 3), torch.zeros(4, 2))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_forgotten_context_is_an_error_unless_it_is_optional(direction: str) -> None:
    inputs = torch.randn(4, 3)
    with pytest.raises(ValueError, match="context_features=2, but no context was given"):
        getattr(ConditionalAffine(3, 2), direction)(inputs)
    optional = ConditionalAffine(3, 2, optional_context=True)
    outputs, logabsdet = getattr(optional, direction)(inputs)
    assert torch.equal(outputs, inputs)
    assert torch.equal(logabsdet, torch.zeros(4))
    assert "optional_context=True" in repr(optional)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    ("inputs", "context", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(4, 2), r"\(batch, 3\), got \(4, 2\)"),
        (torch.zeros(3), torch.zeros(4, 2), r"\(batch, 3\), got \(3,\)"),
        (torch.zeros(4, 3), torch.zeros(4, 3), r"context must have shape \(batch, 2\)"),
        (torch.zeros(4, 3), torch.zeros(2), r"context must have shape \(batch, 2\)"),
        (torch.zeros(4, 3), torch.zeros(5, 2), "4 rows of inputs, but 5 of the context"),
        (torch.zeros(4, 3).double(), torch.zeros(4, 2), r"inputs are float64.*\.to\(torch.float32"),
        (torch.zeros(4, 3).long(), torch.zeros(4, 2), r"inputs are int64.*\.to\(torch.float32"),
        (
            torch.zeros(4, 3),
            torch.zeros(4, 2).double(),
            r"context is float64.*\.to\(torch.float32",
        ),
        (torch.zeros(4, 3), torch.zeros(4, 2).long(), r"context is int64.*\.to\(torch.float32"),
    ],
)
def test_inputs_and_contexts_that_do_not_fit_are_named(
    direction: str, inputs: torch.Tensor, context: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ConditionalAffine(3, 2), direction)(inputs, context)


def test_half_precision_is_computed_in_that_of_the_weights() -> None:
    affine = ConditionalAffine(3, 2, net=lipschitz_nn.context_mlp(2, [4], 6))
    half = torch.ones(4, 3, dtype=torch.bfloat16), torch.ones(4, 2, dtype=torch.bfloat16)
    outputs, logabsdet = affine(*half)
    assert outputs.dtype == logabsdet.dtype == torch.float32


class Given(nn.Module):
    """Returns its context as it is: (s, t)."""

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        return context


def test_its_network_returns_scales_and_then_shifts() -> None:
    affine = ConditionalAffine(2, 4, net=Given())
    inputs, context = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.3, -0.2, 5.0, 7.0]])
    scale = (7 * (context[:, :2] / 7).tanh()).exp()
    outputs, logabsdet = affine(inputs, context)
    torch.testing.assert_close(outputs, scale * inputs + context[:, 2:])
    torch.testing.assert_close(logabsdet, scale.log().sum(1))


@pytest.mark.parametrize("hidden", [[], [64], [16, 25]])
def test_the_network_of_a_context_starts_near_zero(hidden: list[int]) -> None:
    """With a tenth of torch's weights in its last layer, and no bias there."""
    torch.manual_seed(0)
    last = list(lipschitz_nn.context_mlp(4, hidden, 50).children())[-1]
    assert isinstance(last, nn.Linear)
    largest = 0.1 / last.in_features**0.5
    assert 0.5 * largest < float(last.weight.abs().max().detach()) <= largest
    assert not bool(last.bias.any())
