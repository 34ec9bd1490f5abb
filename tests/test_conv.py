"""Convolutional networks: certified at every moment and size, and good for a flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_iresnet import logdet, nn, testing, transforms
from nflows_iresnet.linearization import AutogradLinearization
from nflows_iresnet.nn import cnn as conv
from nflows_iresnet.nn.cnn import ConvFunction, ConvLinearization
from nflows_iresnet.nn.convolution import PaddingMode, convolve
from tests import device
from tests.planted import conv as planted_conv
from tests.test_conv_norms import PADDINGS, true_norm


def balanced_norms(
    net: nn.LipschitzCNN, size: tuple[int, int], padding_mode: PaddingMode
) -> list[float]:
    """The norms of T_i W_i T_{i-1}^-1 of the weights that are used, on images of one size."""
    inner = [each.detach().clamp(-7, 7).exp().double() for each in net.log_scales]
    one = torch.ones(1, dtype=torch.float64)
    triples = zip([one, *inner], net.effective_weights(), [*inner, one], strict=True)
    return [
        true_norm(after[:, None, None, None] * weight / before[:, None, None], size, padding_mode)
        for before, weight, after in triples
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("oversampling", [4, None])
def test_bound_holds_for_hostile_weights(
    dtype: torch.dtype, padding_mode: PaddingMode, oversampling: int | None
) -> None:
    torch.manual_seed(0)
    norm = nn.FourierNorm(oversampling)
    net = nn.LipschitzCNN(2, [8, 8], coeff=0.9, padding_mode=padding_mode, norm=norm).to(dtype)
    for factor in (1e6, 1e6, 1e-18, 1e-3):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(factor)
        for mode in (True, False):
            net.train(mode)
            assert net.lipschitz_bound() <= 0.9
        for size in ((1, 6), (5, 4)):
            assert math.prod(balanced_norms(net, size, padding_mode)) <= net.lipschitz_bound()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bound_holds_after_violent_steps_and_reloading(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.LipschitzCNN(2, [6, 6], 2, coeff=0.8, optional_context=True).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=100.0)
    for _ in range(60):
        loss = 100 * net(torch.randn(4, 2, 4, 4, dtype=dtype)).sin().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0.5 < net.lipschitz_bound() <= 0.8
    fresh = nn.LipschitzCNN(2, [6, 6], 2, coeff=0.8, optional_context=True).to(dtype)
    fresh.load_state_dict(net.state_dict())
    assert fresh.lipschitz_bound() == net.lipschitz_bound()
    inputs, context = 10 * torch.randn(4, 2, 3, 3), 1e3 * torch.randn(4, 2).double()
    testing.check_lipschitz(fresh.double().bind(context), inputs, 0.8, num_steps=5)


def test_lipschitz_conv2d() -> None:
    torch.manual_seed(0)
    layer = nn.LipschitzConv2d(3, 4, 3, coeff=0.5)
    layer.weight.data.mul_(1e6)
    assert layer.lipschitz_bound() == pytest.approx(0.5, rel=1e-5)
    assert layer.lipschitz_bound() <= 0.5
    truths = [true_norm(layer.effective_weight(), (size, size), "zeros") for size in (1, 6, 13)]
    assert max(truths) <= 0.5
    assert truths[-1] > 0.45
    layer.weight.data.mul_(1e-9)
    torch.testing.assert_close(layer.effective_weight(), layer.weight)
    net = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 3, padding=1))
    assert nn.lipschitz_bound(net) == layer.lipschitz_bound() * nn.lipschitz_bound(net[2])


def test_power_iteration_is_reported_by_its_true_bound_and_can_be_loaded() -> None:
    torch.manual_seed(0)

    def build() -> nn.LipschitzCNN:
        norm = nn.ConvPowerIteration((4, 5), num_initial_steps=0)
        return nn.LipschitzCNN(2, [8, 8], coeff=0.9, norm=norm)

    net, inputs = build(), torch.randn(3, 2, 4, 5)
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.mul_(3)  # type: ignore[operator]
    assert net.bind().lipschitz is None
    assert net.lipschitz_bound() > 0.9
    net.eval()
    assert torch.equal(net(inputs), net(inputs))
    net.train()
    for _ in range(100):
        net(inputs)
    assert net.lipschitz_bound() <= 0.9 * 2
    fresh = build()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(inputs), net.eval()(inputs))


@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_exact_log_det_of_a_tiny_image(padding_mode: PaddingMode) -> None:
    net, inputs = network(padding_mode=padding_mode), images(3, 2, (3, 3))
    block = transforms.ResidualTransform(net, estimator=logdet.Exact())
    expected = torch.linalg.slogdet(torch.eye(18) + jacobians(net, inputs)).logabsdet
    torch.testing.assert_close(block(inputs)[1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("exact_trace", [True, False])
def test_roulette_is_unbiased(exact_trace: bool) -> None:
    torch.manual_seed(0)
    net, inputs = network(), images(2, 2, (4, 4))
    exact = logdet.Exact().estimate(net, inputs).logabsdet
    estimator = logdet.RussianRoulette(num_probes=200, exact_trace=exact_trace)
    with torch.no_grad():
        estimate = estimator.estimate(net, inputs)
    assert estimate.standard_error is not None
    error = (estimate.logabsdet - exact).abs()
    assert bool((error <= 6 * estimate.standard_error).all())
    assert bool((estimate.standard_error < 0.2).all())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hidden_channels": [4], "kernel_sizes": (3, 1, 3)}, "kernel_sizes"),
        ({"hidden_channels": 4}, "hidden_channels"),
        ({"channels": 0}, "channels"),
        ({"kernel_sizes": (3, 2, 3)}, "odd"),
        ({"padding_mode": "reflect"}, "padding_mode"),
        ({"coeff": 1.0}, "coeff"),
        ({"norm": nn.SpectralNorm()}, "ConvNorm"),
        ({"norm": nn.ConvPowerIteration((3, 3), "circular")}, "iterates with"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        nn.LipschitzCNN(**{"channels": 2, "hidden_channels": [4, 4], **options})


def test_dense_layers_refuse_norms_of_convolutions() -> None:
    with pytest.raises(ValueError, match="MatrixNorm"):
        nn.LipschitzLinear(2, 2, norm=nn.FourierNorm())  # type: ignore[arg-type]


def test_bad_inputs_are_refused() -> None:
    net = network(padding_mode="circular", kernels=(5, 1, 3))
    with pytest.raises(ValueError, match="images of shape"):
        net(torch.zeros(2, 3, 3).double())
    with pytest.raises(ValueError, match="more than once"):
        net(images(1, 2, (1, 4)))
    with pytest.raises(ValueError, match="context_features"):
        net(images(1, 2, (4, 4)), torch.zeros(1, 1).double())


ACTIVATIONS = {"mixed": None, "clipswish": nn.CLipSwish()}
KERNELS = [(3,), (3, 3), (3, 5), (1, 3), (3, 1, 3), (5, 1, 3), (3, 3, 3), (3, 1, 1, 3)]
SIZES = [(4, 5), (2, 3), (1, 4), (7, 6)]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def images(count: int, channels: int, size: tuple[int, int]) -> Tensor:
    generator = device.generator(5)
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
            torch.autograd.grad(
                each.sin().sum(), targets, materialize_grads=True, retain_graph=True
            )
            for each in (answer, expected)
        )
        assert sum(bool(each.any()) for each in actual) > len(targets) / 2
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


@pytest.mark.usefixtures("values_are_seen")
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


def test_the_certificate_is_above_the_slope_where_layers_differ_by_hundreds_of_decades() -> None:
    """The squares of the first kernel vanish, and those of the others overflow."""
    torch.manual_seed(0)
    net = nn.LipschitzCNN(2, [4, 4], activation=nn.Tanh()).double()
    with torch.no_grad():
        for layer, factor in zip(net.normed_layers, (1e-170, 1e86, 1e86), strict=True):
            layer.weight.mul_(factor)
            layer.bias.zero_()  # type: ignore[operator]
    point = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    jacobian = net.bind().linearize(point).jacobian()[0].detach()
    assert 0 < float(torch.linalg.matrix_norm(jacobian, ord=2)) <= net.lipschitz_bound() <= 0.97
