"""Structured answers equal those of automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nflows_iresnet import nn
from nflows_iresnet.linearization import (
    AutogradLinearization,
    Linearization,
    OpaqueFunction,
    bind,
    linearize,
)

HIDDEN: dict[str, list[int]] = {"0": [], "1": [7], "2": [7, 6], "3": [5, 6, 7]}
ACTIVATIONS: dict[str, nn.Activation] = {
    "sine": nn.Sine(),
    "smooth-abs": nn.SmoothAbs(),
    "clipswish": nn.CLipSwish(),
}


def pair(hidden: list[int], activation: nn.Activation) -> tuple[Linearization, Linearization]:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(4, hidden, 2, activation=activation).double()
    function = net.bind(torch.randn(5, 2, dtype=torch.float64))
    inputs = torch.randn(5, 4, dtype=torch.float64)
    return function.linearize(inputs), AutogradLinearization(function, inputs)


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_structured_equals_autograd(hidden: list[int], activation: nn.Activation) -> None:
    structured, reference = pair(hidden, activation)
    vector = torch.randn(5, 4, dtype=torch.float64)
    assert not isinstance(structured, AutogradLinearization)
    torch.testing.assert_close(structured.value, reference.value)
    torch.testing.assert_close(structured.vjp(vector), reference.vjp(vector))
    torch.testing.assert_close(structured.jvp(vector), reference.jvp(vector))
    torch.testing.assert_close(structured.trace(), reference.trace())
    torch.testing.assert_close(structured.jacobian(), reference.jacobian())


def test_products_agree_with_the_jacobian() -> None:
    structured, _ = pair([7, 6], nn.Sine())
    jacobian = structured.jacobian()
    vector = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(structured.jvp(vector), (jacobian @ vector[..., None])[..., 0])
    torch.testing.assert_close(structured.vjp(vector), (vector[:, None] @ jacobian)[:, 0])


def test_only_shallow_nets_have_a_cheap_trace() -> None:
    assert pair([7, 6], nn.Sine())[0].has_cheap_trace
    assert not pair([7, 6, 5], nn.Sine())[0].has_cheap_trace


def test_activations_that_mix_units_fall_back_to_autograd() -> None:
    net = nn.LipschitzMLP(4, [6], activation=nn.MaxMin())
    assert isinstance(linearize(net, torch.zeros(2, 4)), AutogradLinearization)


def test_images_are_flattened_in_the_jacobian() -> None:
    conv = torch.nn.Conv2d(2, 2, 3, padding=1).double()
    inputs = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    at_inputs = linearize(conv, inputs)
    assert at_inputs.vjp(inputs).shape == inputs.shape
    expected = torch.autograd.functional.jacobian(conv, inputs[:1]).reshape(32, 32)
    torch.testing.assert_close(at_inputs.jacobian()[0], torch.as_tensor(expected))


def test_select_keeps_the_context_of_the_rows() -> None:
    context = torch.randn(6, 2)
    inputs = torch.randn(6, 3)
    rows = torch.tensor([4, 1])

    def of_a_user(values: Tensor, conditions: Tensor) -> Tensor:
        return values * conditions.sum(1, keepdim=True)

    for function in (nn.LipschitzMLP(3, [5], 2).bind(context), OpaqueFunction(of_a_user, context)):
        torch.testing.assert_close(function.select(rows)(inputs[rows]), function(inputs)[rows])


def test_bind_returns_bound_functions_as_they_are() -> None:
    function = bind(torch.tanh)
    assert bind(function) is function
