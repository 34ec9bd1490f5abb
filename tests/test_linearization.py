"""Structured answers equal those of automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nflows_iresnet import nn, testing, transforms
from nflows_iresnet.linearization import (
    AutogradLinearization,
    Linearization,
    OpaqueFunction,
    ResidualFunction,
    bind,
    bind_all,
    linearize,
    pulled_back,
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


NETWORKS: dict[str, Callable[[], nn.LipschitzNet]] = {
    "mlp": lambda: nn.LipschitzMLP(3, [8, 6], 2),
    "mlp-clipswish": lambda: nn.LipschitzMLP(3, [8, 6], 2, activation=nn.CLipSwish()),
    "dense": lambda: nn.LipschitzDenseNet(3, [4, 4], 2),
    "cnn": lambda: nn.LipschitzCNN(1, [4, 4], 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_keep_what_they_claim(name: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, *((1, 3, 4) if name == "cnn" else (3,)))
    testing.check_linearization(NETWORKS[name](), inputs, torch.randn(5, 2))


class Wrong(Linearization):
    """The exact products of another linearisation, one of them spoiled."""

    def __init__(self, exact: Linearization, spoiled: str) -> None:
        self._exact, self._spoiled, self.value = exact, spoiled, exact.value

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self._exact.vjp(cotangent) * (1.1 if self._spoiled == "vjp" else 1)

    def jvp(self, tangent: Tensor) -> Tensor:
        return self._exact.jvp(tangent) * (1.1 if self._spoiled == "jvp" else 1)

    def trace(self) -> Tensor:
        return self._exact.trace() * (1.1 if self._spoiled == "trace" else 1)


@dataclass(frozen=True)
class Spoiled(ResidualFunction):
    """Shifts the rows by a tensor with one row each; one answer is wrong."""

    shift: Tensor
    spoiled: str

    def __call__(self, inputs: Tensor) -> Tensor:
        return 0.5 * (inputs + self.shift).sin()

    def linearize(self, inputs: Tensor) -> Linearization:
        return Wrong(AutogradLinearization(self, inputs), self.spoiled)

    def select(self, rows: Tensor | slice) -> ResidualFunction:
        return self if self.spoiled == "select" else replace(self, shift=self.shift[rows])


class Torn(torch.nn.Module):
    """A call is another function than what `bind` returns."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 0.5 * inputs

    def bind(self, context: Tensor | None = None) -> ResidualFunction:
        return OpaqueFunction(lambda inputs: 0.9 * inputs)


def test_a_call_that_is_another_function_is_found() -> None:
    with pytest.raises(AssertionError, match="a call"):
        testing.check_linearization(Torn(), torch.randn(5, 3))


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [("jvp", "jvp"), ("vjp", "vjp"), ("trace", "trace"), ("select", "shape|size|selected")],
)
def test_a_wrong_claim_is_found(spoiled: str, message: str) -> None:
    torch.manual_seed(0)
    inputs, shift = torch.randn(5, 3), torch.randn(5, 3).double()
    testing.check_linearization(Spoiled(shift, "nothing"), inputs)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        testing.check_linearization(Spoiled(shift, spoiled), inputs)


@pytest.mark.parametrize("claim", [1.0, 1.3, -0.1, "0.5", True])
def test_a_claim_that_is_no_contraction_is_refused(claim: object) -> None:
    net = torch.nn.Linear(3, 3)
    net.lipschitz = claim  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"lipschitz must be a number in \[0, 1\)"):
        bind(net)


def test_what_comes_back_is_counted_once_where_one_argument_was_made_from_another() -> None:
    values = torch.tensor([2.0, -3.0], dtype=torch.float64, requires_grad=True)
    squares = values.square()
    found = pulled_back(torch.mul, torch.ones_like(values), [values, squares])
    torch.testing.assert_close(found, [squares, values], rtol=0, atol=0)


def test_a_forward_that_bind_would_pass_by_is_refused() -> None:
    class Half(nn.LipschitzMLP):
        def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
            return 0.5 * super().forward(inputs, context)

    class Both(Half):
        def bind(self, context: Tensor | None = None) -> Any:
            return super().bind(context)

    for nets in ([Half(2, [8])], [Half(2, [8]), Half(2, [8])]):
        with pytest.raises(ValueError, match="Half has a `forward` of its own"):
            bind_all(nets)
    bind(Both(2, [8]))
    patched: Any = nn.LipschitzMLP(2, [8])
    patched.forward = torch.tanh
    with pytest.raises(ValueError, match="`forward` of its own"):
        transforms.ResidualTransform(patched)(torch.zeros(1, 2))


def test_a_compiled_network_is_bound_as_what_it_was() -> None:
    net = nn.LipschitzMLP(2, [8])
    compiled: Any = torch.compile(net)
    point = torch.randn(3, 2)
    for function in (bind(compiled), *bind_all([compiled, net])):
        torch.testing.assert_close(function(point), net(point))


def test_a_network_may_leave_forward_to_its_subclass() -> None:
    class Template(torch.nn.Module):
        def bind(self, context: Tensor | None = None) -> ResidualFunction:
            return OpaqueFunction(self, context)

    class Net(Template):
        def forward(self, inputs: Tensor) -> Tensor:
            return 0.5 * inputs

    assert torch.equal(bind(Net())(torch.ones(1, 2)), torch.full((1, 2), 0.5))
