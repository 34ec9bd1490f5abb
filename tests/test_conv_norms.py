"""Norms of convolutions: above the truth for every size and padding, and not far above."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nflows_iresnet import nn
from nflows_iresnet.nn.conv_norms import OVERSAMPLINGS
from nflows_iresnet.nn.convolution import PaddingMode, convolve
from tests import planted_conv

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
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
        assert float(nn.SymbolNorm(oversampling)(kernel)) >= largest
    assert nn.conv_norm_bound(kernel) >= largest


@pytest.mark.parametrize(
    "norm", [planted_conv.GridAlone(4), planted_conv.Reshaped(), planted_conv.NoLags()], ids=str
)
def test_planted_norms_underestimate(norm: nn.ConvNorm) -> None:
    assert underestimates(norm)
    assert not underestimates(nn.SymbolNorm(4))


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
        truth * (1 - 1e-9) <= float(nn.SymbolNorm(oversampling)(kernel)) <= truth * factor * 1.001
    )
    assert truth * (1 - 1e-9) <= nn.conv_norm_bound(kernel) <= truth * 1.0098


@pytest.mark.parametrize("oversampling", OVERSAMPLINGS)
def test_certificate_is_at_most_what_any_norm_divides_by(oversampling: int) -> None:
    """Otherwise a network that respects its coefficient would be reported above it."""
    for seed, shape in itertools.product(range(5), KERNELS):
        kernel = random_kernel(shape, seed)
        norm = float(nn.SymbolNorm(oversampling)(kernel))
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
    assert 1 <= float(nn.SymbolNorm(oversampling)(kernel)) <= 1 + 1e-9
    assert 1 <= nn.conv_norm_bound(kernel) <= float(nn.SymbolNorm(oversampling)(kernel))
    if oversampling <= 8:
        size = (2 * oversampling, 2 * oversampling)
        assert true_norm(kernel, size, "circular") == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (2, 4, 5, 3)])
def test_value_is_the_maximum_on_the_grid_times_the_factor(shape: tuple[int, ...]) -> None:
    kernel = random_kernel(shape, 0)
    grid = [16 * (size - 1) for size in shape[2:]]
    symbol = torch.fft.fft2(kernel, s=grid).permute(2, 3, 0, 1)
    expected = torch.linalg.matrix_norm(symbol, ord=2).max() / math.cos(math.pi / 32) ** 2
    torch.testing.assert_close(nn.SymbolNorm(32)(kernel), expected, rtol=1e-11, atol=0)


def test_bound_is_near_the_norm_for_an_image_of_moderate_size() -> None:
    kernel = random_kernel((8, 3, 3, 3), 0)
    for padding_mode, size in (("zeros", (14, 14)), ("circular", (15, 16))):
        truth = true_norm(kernel, size, padding_mode)  # type: ignore[arg-type]
        assert truth <= float(nn.SymbolNorm()(kernel)) <= 1.08 * truth


def test_kernels_of_one_entry_are_matrices() -> None:
    kernel = random_kernel((5, 3, 1, 1), 0)
    assert float(nn.SymbolNorm()(kernel)) == float(nn.SpectralNorm()(kernel[:, :, 0, 0]))
    assert nn.conv_norm_bound(kernel) == nn.spectral_norm_bound(kernel[:, :, 0, 0])


@pytest.mark.parametrize(
    "shape", [(5, 3, 3, 3), (3, 5, 3, 3), (2, 2, 5, 5), (3, 4, 1, 1), (1, 4, 3, 3), (2, 3, 1, 3)]
)
@pytest.mark.parametrize("oversampling", [4, None])
def test_gradients(shape: tuple[int, ...], oversampling: int | None) -> None:
    kernel = random_kernel(shape, 0).requires_grad_()
    norm = nn.SymbolNorm(oversampling)
    assert torch.autograd.gradcheck(lambda weight: norm(weight), (kernel,))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    kernel = random_kernel((4, 2, 3, 3), 0).float().requires_grad_()
    scaled = nn.SymbolNorm()(kernel.detach() * scale)
    torch.testing.assert_close(scaled, nn.SymbolNorm()(kernel).detach() * scale, rtol=1e-6, atol=0)
    nn.SymbolNorm()(kernel * scale).backward()
    assert kernel.grad is not None
    assert bool(kernel.grad.isfinite().all())


def test_weights_that_are_not_finite_are_refused() -> None:
    kernel = torch.full((4, 4, 3, 3), math.nan)
    for norm in (nn.SymbolNorm(), nn.conv_norm_bound):
        with pytest.raises(ValueError, match="not finite"):
            norm(kernel)


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
        nn.SymbolNorm(12)
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
