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

from nflows_iresnet import logdet, nn, solvers, transforms
from nflows_iresnet.linearization import (
    AutogradLinearization,
    Linearization,
    ResidualFunction,
    bind,
    bind_all,
)
from nflows_iresnet.nn.dense import DenseFunction, DenseLinearization, RecordedLinearization
from nflows_iresnet.nn.dense_net import DenseNet
from nflows_iresnet.nn.layered import LayeredFunction
from nflows_iresnet.nn.pushforward import record

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
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def rows(num: int = 4, features: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(num, features, dtype=torch.float64)


def by_autograd(function: ResidualFunction, inputs: Tensor) -> Linearization:
    return AutogradLinearization(function, inputs)


def by_structure(function: ResidualFunction, inputs: Tensor) -> Linearization:
    assert isinstance(function, DenseFunction)
    value, slopes = function._values_and_slopes(inputs)
    return DenseLinearization(value, function.weights, slopes)


def answers(at: Linearization) -> list[Tensor]:
    torch.manual_seed(2)
    tangent, cotangent = torch.randn(2, *at.shape, dtype=torch.float64)
    return [
        at.jvp(tangent),
        at.jacobian(),
        at.pairing(cotangent, tangent),
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
    assert type(bind(net, given).linearize(inputs)) is RecordedLinearization
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-8)


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
    assert isinstance(dense, DenseFunction)
    parts = DenseNet(dense.weights, dense.shifts, dense.activations)
    gc.disable()
    try:
        recorded = record(parts, parts.evaluate(inputs), inputs, None)
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

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
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
