"""Products with the Jacobian of a convolutional network, against automatic differentiation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_iresnet import nn
from nflows_iresnet.linearization import AutogradLinearization
from nflows_iresnet.nn import cnn as conv
from nflows_iresnet.nn.cnn import ConvFunction, ConvLinearization
from nflows_iresnet.nn.convolution import PaddingMode, convolve
from tests import planted_conv
from tests.test_conv_norms import PADDINGS

ACTIVATIONS = {"mixed": None, "clipswish": nn.CLipSwish()}
KERNELS = [(3,), (3, 3), (3, 5), (1, 3), (3, 1, 3), (5, 1, 3), (3, 3, 3), (3, 1, 1, 3)]
SIZES = [(4, 5), (2, 3), (1, 4), (7, 6)]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def images(count: int, channels: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, channels, *size, generator=generator, dtype=torch.float64)


def network(
    kernels: Sequence[int] = (3, 1, 3),
    padding_mode: PaddingMode = "zeros",
    activation: torch.nn.Module | None = None,
    context: int | None = None,
) -> nn.LipschitzCNN:
    """Weights that use the whole budget, so that no entry of the Jacobian is negligible."""
    torch.manual_seed(0)
    hidden = [6, 5, 4][: len(kernels) - 1]
    net = nn.LipschitzCNN(
        2, hidden, context, kernel_sizes=kernels, padding_mode=padding_mode, activation=activation
    ).double()
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.mul_(3)  # type: ignore[operator]
    return net


def jacobians(net: torch.nn.Module, inputs: Tensor) -> Tensor:
    of_row = torch.func.jacrev(lambda row: net(row[None])[0])
    size = inputs[0].numel()
    return torch.stack([of_row(row).reshape(size, size) for row in inputs])


def check_linearization(at: ConvLinearization, jacobian: Tensor) -> None:
    """Every product, the Jacobian and its trace are those of automatic differentiation."""
    vector = images(len(at.value), 2, (at.value.shape[2], at.value.shape[3]))
    flat = vector.flatten(start_dim=1)
    left, right = torch.einsum("bi,bij->bj", flat, jacobian), (jacobian @ flat[..., None])[..., 0]
    assert_equal(at.vjp(vector).flatten(start_dim=1), left)
    assert_equal(at.jvp(vector).flatten(start_dim=1), right)
    assert_equal(at.jacobian(), jacobian)
    trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    assert_equal(at.trace(), trace)


def structured(net: nn.LipschitzCNN, inputs: Tensor) -> ConvLinearization:
    at = net.bind().linearize(inputs)
    assert isinstance(at, ConvLinearization)
    return at


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("kernels", KERNELS, ids=str)
def test_linearization_is_exact(
    kernels: Sequence[int], padding_mode: PaddingMode, activation: torch.nn.Module | None
) -> None:
    net = network(kernels, padding_mode, activation)
    for size in SIZES:
        if padding_mode == "circular" and max(kernels) // 2 > min(size):
            continue
        inputs = images(3, 2, size)
        check_linearization(structured(net, inputs), jacobians(net, inputs))


@pytest.mark.parametrize(
    "planted",
    [
        planted_conv.TraceWithoutBorder,
        planted_conv.TraceWithoutReflection,
        planted_conv.AdjointWithoutReflection,
        planted_conv.SlopesInTheWrongOrder,
        planted_conv.RowsMixedInTheJacobian,
    ],
)
def test_planted_bugs_are_seen(planted: type[ConvLinearization]) -> None:
    torch.manual_seed(0)
    net = nn.LipschitzCNN(2, [5, 5]).double()
    inputs = images(3, 2, (4, 5))
    at, jacobian = structured(net, inputs), jacobians(net, inputs)
    arguments = (at.value, at._weights, at._slopes, at._padding_mode)
    check_linearization(ConvLinearization(*arguments), jacobian)
    with pytest.raises(AssertionError):
        check_linearization(planted(*arguments), jacobian)


@pytest.mark.parametrize(
    ("kernels", "padding_mode", "size", "is_cheap"),
    [
        ((3,), "zeros", (1, 1), True),
        ((3, 3), "zeros", (2, 2), True),
        ((3, 1, 3), "zeros", (1, 5), True),
        ((3, 1, 3), "circular", (3, 4), True),
        ((3, 1, 3), "circular", (2, 9), False),
        ((3, 3, 3), "zeros", (5, 5), False),
        ((3, 1, 1, 3), "zeros", (5, 5), False),
    ],
)
def test_trace_is_cheap_where_no_product_is_needed(
    kernels: Sequence[int], padding_mode: PaddingMode, size: tuple[int, int], is_cheap: bool
) -> None:
    at = structured(network(kernels, padding_mode), images(2, 2, size))
    assert at.has_cheap_trace == is_cheap


def test_trace_and_products_are_differentiable_in_everything() -> None:
    net, inputs = network(context=2), images(2, 2, (3, 4)).requires_grad_()
    context = torch.randn(2, 2, dtype=torch.float64)
    targets = [inputs, *net.parameters()]
    fast = net.bind(context).linearize(inputs)
    slow = AutogradLinearization(net.bind(context), inputs)
    for answer, expected in ((fast.trace(), slow.trace()), (fast.vjp(inputs), slow.vjp(inputs))):
        actual, wanted = (
            torch.autograd.grad(each.sin().sum(), targets, allow_unused=True, retain_graph=True)
            for each in (answer, expected)
        )
        assert sum(each is not None for each in actual) > len(targets) / 2
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-10)


def test_jacobian_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    at = structured(network(), images(3, 2, (3, 3)))
    whole = at.jacobian()
    monkeypatch.setattr(conv, "_CHUNK_ELEMENTS", 500)
    assert_equal(at.jacobian(), whole)


def test_context_reaches_its_own_row_only_and_rows_can_be_selected() -> None:
    net, inputs = network(context=3), images(4, 2, (3, 4))
    context = torch.randn(4, 3, dtype=torch.float64)
    function = net.bind(context)
    assert isinstance(function, ConvFunction)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(function.select(rows)(inputs[rows]), function(inputs)[rows])
    for row in range(4):
        own = jacobians(net.bind(context[row : row + 1]), inputs[row : row + 1])  # type: ignore[arg-type]
        at = function.select(slice(row, row + 1)).linearize(inputs[row : row + 1])
        assert isinstance(at, ConvLinearization)
        check_linearization(at, own)


def bias_of(net: nn.LipschitzCNN, index: int) -> Tensor:
    bias = net.layers[index].bias
    assert isinstance(bias, Tensor)
    return bias


def test_activations_that_mix_channels_sort_channels() -> None:
    net, inputs = network(activation=nn.MaxMin(), kernels=(3, 3)), images(2, 2, (3, 3))
    at = net.bind().linearize(inputs)
    assert isinstance(at, AutogradLinearization)
    first, last = net.effective_weights()
    units = convolve(inputs, first, "zeros", bias_of(net, 0))
    pairs = [torch.maximum(units[:, :3], units[:, 3:]), torch.minimum(units[:, :3], units[:, 3:])]
    expected = convolve(torch.cat(pairs, dim=1), last, "zeros", bias_of(net, 1))
    torch.testing.assert_close(net(inputs), expected)


# --- convolutions as products of matrices ---------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel"),
    [(5, 3, (1, 1)), (9, 1, (3, 3)), (32, 2, (3, 5)), (18, 2, (3, 3)), (4, 4, (1, 1))],
)
def test_products_of_matrices_are_the_convolution(
    channels: int, outputs: int, kernel: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, channels, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(outputs, channels, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(outputs, dtype=torch.float64, requires_grad=True)

    def ours(*tensors: Tensor) -> Tensor:
        return convolve(tensors[0], tensors[1], "zeros", tensors[2])

    found, leaves = ours(inputs, weight, bias), (inputs, weight, bias)
    assert not uses_convolution(found)
    expected = F.conv2d(inputs, weight, bias, padding=(kernel[0] // 2, kernel[1] // 2))
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    )
    for gradient, slow in pairs:
        torch.testing.assert_close(gradient, slow)
    assert torch.autograd.gradgradcheck(ours, leaves, fast_mode=True)


def uses_convolution(outputs: Tensor) -> bool:
    nodes, found = [outputs.grad_fn], False
    while nodes:
        node = nodes.pop()
        if node is not None:
            found = found or "Convolution" in node.name()
            nodes += [each for each, _ in node.next_functions]
    return found


def test_no_image_and_wide_kernels_take_the_convolution() -> None:
    empty = convolve(torch.zeros(0, 9, 4, 4), torch.zeros(1, 9, 3, 3), "zeros")
    assert empty.shape == (0, 1, 4, 4)
    assert convolve(torch.zeros(0, 3, 4, 4), torch.zeros(2, 3, 1, 1), "zeros").shape == (0, 2, 4, 4)
