"""Certificates: the bound is above the truth, for any weights, at any time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nflows_iresnet import nn, testing, transforms
from nflows_iresnet.conditioning import MAX_LOG_SCALE
from nflows_iresnet.linearization import bind_all
from nflows_iresnet.nn.activations import LIPSWISH_DIVISOR
from nflows_iresnet.nn.base import LayeredNet
from nflows_iresnet.nn.layers import NormedLayer, NormedLinear, rounding_margin

UPPER_NORMS: dict[str, nn.MatrixNorm] = {
    "spectral": nn.SpectralNorm(),
    "schatten": nn.SchattenNorm(),
    "schatten-0": nn.SchattenNorm(num_squarings=0),
    "frobenius": nn.FrobeniusNorm(),
    "cholesky": nn.CholeskyNorm(),
}
UNIT_WISE: dict[str, nn.Activation] = {
    "smooth-abs": nn.SmoothAbs(),
    "sine": nn.Sine(),
    "tanh": nn.Tanh(),
    "elu": nn.ELU(),
    "softplus": nn.Softplus(),
    "lipswish": nn.LipSwish(),
    "clipswish": nn.CLipSwish(),
    "mixed": nn.Mixed(nn.Sine(), nn.SmoothAbs()),
}


def true_norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), ord=2))


def true_product(net: nn.LipschitzMLP) -> float:
    """The product of norms of W_i, without the diagonals that balance them."""
    return math.prod(true_norm(weight) for weight in net.effective_weights())


def balanced_product(net: nn.LipschitzMLP) -> float:
    """The product of norms of T_i W_i T_{i-1}^-1 of the weights that are used."""
    scales = [
        torch.ones(1),
        *(each.detach().clamp(-7, 7).exp().double() for each in net.log_scales),
    ]
    weights = [weight.detach().double() for weight in net.effective_weights()]
    left = [*scales[1:], torch.ones(1)]
    return math.prod(
        true_norm(after[:, None] * weight / before)
        for after, weight, before in zip(left, weights, scales, strict=True)
    )


@pytest.mark.parametrize("norm", UPPER_NORMS.values(), ids=UPPER_NORMS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (2, 64), (64, 2), (33, 33)])
def test_norms_are_upper_bounds(norm: nn.MatrixNorm, scale: float, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * scale
    assert float(norm(weight)) >= true_norm(weight)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
@pytest.mark.parametrize("norm", UPPER_NORMS.values(), ids=UPPER_NORMS)
def test_norm_gradients(norm: nn.MatrixNorm, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda matrix: norm(matrix), (weight,))


def test_norms_of_a_zero_matrix_have_finite_gradients() -> None:
    for norm in UPPER_NORMS.values():
        weight = torch.zeros(3, 3, requires_grad=True)
        norm(weight).backward()
        assert weight.grad is not None
        assert bool(weight.grad.isfinite().all())


def test_spectral_is_tightest_and_schatten_close() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    spectral, schatten, frobenius = (
        float(norm(weight)) for norm in (nn.SpectralNorm(), nn.SchattenNorm(), nn.FrobeniusNorm())
    )
    assert spectral <= schatten <= 1.001 * spectral < frobenius


def test_power_iteration_is_a_lower_bound_that_converges_from_ones() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 10, dtype=torch.float64)
    method = nn.PowerIteration(num_steps=1, num_initial_steps=1)
    state = method.initial_state(weight)
    estimates = []
    for _ in range(200):
        estimates.append(float(method(weight, state)))
        method.advance(weight, state)
    assert all(estimate <= true_norm(weight) * (1 + 1e-12) for estimate in estimates)
    assert estimates[0] < 0.99 * true_norm(weight)
    assert estimates[-1] == pytest.approx(true_norm(weight), rel=1e-9)


def test_power_iteration_is_reported_by_its_true_bound() -> None:
    torch.manual_seed(0)
    norm = nn.PowerIteration(num_initial_steps=1)
    net = nn.LipschitzMLP(4, [16, 16], coeff=0.9, norm=norm).eval()
    assert net.bind().lipschitz is None
    assert net.lipschitz_bound() == pytest.approx(balanced_product(net), rel=1e-9)
    assert net.lipschitz_bound() > 0.9


def test_power_iteration_improves_in_training_only() -> None:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(4, [16], norm=nn.PowerIteration(num_initial_steps=1))
    inputs = torch.randn(3, 4)
    before = [buffer.clone() for buffer in net.buffers()]
    net.eval()(inputs)
    assert all(map(torch.equal, net.buffers(), before))
    net.train()
    for _ in range(100):
        net(inputs)
    assert not all(map(torch.equal, net.buffers(), before))
    assert net.lipschitz_bound() <= 0.97 * (1 + 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", UPPER_NORMS.values(), ids=UPPER_NORMS)
def test_bound_holds_for_hostile_weights(norm: nn.MatrixNorm, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(5, [32, 32], coeff=0.9, norm=norm).to(dtype)
    for factor in (1e6, 1e6, 1e-18, 1e-3):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(factor)
        for mode in (True, False):
            net.train(mode)
            assert balanced_product(net) <= net.lipschitz_bound() <= 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bound_holds_after_violent_steps_and_reloading(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(3, [16, 16], coeff=0.8).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=100.0)
    for _ in range(200):
        loss = 100 * net(torch.randn(8, 3, dtype=dtype)).sin().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert balanced_product(net) <= net.lipschitz_bound() <= 0.8
    fresh = nn.LipschitzMLP(3, [16, 16], coeff=0.8).to(dtype)
    fresh.load_state_dict(net.state_dict())
    assert fresh.lipschitz_bound() == net.lipschitz_bound()
    testing.check_lipschitz(fresh.double(), 10 * torch.randn(16, 3), 0.8, num_steps=20)


def test_bound_holds_for_every_context() -> None:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(3, [16, 16], 2, coeff=0.9).double()
    for magnitude in (1.0, 1e6):
        context = magnitude * torch.randn(8, 2, dtype=torch.float64)
        testing.check_lipschitz(net.bind(context), torch.randn(8, 3), 0.9, num_steps=10)


def test_bound_of_bfloat16_weights() -> None:
    net = nn.LipschitzMLP(4, [64, 64], coeff=0.9).bfloat16()
    with torch.no_grad():
        net.layers[0].weight.mul_(100)  # type: ignore[operator]
    assert balanced_product(net) <= net.lipschitz_bound() <= 0.9


@pytest.mark.parametrize("norm", UPPER_NORMS.values(), ids=UPPER_NORMS)
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_that_starts_at_zero_gives_zero_and_learns(
    norm: nn.MatrixNorm, size: float, dtype: torch.dtype
) -> None:
    net = nn.LipschitzMLP(2, [4], norm=norm).to(dtype)
    last = net.layers[-1]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.constant_(last.weight, size)
    torch.nn.init.zeros_(last.bias)
    outputs = net(torch.ones(3, 2, dtype=dtype))
    assert float(outputs.detach().abs().max()) <= 10 * size
    outputs.sum().backward()
    for parameter in (each for each in net.parameters() if each is not None):
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())


def test_check_lipschitz_finds_what_a_wrong_bound_hides() -> None:
    with pytest.raises(AssertionError, match="stretch"):
        testing.check_lipschitz(lambda x: 0.95 * torch.sin(x), torch.randn(4, 2), bound=0.9)


def test_weights_that_are_not_finite_are_refused() -> None:
    net = nn.LipschitzMLP(2, [4])
    with torch.no_grad():
        net.layers[0].weight.fill_(math.nan)  # type: ignore[operator]
    with pytest.raises(ValueError, match="not finite"):
        net.lipschitz_bound()


@pytest.mark.parametrize("activation", UNIT_WISE.values(), ids=UNIT_WISE)
def test_slopes_are_derivatives_below_the_constant(activation: nn.Activation) -> None:
    inputs = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None].requires_grad_()
    activation = activation.double()
    values, slopes = activation.value_and_slope(inputs)
    columns = [
        torch.autograd.grad(values[:, i].sum(), inputs, retain_graph=True)[0][:, 0]
        for i in range(activation.widening)
    ]
    torch.testing.assert_close(torch.stack(columns, dim=1), slopes)
    stretch = torch.linalg.vector_norm(slopes.detach(), dim=1)
    assert float(stretch.max()) <= activation.lipschitz
    assert float(stretch.max()) > 0.98 * activation.lipschitz


def test_lipswish_divisor_bounds_the_slope_of_swish() -> None:
    inputs = torch.linspace(0, 5, 100_001, dtype=torch.float64)
    gate = torch.sigmoid(inputs)
    steepest = float((gate + inputs * gate * (1 - gate)).max())
    assert steepest == pytest.approx(1.09984, abs=1e-5)
    assert steepest < LIPSWISH_DIVISOR


@pytest.mark.parametrize("log_scale", [-1e6, -3.0, 5.0, 1e6])
def test_balancing_changes_the_weights_but_not_the_certificate(log_scale: float) -> None:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(3, [16, 16], coeff=0.9, activation=nn.CLipSwish()).double()
    with torch.no_grad():
        for scale in net.log_scales:
            scale.copy_(log_scale * torch.rand_like(scale))
    assert 0.5 < net.lipschitz_bound() <= 0.9
    testing.check_lipschitz(net, torch.randn(16, 3), 0.9, num_steps=5)


def test_maxmin_sorts_pairs_and_needs_an_even_width() -> None:
    inputs = torch.tensor([[3.0, 1.0, 2.0, 5.0]])
    assert nn.MaxMin()(inputs).tolist() == [[3.0, 5.0, 2.0, 1.0]]
    with pytest.raises(ValueError, match="even"):
        nn.MaxMin()(torch.zeros(1, 3))


def test_lipschitz_linear() -> None:
    torch.manual_seed(0)
    layer = nn.LipschitzLinear(3, 4, coeff=0.5)
    layer.weight.data.mul_(1e3)
    assert layer.lipschitz_bound() <= 0.5
    assert layer.lipschitz_bound() == pytest.approx(0.5, rel=1e-5)
    layer.weight.data.mul_(1e-6)
    torch.testing.assert_close(layer.effective_weight(), layer.weight)


def test_lipschitz_bound_of_torch_modules() -> None:
    linear = torch.nn.Linear(3, 3)
    net = torch.nn.Sequential(linear, torch.nn.ELU(), nn.LipschitzLinear(3, 3, coeff=0.5))
    assert nn.lipschitz_bound(linear) >= true_norm(linear.weight)
    assert nn.lipschitz_bound(net) <= nn.lipschitz_bound(linear) * 0.5
    assert nn.lipschitz_bound(nn.MaxMin()) == 1.0
    with pytest.raises(ValueError, match="BatchNorm1d"):
        nn.lipschitz_bound(torch.nn.BatchNorm1d(3))


def test_spectral_penalty_is_the_sum_of_squared_norms() -> None:
    first, second = torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)
    net = torch.nn.Sequential(first, torch.nn.Tanh(), second)
    penalty = nn.spectral_penalty(net, weight=0.1)
    expected = 0.1 * (true_norm(first.weight) ** 2 + true_norm(second.weight) ** 2)
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    assert first.weight.grad is not None
    with pytest.raises(ValueError, match="negative"):
        nn.spectral_penalty(net, weight=-1.0)
    with pytest.raises(ValueError, match="no matrix"):
        nn.spectral_penalty(torch.nn.ReLU())


@pytest.mark.parametrize("coeff", [1.0, 1.5, 0.0, -0.5, math.nan])
def test_coeff_outside_of_the_open_unit_interval_is_refused(coeff: float) -> None:
    for build in (lambda: nn.LipschitzMLP(2, [4], coeff=coeff), lambda: _linear(coeff)):
        with pytest.raises(ValueError, match="coeff"):
            build()


def _linear(coeff: float) -> nn.LipschitzLinear:
    return nn.LipschitzLinear(2, 2, coeff=coeff)


def test_bad_sizes_and_contexts_are_refused() -> None:
    with pytest.raises(ValueError, match="features"):
        nn.LipschitzMLP(0, [4])
    with pytest.raises(ValueError, match="hidden_features"):
        nn.LipschitzMLP(2, [4, 0])
    with pytest.raises(ValueError, match="context_features"):
        nn.LipschitzMLP(2, [4])(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="batch, 2"):
        nn.LipschitzMLP(2, [4], 2)(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="num_squarings"):
        nn.SchattenNorm(num_squarings=-1)
    with pytest.raises(ValueError, match="num_steps"):
        nn.PowerIteration(num_steps=0)


def test_softplus_is_exact_where_torch_takes_its_input_for_its_value() -> None:
    """Beyond 20 torch's softplus returns x, so that its slope and curvature would jump."""
    inputs = torch.linspace(15, 45, 61, dtype=torch.float64)
    value, slope = nn.Softplus().value_and_slope(inputs)
    torch.testing.assert_close(value - inputs, inputs.neg().exp().log1p(), rtol=1e-3, atol=1e-14)
    assert bool((value[inputs < 30] > inputs[inputs < 30]).all())
    torch.testing.assert_close(slope, inputs.sigmoid())


class Tripled(nn.Activation):
    """3 sin(x), which states its constant by a method."""

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return 3 * inputs.sin(), 3 * inputs.cos()

    def lipschitz_bound(self) -> float:
        return 3.0


def test_an_activation_may_state_its_constant_by_a_method() -> None:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(2, [16], activation=Tripled(), coeff=0.9)
    with torch.no_grad():
        for layer in net.normed_layers:
            layer.weight.mul_(10)
    assert net.lipschitz_bound() <= 0.9
    testing.check_lipschitz(net, 3 * torch.randn(40, 2), 0.9)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_the_budget_allows_for_the_slope_of_every_activation(depth: int) -> None:
    """Each of them stretches by up to 1.1; certificate and budget are told apart from norms."""
    torch.manual_seed(0)
    net = nn.LipschitzMLP(3, [8] * depth, activation=torch.nn.ELU(alpha=1.1), coeff=0.9).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(100)
    stretch = true_product(net) * 1.1**depth
    assert stretch <= 0.9
    assert stretch <= net.lipschitz_bound() <= 0.9
    assert stretch > 0.8


def test_networks_of_different_coefficients_are_bound_together_as_by_themselves() -> None:
    torch.manual_seed(0)
    nets = [nn.LipschitzMLP(3, [8], coeff=coeff).double() for coeff in (0.9, 0.3, 0.9)]
    with torch.no_grad():
        for parameter in [each for net in nets for each in net.layers.parameters()]:
            parameter.mul_(10)
    inputs = torch.randn(5, 3, dtype=torch.float64)
    for net, function in zip(nets, bind_all(nets), strict=True):
        torch.testing.assert_close(function(inputs), net(inputs), rtol=0, atol=1e-12)
        assert function.lipschitz == net.coeff


def test_the_margin_for_rounding_counts_every_entry_of_a_kernel() -> None:
    for shape in ((4, 6), (6, 4, 1, 1), (4, 6, 3, 3), (2, 3, 5, 3)):
        for dtype in (torch.float32, torch.float64):
            terms = min(shape[:2]) * math.prod(shape[2:])
            expected = 1 - 2 * torch.finfo(dtype).eps * math.sqrt(terms)
            assert rounding_margin(torch.zeros(shape, dtype=dtype)) == expected


@pytest.mark.parametrize("context_features", [None, 2])
def test_balanced_networks_are_what_their_documentation_says(context_features: int | None) -> None:
    """Hidden units are t e a((V x + b + c) / (t e)): scales are not of the weights alone."""
    torch.manual_seed(0)
    net = nn.LipschitzMLP(3, [8], context_features, activation=nn.Sine()).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    inputs = torch.randn(5, 3, dtype=torch.float64)
    context = None if context_features is None else torch.randn(5, 2, dtype=torch.float64)
    first, last = net.layers
    scale, (into, out) = net.log_scales[0].exp(), net.effective_weights()
    shifts, stretch = [first.bias, last.bias], scale
    if context is not None:
        assert net.context_net is not None
        *additions, factor = net.context_net(context).split([8, 3, 8], dim=1)
        shifts = [bias + each for bias, each in zip(shifts, additions, strict=True)]
        stretch = scale * factor.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp()
    units = inputs @ (scale[:, None] * into).mT + shifts[0]
    hidden = stretch * (units / stretch).sin()
    expected = hidden @ (out / scale).mT + shifts[1]
    torch.testing.assert_close(net(inputs, context), expected, rtol=0, atol=1e-12)


NETS: dict[str, tuple[Callable[..., nn.LipschitzNet], tuple[int, ...]]] = {
    "mlp": (lambda c: nn.LipschitzMLP(3, [6, 5], c), (3,)),
    "dense": (lambda c: nn.LipschitzDenseNet(3, [6, 5], c), (3,)),
    "cnn": (lambda c: nn.LipschitzCNN(3, [6, 5], c), (3, 2, 2)),
}


@pytest.mark.parametrize("kind", NETS)
def test_every_shift_and_stretch_of_a_context_matters(kind: str) -> None:
    """The gradient in each output of the network of the context is not zero."""
    torch.manual_seed(0)
    make, shape = NETS[kind]
    net = make(2).double()
    assert net.context_net is not None
    last = list(net.context_net.children())[-1]
    context = torch.randn(4, 2, dtype=torch.float64)
    net(torch.randn(4, *shape, dtype=torch.float64), context).square().sum().backward()
    assert bool((last.bias.grad != 0).all())  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", NETS)
def test_every_layer_has_an_activation_of_its_own(kind: str) -> None:
    """What one learns, others do not."""
    activations = list(NETS[kind][0](None).activations)
    assert len({id(each) for each in activations}) == len(activations) == 2


def test_a_mixture_is_as_steep_as_its_steepest_half() -> None:
    class Steep(nn.Sine):
        lipschitz = 2.0

    for first, second in ((nn.Sine(), Steep()), (Steep(), nn.Sine())):
        assert nn.Mixed(first, second).lipschitz == 2.0


def test_the_certificate_of_a_matrix_allows_for_its_decomposition() -> None:
    """32 roundings for each row or column."""
    torch.manual_seed(0)
    for shape in ((5, 3), (2, 40), (1, 1)):
        weight = torch.randn(shape, dtype=torch.float64)
        allowance = 1 + 32 * max(shape) * torch.finfo(torch.float64).eps
        assert nn.spectral_norm_bound(weight) == true_norm(weight) * allowance


@pytest.mark.parametrize(
    "activation",
    [
        torch.nn.SiLU(),
        torch.nn.GELU(),
        torch.nn.Sigmoid(),
        torch.nn.Softplus(),
        torch.nn.ELU(alpha=1.5),
        torch.nn.LeakyReLU(negative_slope=-2.0),
    ],
    ids=str,
)
def test_activations_of_torch_are_nowhere_steeper_than_their_constant(
    activation: torch.nn.Module,
) -> None:
    points = torch.linspace(-8, 8, 160_001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(activation(points).sum(), points)
    steepest = float(slopes.abs().max())
    assert steepest <= nn.lipschitz_bound(activation) <= 1.01 * max(1.0, steepest)


def test_one_layer_with_an_estimate_takes_the_guarantee_from_all() -> None:
    net = nn.LipschitzMLP(2, [8])
    assert net.lipschitz == net.coeff
    layer = net.layers[0]
    assert isinstance(layer, NormedLinear)
    net.layers[0] = NormedLinear(2, 8, norm=nn.PowerIteration())
    assert net.lipschitz is None


def test_power_iteration_does_not_improve_where_no_gradient_is_recorded() -> None:
    """Validation in training mode changes no model."""
    torch.manual_seed(0)
    net = nn.LipschitzMLP(2, [8], norm=nn.PowerIteration(num_initial_steps=0)).train()
    before = {name: value.clone() for name, value in net.named_buffers()}
    with torch.no_grad():
        net(torch.randn(3, 2))
    assert before
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_a_grouped_convolution_is_as_steep_as_its_steepest_group() -> None:
    torch.manual_seed(0)
    module = torch.nn.Conv2d(4, 4, 3, groups=2, padding=1)
    for steep in (0, 1):
        with torch.no_grad():
            module.weight.chunk(2)[steep].mul_(10)
        bounds = [nn.conv_norm_bound(group) for group in module.weight.chunk(2)]
        assert nn.lipschitz_bound(module) == max(bounds)
        with torch.no_grad():
            module.weight.chunk(2)[steep].div_(10)


HALF: dict[str, tuple[Callable[[], torch.nn.Module], tuple[float, ...]]] = {
    "linear": (lambda: nn.LipschitzLinear(64, 64), (55000.0,)),
    "convolution": (lambda: nn.LipschitzConv2d(64, 64, 3), (55000.0,)),
    "mlp": (lambda: nn.LipschitzMLP(64, [128, 128]), (6e4, 6e4, 6e4)),
    "dense": (lambda: nn.LipschitzDenseNet(64, [64]), (1e-3, 55000.0)),
    "cnn": (lambda: nn.LipschitzCNN(4, [64, 64]), (4e4, 4e4, 4e4)),
}


@pytest.mark.parametrize("kind", HALF)
def test_bound_of_float16_weights(kind: str) -> None:
    """What they are multiplied by would be subnormal in float16, or zero: rounded without limit."""
    make, values = HALF[kind]
    net = make().half()
    weights = [each.weight for each in net.modules() if isinstance(each, NormedLayer)]
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.fill_(value)
    assert 0.85 < nn.lipschitz_bound(net) <= 0.97
    if isinstance(net, LayeredNet):
        used = net.bind().weights
        assert all(map(torch.equal, used, net.effective_weights()))
        total = torch.stack([each.float().square().sum() for each in used]).sum()
        gradients = torch.autograd.grad(total, weights)
        assert all(each.dtype == torch.float16 and each.isfinite().all() for each in gradients)


def test_layers_too_wide_for_half_precision_say_so() -> None:
    """2 eps sqrt(512 * 9) is more than one: rounding alone may exceed any budget."""
    net = nn.LipschitzCNN(2, [512, 512], kernel_sizes=[1, 3, 1]).bfloat16()
    with pytest.raises(ValueError, match=r"\(512, 512, 3, 3\).*bfloat16.*float32"):
        net(torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16))
    wide = torch.zeros(4096, 4096, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="bfloat16"):
        rounding_margin(wide)
    assert 0 < rounding_margin(wide[1:]) < rounding_margin(wide.half()) < 1


@pytest.mark.parametrize("beta", [0.01, 1.0, 100.0])
def test_a_softplus_of_torch_that_jumps_has_no_constant(beta: float) -> None:
    """Where beta x exceeds the threshold it returns x: what it leaves out is not small below 20."""
    assert nn.lipschitz_bound(torch.nn.Softplus(beta, threshold=20)) == 1.0
    jumping = torch.nn.Softplus(beta, threshold=2)
    edge = torch.tensor([2 / beta * (1 - 1e-9), 2 / beta * (1 + 1e-9)], dtype=torch.float64)
    before, after = jumping(edge).tolist()
    assert before - after > 0.05 / beta
    with pytest.raises(ValueError, match=r"threshold=2.*nn\.Softplus"):
        nn.lipschitz_bound(jumping)
    with pytest.raises(ValueError, match=r"nn\.Softplus"):
        nn.LipschitzMLP(2, [4], activation=jumping)(torch.zeros(3, 2))


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("coeff", [0.0, 1.0, 1.5])
def test_a_coeff_that_is_set_later_is_checked_too(kind: str, coeff: float) -> None:
    make, shape = NETS[kind]
    net = make(None)
    block = transforms.ResidualTransform(net)
    net.coeff = coeff
    for call in (block, block.inverse, lambda _: net.lipschitz_bound()):
        with pytest.raises(ValueError, match="coeff must be"):
            call(torch.zeros(2, *shape))


class Gained(nn.Activation):
    """gain * sin(x), of which a constant may follow a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    @property
    def lipschitz(self) -> float:  # type: ignore[override]
        return float(self.gain.detach().abs())

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.gain * inputs.sin(), self.gain * inputs.cos()


@pytest.mark.parametrize("net", [nn.LipschitzMLP, nn.LipschitzDenseNet])
def test_the_constant_of_halves_is_that_of_now(net: Any) -> None:
    gained = Gained()
    activation = nn.Mixed(gained, nn.Sine())
    g = net(2, [8, 8], activation=activation)
    with torch.no_grad():
        gained.gain.fill_(20.0)
    assert activation.lipschitz == 20.0
    testing.check_lipschitz(g, 3 * torch.randn(200, 2), 0.97)
    assert g.lipschitz_bound() <= 0.97


def test_asking_for_a_bound_changes_nothing() -> None:
    torch.manual_seed(0)
    layer = nn.LipschitzLinear(4, 4, norm=nn.PowerIteration())
    layer(torch.randn(2, 4))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.train().lipschitz_bound()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside"])
def test_the_bound_of_a_torch_layer_is_of_the_parameters_of_now(kind: str, inside: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    if kind == "prune":
        torch.nn.utils.prune.l1_unstructured(layer, "weight", amount=0.3)
    else:
        getattr(torch.nn.utils, kind)(layer)
    module = torch.nn.Sequential(layer, torch.nn.ELU()) if inside else layer
    module(torch.randn(2, 4))
    source: Any = layer.weight_g if kind == "weight_norm" else layer.weight_orig
    source.detach().mul_(10.0)
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    bound = nn.lipschitz_bound(module.train())
    assert all(torch.equal(value, buffers[name]) for name, value in module.named_buffers())
    module.eval()(torch.randn(2, 4))
    assert bound == pytest.approx(float(torch.linalg.matrix_norm(layer.weight.double(), 2)), 0.01)


@pytest.mark.parametrize("size", [1, 3])
def test_one_image_needs_no_batch(size: int) -> None:
    torch.manual_seed(0)
    layer, images = nn.LipschitzConv2d(8, 8, size), torch.randn(4, 8, 8, 8)
    expected = layer(images)
    torch.testing.assert_close(layer(images[0]), expected[0])
    torch.testing.assert_close(torch.vmap(layer)(images), expected)


def test_a_bind_of_one_instance_is_used_in_company() -> None:
    nets = [nn.LipschitzMLP(2, [8]) for _ in range(2)]
    plain = nets[0].bind
    nets[0].bind = lambda context=None: (plain(context), calls.append(1))[0]  # type: ignore
    calls: list[int] = []
    bind_all(nets)
    assert calls == [1]
