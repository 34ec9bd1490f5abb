"""Every fast path beside its slow twin: the same numbers and derivatives, fewer operations."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from nflows import transforms as nflows_transforms
from torch import Tensor

from nflows_iresnet import nn, transforms
from nflows_iresnet.linearization import (
    AutogradLinearization,
    Linearization,
    ResidualFunction,
    bind,
    bind_all,
)
from nflows_iresnet.nn.base import LayeredFunction
from nflows_iresnet.nn.cnn import ConvFunction, FusedConvLinearization
from nflows_iresnet.nn.convolution import PaddingMode
from nflows_iresnet.nn.fused import fused
from nflows_iresnet.nn.mlp import FusedMLPLinearization, MLPFunction

ACTIVATIONS: dict[str, Callable[[], nn.Activation]] = {
    "mixed": lambda: nn.Mixed(nn.Sine(), nn.SmoothAbs()),
    "sine": nn.Sine,
    "smooth-abs": nn.SmoothAbs,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
}


def make_net(
    hidden: Sequence[int], context: int | None = None, activation: str = "mixed"
) -> nn.LipschitzMLP:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(3, hidden, context, activation=ACTIVATIONS[activation]()).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def rows(num: int = 4, features: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(num, features, dtype=torch.float64)


def by_autograd(function: ResidualFunction, inputs: Tensor) -> Linearization:
    return AutogradLinearization(function, inputs)


def by_structure(function: ResidualFunction, inputs: Tensor) -> Linearization:
    assert isinstance(function, MLPFunction)
    return function.structured(function.evaluate(inputs, with_slopes=True))


def answers(at: Linearization) -> list[Tensor]:
    torch.manual_seed(2)
    tangent, cotangent = torch.randn(2, *at.shape, dtype=torch.float64)
    return [
        at.jvp(tangent),
        at.jacobian(),
        *at.bilinear([cotangent, tangent], tangent),
        at.vjp(cotangent),
        at.trace(),
        at.value,
    ]


def derivatives(values: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
    """First and second derivatives of a loss with a weight per row, where they exist."""
    weights = torch.arange(1.0, len(values[0]) + 1, dtype=torch.float64)
    loss = sum((value.reshape(len(weights), -1).sin().sum(1) * weights).sum() for value in values)
    assert isinstance(loss, Tensor)
    first = torch.autograd.grad(loss, sources, create_graph=True, allow_unused=True)
    squares = torch.stack([each.square().sum() for each in first if each is not None]).sum()
    second = torch.autograd.grad(squares, sources, allow_unused=True)
    return [each for each in (*first, *second) if each is not None]


@pytest.mark.parametrize("twin", [by_structure, by_autograd])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("hidden", "context"), [([7], None), ([7, 6], 2), ([5, 6, 8], None)])
def test_the_recorded_node_is_what_automatic_differentiation_finds(
    hidden: list[int],
    context: int | None,
    activation: str,
    twin: Callable[[ResidualFunction, Tensor], Linearization],
) -> None:
    net = make_net(hidden, context, activation)
    inputs = rows().requires_grad_()
    given = None if context is None else rows(4, context).requires_grad_()
    sources = [*net.parameters(), inputs, *([] if given is None else [given])]
    results = []
    for linearize in (lambda function, at: function.linearize(at), twin):
        function = bind(net, given)
        at = linearize(function, inputs)
        values = answers(at)
        results.append([value.detach() for value in values] + derivatives(values, sources))
    assert type(bind(net, given).linearize(inputs)) is FusedMLPLinearization
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize(
    ("hidden", "kernels", "context"),
    [([4], (3, 3), None), ([4, 6], (3, 1, 3), 2), ([4, 4], (1, 3, 5), None), ([2], (1, 1), None)],
)
def test_the_node_of_convolutions_is_what_automatic_differentiation_finds(
    hidden: list[int], kernels: tuple[int, ...], context: int | None, padding_mode: PaddingMode
) -> None:
    torch.manual_seed(0)
    net = nn.LipschitzCNN(
        2, hidden, context, kernel_sizes=kernels, padding_mode=padding_mode
    ).double()
    inputs = torch.randn(3, 2, 4, 5, dtype=torch.float64).requires_grad_()
    given = None if context is None else rows(3, context).requires_grad_()
    sources = [*net.parameters(), inputs, *([] if given is None else [given])]
    results = []
    for is_fast in (True, False):
        function = bind(net, given)
        assert isinstance(function, ConvFunction)
        slow = function.structured(function.evaluate(inputs, with_slopes=True))
        at = function.linearize(inputs) if is_fast else slow
        values = answers(at)
        results.append([value.detach() for value in values] + derivatives(values, sources))
    assert type(bind(net, given).linearize(inputs)) is FusedConvLinearization
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("context", [None, 2])
def test_the_surrogate_has_the_value_of_one_product_and_the_derivative_of_another(
    context: int | None,
) -> None:
    net = make_net([7, 6], context)
    inputs = rows().requires_grad_()
    given = None if context is None else rows(4, context)
    torch.manual_seed(2)
    for_value, for_derivative, tangent = torch.randn(3, *inputs.shape, dtype=torch.float64)
    sources = [*net.parameters(), inputs]
    results = []
    for linearize in (lambda function, at: function.linearize(at), by_structure, by_autograd):
        at = linearize(bind(net, given), inputs)
        surrogate, value = at.surrogate(for_value, for_derivative, tangent), at.value
        loss = (surrogate * torch.arange(1.0, 5)).sum() + value.sin().sum()
        gradients = torch.autograd.grad(loss, sources, materialize_grads=True)
        results.append([surrogate.detach(), *gradients])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "clipswish"])
def test_what_an_activation_writes_is_what_it_returns(activation: str) -> None:
    torch.manual_seed(0)
    module = nn.CLipSwish() if activation == "clipswish" else ACTIVATIONS[activation]()
    inputs = torch.tensor([0.0, -1e-30, 1e30, -3.0, 2.0]).repeat(3, 1)
    value, slope = module.value_and_slope(inputs)  # with a graph: nothing is written
    for given in (inputs, inputs.mT.contiguous().mT):
        written = torch.empty_like(value), torch.empty_like(slope)
        with torch.no_grad():
            module.write(given, *written)
            torch.testing.assert_close(written, (value.detach(), slope.detach()))
            module.write(given, written[0])
            torch.testing.assert_close(module(given), value.detach())
            torch.testing.assert_close(written[0], value.detach())
            if module.has_curvature:
                expected = module.curvature(value.requires_grad_(), slope)
                module.write_curvature(*written, curvature := torch.empty_like(value))
                torch.testing.assert_close(curvature, expected.detach())


def test_the_node_leaves_out_frozen_weights() -> None:
    net = make_net([6, 5])
    last = net.layers[-1].weight
    assert isinstance(last, Tensor)
    gradients = []
    for is_frozen in (False, True):
        net.layers[0].requires_grad_(not is_frozen)
        jacobian = bind(net).linearize(rows()).jacobian()
        gradients.append(torch.autograd.grad(jacobian.sum(), last)[0])
    torch.testing.assert_close(*gradients)


def test_the_node_is_freed_without_the_garbage_collector() -> None:
    """A cycle through the node would keep the memory of every step until a collection."""
    net, inputs = make_net([6, 5]), rows()
    dense = bind(net)
    assert isinstance(dense, MLPFunction)
    gc.disable()
    try:
        with torch.no_grad():
            evaluation = dense.evaluate(inputs, with_slopes=True)
        recorded = fused(dense, evaluation, inputs, None)
        outputs = [weakref.ref(each) for each in (recorded.value, recorded.pushed)]
        del recorded
        assert [each() for each in outputs] == [None, None]
    finally:
        gc.enable()


def test_function_transforms_and_forward_mode_get_ordinary_operations() -> None:
    net, inputs = make_net([6, 5]), rows()
    function = bind(net)
    exact = function.linearize(inputs).jacobian()

    def value(row: Tensor) -> Tensor:
        return function.linearize(row[None]).value[0]

    torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(value))(inputs), exact)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(value))(inputs), exact)
    tangent = torch.randn_like(inputs)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs, tangent)
        pushed = torch.autograd.forward_ad.unpack_dual(function.linearize(dual).value).tangent
    torch.testing.assert_close(pushed, (exact @ tangent[:, :, None])[:, :, 0])


def blocks(count: int = 3) -> list[nflows_transforms.Transform]:
    torch.manual_seed(3)
    nets = [nn.LipschitzMLP(3, [8, 8], 2) for _ in range(count)]
    odd = nn.LipschitzMLP(3, [4], 2, coeff=0.5)
    return [transforms.ResidualTransform(net).double() for net in (*nets, odd)]


def test_blocks_bound_together_are_the_blocks_of_nflows_composite() -> None:
    parts = blocks()
    ours, theirs = transforms.CompositeTransform(parts), nflows_transforms.CompositeTransform(parts)
    inputs, context = rows(), rows(4, 2)
    results = []
    for composite in (ours, theirs):
        composite.zero_grad()
        outputs, logabsdet = composite(inputs, context)
        (outputs.sum() + logabsdet.sin().sum()).backward()
        gradients = [each.grad for each in composite.parameters()]
        results.append([outputs, logabsdet, *composite.inverse(inputs, context), *gradients])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_a_call_normalises_all_blocks_of_a_kind_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks of two kinds; 8 x 8 once, and 3 x 8 with its transpose once, for each kind."""
    sizes: list[torch.Size] = []
    original = nn.SchattenNorm.value_and_gradient

    def counted(self: nn.SchattenNorm, weight: Tensor, state: dict[str, Tensor]) -> object:
        sizes.append(weight.shape)
        return original(self, weight, state)

    monkeypatch.setattr(nn.SchattenNorm, "value_and_gradient", counted)
    transforms.CompositeTransform(blocks())(rows(), rows(4, 2))
    assert sorted(sizes) == [(2, 4, 3), (3, 8, 8), (6, 8, 3)]


class Shouting(transforms.ResidualTransform):
    """A block of a user that does more than the library's."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        outputs, logabsdet = super().forward(inputs, context)
        return outputs + 1, logabsdet


def test_overridden_blocks_and_hooks_are_not_bypassed() -> None:
    torch.manual_seed(0)
    plain = transforms.ResidualTransform(nn.LipschitzMLP(3, [4])).double()
    loud = Shouting(plain.net)
    seen: list[str] = []
    plain.register_forward_hook(lambda *_: seen.append("hook"))
    outputs, _ = transforms.CompositeTransform([plain, loud])(rows())
    torch.testing.assert_close(outputs, loud(plain(rows())[0])[0])
    assert seen == ["hook", "hook"]


class OwnBinding(nn.LipschitzMLP):
    """A network of a user with its own `bind`, and the inherited `bind_all`."""

    def bind(self, context: Tensor | None = None) -> LayeredFunction:
        function = super().bind(context)
        return replace(function, weights=[0.5 * function.weights[0], *function.weights[1:]])


def test_a_bind_of_ones_own_is_used() -> None:
    torch.manual_seed(0)
    net = OwnBinding(3, [4]).double()
    torch.testing.assert_close(bind_all([net])[0](rows()), net.bind()(rows()))


class OwnSine(nn.Sine):
    """Replaces what the sine returns, and inherits how the sine writes in place."""

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return (2 * inputs).sin() / 2, (2 * inputs).cos()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.value_and_slope(inputs)[0]


@pytest.mark.parametrize(
    "activation",
    [
        nn.Sine(),
        nn.SmoothAbs(),
        nn.Mixed(nn.Sine(), nn.SmoothAbs()),
        nn.Mixed(OwnSine(), nn.Tanh()),
        OwnSine(),
        nn.CLipSwish(),
        nn.MaxMin(),
    ],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("context_features", [None, 2])
def test_values_without_a_graph_are_those_with_one(
    activation: torch.nn.Module, context_features: int | None
) -> None:
    """In place and in parts: more rows than are computed together."""
    torch.manual_seed(0)
    net = nn.LipschitzMLP(2, [64, 64], context_features, activation=activation).double()
    inputs, before = (torch.randn(2500, 2).double() for _ in range(2))
    context = torch.randn(2500, 2).double() if context_features else None
    function = net.bind(context)
    before.copy_(inputs)
    with torch.no_grad():
        fast = function(inputs)
    torch.testing.assert_close(fast, function(inputs).detach(), rtol=1e-13, atol=1e-13)
    assert torch.equal(inputs, before)
    assert fast.shape == (2500, 2)
