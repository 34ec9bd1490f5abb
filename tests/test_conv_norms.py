"""Norms of convolutions: above the truth for every size and padding, and not far above."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nflows_iresnet import nn
from nflows_iresnet.nn import conv_norms
from nflows_iresnet.nn.conv_norms import OVERSAMPLINGS, between_frequencies, grid_size
from nflows_iresnet.nn.convolution import PaddingMode, convolve
from tests import device
from tests.planted import conv as planted_conv

PADDINGS: tuple[PaddingMode, ...] = ("zeros", "circular")
KERNELS = [(1, 1, 3, 3), (2, 5, 3, 3), (5, 2, 3, 3), (3, 3, 5, 5), (2, 2, 1, 3), (4, 3, 1, 1)]
SIZES = [(1, 1), (1, 7), (2, 2), (5, 3), (8, 8)]


def matrix_of(weight: Tensor, size: tuple[int, int], padding_mode: PaddingMode) -> Tensor:
    """The convolution as a dense matrix (out H W, in H W)."""
    shape = (weight.shape[1], *size)
    basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return convolve(basis, weight.detach().double(), padding_mode).flatten(start_dim=1).mT


def true_norm(weight: Tensor, size: tuple[int, int], padding_mode: PaddingMode) -> float:
    return float(torch.linalg.matrix_norm(matrix_of(weight, size, padding_mode), ord=2))


def fits(weight: Tensor, size: tuple[int, int], padding_mode: PaddingMode) -> bool:
    reach = [kernel // 2 for kernel in weight.shape[2:]]
    return padding_mode == "zeros" or all(a <= b for a, b in zip(reach, size, strict=True))


def largest_true_norm(weight: Tensor) -> float:
    """Over all sizes and paddings of this file."""
    return max(
        true_norm(weight, size, padding_mode)
        for size, padding_mode in itertools.product([*SIZES, (12, 12)], PADDINGS)
        if fits(weight, size, padding_mode)
    )


def random_kernel(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=device.generator(seed), dtype=torch.float64)


def underestimates(norm: nn.ConvNorm) -> bool:
    """Whether some kernel stretches some image by more than its norm."""
    kernels = [random_kernel((3, 2, 3, 3), seed) for seed in range(8)]
    return any(float(norm(kernel)) < largest_true_norm(kernel) for kernel in kernels)


@pytest.mark.parametrize("shape", KERNELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_one_number_bounds_all_sizes_and_paddings(shape: tuple[int, ...], seed: int) -> None:
    kernel = random_kernel(shape, seed)
    largest = largest_true_norm(kernel)
    for oversampling in OVERSAMPLINGS:
        assert float(nn.FourierNorm(oversampling)(kernel)) >= largest
    assert nn.conv_norm_bound(kernel) >= largest


@pytest.mark.parametrize(
    "norm", [planted_conv.GridAlone(4), planted_conv.Reshaped(), planted_conv.NoLags()], ids=str
)
def test_planted_norms_underestimate(norm: nn.ConvNorm) -> None:
    assert underestimates(norm)
    assert not underestimates(nn.FourierNorm(4))


def finest_symbol_norm(kernel: Tensor) -> float:
    """The maximum of the symbol over 240 x 240 frequencies, by a plain Fourier transform."""
    symbol = torch.fft.fft2(kernel, s=(240, 240)).permute(2, 3, 0, 1)
    return float(torch.linalg.matrix_norm(symbol, ord=2).max())


@pytest.mark.parametrize("shape", KERNELS)
@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
def test_bound_is_within_its_factor(shape: tuple[int, ...], oversampling: int) -> None:
    kernel, factor = random_kernel(shape, 2), 1 / math.cos(math.pi / oversampling) ** 2
    truth = finest_symbol_norm(kernel)
    assert (
        truth * (1 - 1e-9) <= float(nn.FourierNorm(oversampling)(kernel)) <= truth * factor * 1.001
    )
    assert truth * (1 - 1e-9) <= nn.conv_norm_bound(kernel) <= truth * 1.0098


@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
def test_certificate_is_at_most_what_any_norm_divides_by(oversampling: int) -> None:
    """Otherwise a network that respects its coefficient would be reported above it."""
    for seed, shape in itertools.product(range(5), KERNELS):
        kernel = random_kernel(shape, seed)
        norm = float(nn.FourierNorm(oversampling)(kernel))
        assert nn.conv_norm_bound(kernel) <= norm


def extremal_kernel(oversampling: int) -> Tensor:
    """The symbol cos(t_1 - s) cos(t_2 - s), s half a step of the grid: nothing peaks more sharply.

    Complex numbers a + ib are written as matrices [[a, -b], [b, a]].
    """
    turn = torch.tensor(math.pi / oversampling, dtype=torch.float64)
    half = torch.polar(torch.tensor(0.5, dtype=torch.float64), turn)
    line = torch.stack([half.conj(), torch.zeros_like(half), half])
    entries = torch.outer(line, line)
    rows = [[entries.real, -entries.imag], [entries.imag, entries.real]]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
def test_factor_between_frequencies_is_sharp(oversampling: int) -> None:
    kernel = extremal_kernel(oversampling)
    assert 1 <= float(nn.FourierNorm(oversampling)(kernel)) <= 1.001
    assert 1 <= nn.conv_norm_bound(kernel) <= float(nn.FourierNorm(oversampling)(kernel))
    if oversampling <= 8:
        size = (2 * oversampling, 2 * oversampling)
        assert true_norm(kernel, size, "circular") == pytest.approx(1, rel=1e-12)


def norm_on_the_grid(kernel: Tensor, oversampling: int) -> float:
    """The bound from singular values at each frequency of the grid, in float64."""
    first, second = (grid_size(size, oversampling) for size in kernel.shape[2:])
    angles = [
        torch.arange(size, dtype=torch.float64)[:, None]
        * torch.arange(count)
        * (2 * math.pi / count)
        for size, count in zip(kernel.shape[2:], (first, second), strict=True)
    ]
    waves = [torch.polar(torch.ones_like(angle), -angle) for angle in angles]
    symbol = torch.einsum("oihw,hs,wt->stoi", kernel.detach().to(torch.complex128), *waves)
    excess = math.prod(between_frequencies(size, oversampling) for size in kernel.shape[2:])
    return float(torch.linalg.svdvals(symbol).max()) * excess


def test_value_is_that_on_the_grid_where_one_singular_value_stands_out() -> None:
    kernel = random_kernel((4, 2, 5, 3), 0)
    expected = norm_on_the_grid(kernel, 32)
    assert float(nn.FourierNorm(32)(kernel)) == pytest.approx(expected, rel=1e-9)


def middle(matrix: Tensor, size: int = 3) -> Tensor:
    """A kernel with one entry that is not zero: the same symbol at all frequencies, up to phase."""
    return torch.nn.functional.pad(matrix[:, :, None, None], [size // 2] * 4)


def orthogonal(outputs: int, inputs: int) -> Tensor:
    size = max(outputs, inputs)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0][:outputs, :inputs]


def hadamard(size: int) -> Tensor:
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < size:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs


def shifts(channels: int) -> Tensor:
    """Each channel moved by another entry, then mixed: an orthogonal symbol at each frequency."""
    kernel = torch.zeros(channels, channels, 3, 3, dtype=torch.float64)
    mixed = orthogonal(channels, channels)
    for channel in range(channels):
        kernel[channel, :, channel % 3, channel // 3 % 3] = mixed[channel]
    return kernel


def toeplitz(outputs: int, inputs: int) -> Tensor:
    """Decay over channels and pixels, skewed: singular values lie densely below the largest."""
    channels = torch.arange(outputs)[:, None] - torch.arange(inputs)
    pixels = torch.arange(-1, 2)
    distance = channels[:, :, None, None] - 2 * pixels[:, None] + pixels
    return torch.exp(-distance.abs() / 3.0).double() * (1 - 0.1 * channels.sign())[:, :, None, None]


STRUCTURED: dict[str, Callable[[], Tensor]] = {
    "gaussian": lambda: torch.randn(5, 4, 3, 3),
    "one channel": lambda: torch.randn(6, 1, 3, 3),
    "a row of pixels": lambda: torch.randn(3, 4, 1, 5),
    "a column of pixels": lambda: torch.randn(4, 2, 3, 1),
    "rank one": lambda: torch.randn(5, 1, 1, 1) * torch.randn(1, 4, 1, 1) * torch.randn(1, 1, 3, 3),
    "delta": lambda: middle(torch.eye(5)),
    "a few channels": lambda: middle(torch.diag(torch.arange(6.0))),
    "averaging": lambda: torch.full((3, 3, 3, 3), 1 / 27),
    "orthogonal": lambda: middle(orthogonal(7, 4)),
    "orthogonal at all frequencies": lambda: shifts(6),
    "hadamard": lambda: middle(hadamard(8)),
    "toeplitz": lambda: toeplitz(6, 4),
    "checkerboard": lambda: torch.randn(3, 3, 1, 1) * (-1.0) ** torch.arange(9).reshape(3, 3),
    "extremal": lambda: extremal_kernel(32),
    "one by one, equal singular values": lambda: orthogonal(8, 8)[:, :, None, None],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", STRUCTURED)
def test_structured_kernels_are_bounded_within_a_thousandth(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    kernel = STRUCTURED[kind]().to(dtype)
    value = float(nn.FourierNorm(32)(kernel))
    on_the_grid = norm_on_the_grid(kernel, 32)
    assert on_the_grid <= value <= 1.001 * on_the_grid
    assert max(largest_true_norm(kernel), nn.conv_norm_bound(kernel)) <= value


@pytest.mark.parametrize("channels", [2, 6, 7, 16, 39, 40, 64])
def test_it_is_within_a_thousandth_for_any_number_of_equal_singular_values(channels: int) -> None:
    """Where all are equal, the Schatten norm is as far above the norm as it can be."""
    torch.manual_seed(4)
    kernel = middle(orthogonal(channels, channels).float())
    truth = float(torch.linalg.matrix_norm(kernel[:, :, 1, 1].double(), 2))
    value = float(nn.FourierNorm(4)(kernel)) * math.cos(math.pi / 4) ** 2
    assert truth <= value <= 1.001 * truth


def rank_one_kernels() -> list[tuple[Tensor, float]]:
    """Kernels with their exact norms: nothing but rounding separates norm and Schatten norm."""
    pairs = []
    for seed in range(20):
        left, right = (100 * random_kernel((10,), seed)).round().split([7, 3])
        squares = [int(each) ** 2 for each in (*left, *right)]
        norm = math.sqrt(sum(squares[:7]) * sum(squares[7:]))
        pairs.append((middle(torch.outer(left, right)), norm))
    return pairs


def test_rounding_is_allowed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def ratios() -> list[float]:
        norm, excess = nn.FourierNorm(8), between_frequencies(3, 8) ** 2
        return [float(norm(kernel)) / excess / truth for kernel, truth in rank_one_kernels()]

    assert min(ratios()) > 1
    assert max(ratios()) < 1 + 1e-9
    planted = between_frequencies(3, 8) ** 2
    monkeypatch.setattr(nn.FourierNorm, "_factor", lambda self, tall: planted)
    assert min(ratios()) < 1


def test_planted_orders_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One squaring fewer in the logarithm than were done, and fewer squarings than needed."""
    kernels = [middle(orthogonal(4, 4)), random_kernel((4, 4, 3, 3), 0)]
    truths = [norm_on_the_grid(kernel, 32) for kernel in kernels]
    right = conv_norms._order
    monkeypatch.setattr(conv_norms, "_order", lambda squarings: right(squarings - 1))
    assert any(float(nn.FourierNorm(32)(k)) < t for k, t in zip(kernels, truths, strict=True))
    monkeypatch.setattr(conv_norms, "_order", right)
    monkeypatch.setattr(conv_norms, "num_squarings", lambda size: 7)
    assert float(nn.FourierNorm(32)(kernels[0])) > 1.002 * truths[0]


def test_bound_is_near_the_norm_for_an_image_of_moderate_size() -> None:
    kernel = random_kernel((8, 3, 3, 3), 0)
    for padding_mode, size in (("zeros", (14, 14)), ("circular", (15, 16))):
        truth = true_norm(kernel, size, padding_mode)  # type: ignore[arg-type]
        assert truth <= float(nn.FourierNorm()(kernel)) <= 1.08 * truth


def test_kernels_of_one_entry_are_matrices() -> None:
    kernel = random_kernel((5, 3, 1, 1), 0)
    truth = float(torch.linalg.matrix_norm(kernel[:, :, 0, 0], 2))
    assert truth <= float(nn.FourierNorm()(kernel)) <= 1.001 * truth
    assert nn.conv_norm_bound(kernel) == nn.spectral_norm_bound(kernel[:, :, 0, 0])


@pytest.mark.parametrize(
    "shape", [(5, 3, 3, 3), (3, 5, 3, 3), (2, 2, 5, 5), (3, 4, 1, 1), (1, 4, 3, 3), (2, 3, 1, 3)]
)
@pytest.mark.parametrize("oversampling", [4, None])
def test_gradients(shape: tuple[int, ...], oversampling: int | None) -> None:
    kernel = random_kernel(shape, 0).requires_grad_()
    norm = nn.FourierNorm(oversampling)
    assert torch.autograd.gradcheck(lambda weight: norm(weight), (kernel,))


SCALES = [
    (torch.float32, 0.0),
    (torch.float32, 1e-30),
    (torch.float32, 1e30),
    (torch.float64, 0.0),
    (torch.float64, 1e-200),
    (torch.float64, 1e150),
]


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_scale_does_not_matter(
    dtype: torch.dtype, scale: float, inputs: int, kernel_size: int
) -> None:
    kernel = random_kernel((4, inputs, kernel_size, kernel_size), 0).to(dtype)
    norm, scaled = nn.FourierNorm(), kernel * scale
    plain_value, plain_gradient = norm.value_and_gradient(kernel, {})
    value, gradient = norm.value_and_gradient(scaled, {})
    torch.testing.assert_close(value, plain_value * scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.differentiable(scaled, {}), value, rtol=1e-9, atol=0)
    expected = plain_gradient if scale > 0 else torch.zeros_like(plain_gradient)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    if scale > 0 or kernel_size > 1:
        scaled.requires_grad_()
        norm.differentiable(scaled, {}).backward()
        assert scaled.grad is not None
        torch.testing.assert_close(scaled.grad, expected.to(dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("values_are_seen")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_weights_that_are_not_finite_are_refused(bad: float, kernel_size: int) -> None:
    """By the layer: the norm looks at no value, so it says so by a value that is not finite."""
    layer = nn.LipschitzConv2d(4, 4, kernel_size)
    with torch.no_grad():
        layer.weight[1, 2, 0, 0] = bad
    assert not nn.FourierNorm()(layer.weight).isfinite()
    with pytest.raises(ValueError, match="not finite"):
        layer.effective_weight()
    with pytest.raises(ValueError, match="not finite"):
        nn.conv_norm_bound(layer.weight)


class NoWaiting(TorchDispatchMode):
    """Fails where the host of a GPU would wait for a value, and counts the other operations."""

    waits = ("local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "linalg_eig")
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1].removeprefix("_")
        masks = [each for each in args[1] if each is not None] if name == "index" else []
        assert not name.startswith(self.waits), name
        assert all(mask.dtype != torch.bool for mask in masks), name
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [*KERNELS, (3, 9, 3, 3), (16, 17, 3, 3), (20, 20, 1, 1)])
def test_no_device_is_waited_for(shape: tuple[int, ...]) -> None:
    kernels = random_kernel((3, *shape), 0).float()
    with torch.no_grad(), NoWaiting() as of_one:
        nn.FourierNorm().value_and_gradient(kernels[0], {})
    with torch.no_grad(), NoWaiting() as of_three:
        nn.FourierNorm().of_stack(kernels, [{}] * 3)
    assert of_three.count <= of_one.count + 4
    with NoWaiting():
        nn.FourierNorm().differentiable(kernels[0].requires_grad_(), {}).backward()


@pytest.mark.parametrize("shape", KERNELS)
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_a_stack_is_what_its_weights_are(
    shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_norms, "_LARGE", at_once)
    monkeypatch.setattr(nn.FourierNorm, "_size", lambda self, tall: 1)
    kernels = random_kernel((5, *shape), 0) * torch.logspace(-9, 9, 5)[:, None, None, None, None]
    norm = nn.FourierNorm()
    values, gradients = norm.of_stack(kernels, [{}] * 5)
    pairs = [norm.value_and_gradient(kernel, {}) for kernel in kernels]
    torch.testing.assert_close(values, torch.stack([value for value, _ in pairs]))
    torch.testing.assert_close(gradients, torch.stack([gradient for _, gradient in pairs]))


@pytest.mark.parametrize("shape", [*KERNELS, (9, 8, 3, 3), (1, 5, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_plain_expression_has_the_same_value_and_gradient(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    kernel, norm = random_kernel(shape, 3).to(dtype).requires_grad_(), nn.FourierNorm()
    value, gradient = norm.value_and_gradient(kernel.detach(), {})
    plain = norm.differentiable(kernel, {})
    torch.testing.assert_close(plain.detach(), value, rtol=1e-9, atol=0)
    (slope,) = torch.autograd.grad(plain, kernel)
    atol = 1e-6 * float(gradient.abs().max())
    torch.testing.assert_close(slope.double(), gradient, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (2, 3, 1, 3), (1, 2, 3, 3), (3, 2, 1, 1)])
def test_the_plain_expression_can_be_differentiated_twice(shape: tuple[int, ...]) -> None:
    kernel, norm = random_kernel(shape, 0).requires_grad_(), nn.FourierNorm()
    assert torch.autograd.gradgradcheck(lambda weight: norm.differentiable(weight, {}), (kernel,))
    assert torch.autograd.gradgradcheck(lambda weight: norm(weight), (kernel,))


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (2, 3, 1, 3), (3, 2, 1, 1)])
def test_transforms_of_functions_see_the_gradient(shape: tuple[int, ...]) -> None:
    kernels, norm = random_kernel((3, *shape), 0), nn.FourierNorm()
    _, gradients = norm.of_stack(kernels, [{}] * 3)
    slopes = torch.func.vmap(torch.func.grad(lambda weight: norm(weight)))(kernels)
    torch.testing.assert_close(slopes, gradients)
    change = torch.func.jvp(lambda weight: norm(weight), (kernels[0],), (kernels[1],))[1]
    torch.testing.assert_close(change, (gradients[0] * kernels[1]).sum())


def test_the_plain_expression_of_power_iteration_is_linear() -> None:
    kernel = random_kernel((4, 3, 3, 3), 1).requires_grad_()
    norm = nn.ConvPowerIteration((5, 6))
    state = norm.initial_state(kernel.detach())
    value, gradient = norm.value_and_gradient(kernel.detach(), state)
    plain = norm.differentiable(kernel, state)
    torch.testing.assert_close(plain.detach(), value)
    (slope,) = torch.autograd.grad(plain, kernel)
    torch.testing.assert_close(slope, gradient)


@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_power_iteration_is_a_lower_bound_that_converges(padding_mode: PaddingMode) -> None:
    kernel = random_kernel((4, 3, 3, 3), 1)
    truth = true_norm(kernel, (5, 6), padding_mode)
    norm = nn.ConvPowerIteration((5, 6), padding_mode, num_initial_steps=1)
    state, estimates = norm.initial_state(kernel), []
    for _ in range(1000):
        estimates.append(float(norm(kernel, state)))
        norm.advance(kernel, state)
    assert all(estimate <= truth * (1 + 1e-12) for estimate in estimates)
    assert estimates[0] < 0.99 * truth
    assert estimates[-1] == pytest.approx(truth, rel=2e-3)
    assert torch.autograd.gradcheck(lambda weight: norm(weight, state), (kernel.requires_grad_(),))


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="oversampling"):
        nn.FourierNorm(12)
    with pytest.raises(ValueError, match="image_size"):
        nn.ConvPowerIteration((0, 3))
    with pytest.raises(ValueError, match="num_steps"):
        nn.ConvPowerIteration((3, 3), num_steps=0)
    with pytest.raises(ValueError, match="padding_mode"):
        nn.ConvPowerIteration((3, 3), "reflect")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": 3, "stride": 2},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "groups": 2},
        {"kernel_size": (2, 4), "padding": 1},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_convolutions_of_torch(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 6, **{"kernel_size": 3, "bias": False, **options}).double()
    basis = torch.eye(4 * 42, dtype=torch.float64).reshape(-1, 4, 6, 7)
    truth = float(torch.linalg.matrix_norm(layer(basis).detach().flatten(start_dim=1), ord=2))
    assert truth <= nn.lipschitz_bound(layer) <= 2.2 * truth


@pytest.mark.parametrize(
    "options", [{"padding_mode": "reflect"}, {"padding_mode": "circular", "padding": 2}], ids=str
)
def test_padding_without_a_bound_is_refused(options: dict[str, Any]) -> None:
    layer = torch.nn.Conv2d(1, 1, 3, **{"padding": 1, **options})
    with pytest.raises(ValueError, match="padding_mode"):
        nn.lipschitz_bound(layer)


def test_the_certificate_allows_for_the_rounding_of_the_symbol() -> None:
    """The symbol of one entry has the norm one at every frequency: the rest are the two factors."""
    for size in (3, 5):
        weight = torch.zeros(1, 1, size, size, dtype=torch.float64)
        weight[0, 0, 1, 2] = 1.0
        excess = nn.conv_norm_bound(weight) / between_frequencies(size, 32) ** 2 - 1
        roundings = excess / torch.finfo(torch.float64).eps / weight.numel()
        assert roundings == pytest.approx(32, abs=4)


def test_power_iteration_starts_where_the_weight_is_whatever_the_default_device() -> None:
    kernel = random_kernel((4, 3, 3, 3), 1)
    norm = nn.ConvPowerIteration((5, 6))
    expected = norm.initial_state(kernel)
    with torch.device("meta"):
        found = norm.initial_state(kernel)
    for name, vector in expected.items():
        torch.testing.assert_close(found[name], vector, rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1e-300, 1e-170, 1e160, 1e300])
def test_the_certificate_of_a_kernel_times_any_factor_is_that_times_the_factor(
    factor: float,
) -> None:
    """The squares of its entries would be zero or infinite in float64."""
    kernel = random_kernel((3, 2, 3, 3), 7)
    bound = nn.conv_norm_bound(factor * kernel) / factor
    assert bound == pytest.approx(nn.conv_norm_bound(kernel), rel=1e-12)
    assert bound >= largest_true_norm(kernel)
    assert nn.conv_norm_bound(torch.zeros_like(kernel)) == 0
