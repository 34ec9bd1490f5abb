r"""Upper bounds of the operator norm of a 2-D convolution, for images of EVERY size at once.

A convolution with the kernel W_a (matrices out x in, a = (a_1, a_2)) on the infinite grid is
diagonalised by the Fourier transform. Its norm is the supremum of the norm of its symbol

    S(t) = sum_a W_a exp(-i <a, t>),        t in [0, 2 pi)^2.

Zero padding on an image crops the infinite convolution, and circular padding has the maximum of
\|S\|_2 over some of the frequencies: the supremum bounds both on images of every size. It is
computed on a grid of N_1 x N_2 frequencies, between which the symbol cannot rise far:

    sup \|S\|_2 <= max over the grid of \|S\|_2
                   / (cos((k_1 - 1) pi / 2 N_1) cos((k_2 - 1) pi / 2 N_2)).

With N = oversampling (k - 1) / 2 that is 1 / cos^2(pi / oversampling), whatever the kernel. Proofs:
docs/guarantees.md#images-of-every-size and
docs/guarantees.md#between-the-frequencies-of-the-grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from nflows_iresnet.linearization import is_traced
from nflows_iresnet.nn.convolution import (
    PaddingMode,
    adjoint_kernel,
    convolve,
    padded,
    validated_padding_mode,
)
from nflows_iresnet.nn.norms import OperatorNorm, SchattenNorm, State
from nflows_iresnet.tensor_float import in_full_products

OVERSAMPLINGS = (4, 8, 16, 32)
"""Nested grids. The certificate of a layer takes the smallest of their bounds, so it is at most the
norm that any of them would have divided by."""

_TINY = torch.finfo(torch.float64).tiny

_LARGE = 2**21
"""Complex numbers of symbols that are handled together: three times this many are in memory. More
at a time is nowhere slower on a CPU, and fewer launches on a GPU."""

_MAX_EXCESS = 9e-4
"""Logarithm of what the Schatten norm may be above the spectral norm."""

_SQUARINGS_IN_RANGE = 6
"""Squarings of a matrix of Frobenius norm 1 before it is rescaled: its largest eigenvalue is then
at least n^{-32}, so nothing that matters is lost to underflow."""


class ConvNorm(OperatorNorm):
    r"""A strategy for the norm of a convolution with a weight of shape (out, in, k_1, k_2)."""


def grid_size(kernel_size: int, oversampling: int) -> int:
    """Return N, the number of frequencies along one dimension."""
    return max(1, oversampling // 2 * (kernel_size - 1))


def between_frequencies(kernel_size: int, oversampling: int) -> float:
    """Return by how much a symbol may exceed its maximum on the grid, along one dimension."""
    return 1 / math.cos(math.pi * (kernel_size - 1) / (2 * grid_size(kernel_size, oversampling)))


def symbol_rounding(weight: Tensor, units: int) -> float:
    r"""Return 1 + units * numel(W) * eps, an allowance for the rounding of the symbol's norm.

    The Gram symbol sums products over w = max(out, in) channels and A^2 pairs of kernel entries:
    its error is at most about eps w A \|W\|_F^2 <= eps w A min(out, in) sup \|S\|_2^2.
    """
    return 1 + units * weight.numel() * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class FourierNorm(ConvNorm):
    r"""sup_t \|S(t)\|_2 from a grid of frequencies: an upper bound for images of every size.

    The Gram symbol G = S^H S (or S S^H, whichever is smaller, of size n = min(out, in)) is the
    Fourier transform of the autocorrelation of the kernel, which one matrix product gives; half of
    the frequencies are enough for a real kernel. At each of them \|S\|_2 is bounded by the Schatten
    norm of order p = 2^{s+1} + 2, from s squarings of G, P = G^{2^s}:

        \|S\|_2 <= \|S\|_p = (tr G P)^{1/p} <= n^{1/p} \|S\|_2.

    s is so large that the last factor is at most 1.0009, whatever the kernel. At the frequency of
    the maximum the gradient with respect to S is \|S\|_p S P / tr G P, with respect to the entry a
    of the kernel the real part of its conjugate times exp(-i <a, t>). Nothing is decomposed, no
    value is looked at: a GPU is never waited for. Kernels of 1 x 1 are matrices, for which
    `SchattenNorm` does the same.

    Up to the factors of 1.0009 and of rounding, between 0 and 1 / cos^2(pi / oversampling) - 1
    above the supremum (32: 1.0 %, 16: 4.0 %, 8: 17 %). For zero padding the supremum itself is
    above the norm for one size by what a border takes away, which vanishes as images grow.

    **Rounding.** The value is multiplied by 1 + 1.1 sqrt(n) e, e = d + 4 n (n + 2) v, besides
    `symbol_rounding`, 1 + d with v the unit roundoff of float64: less than 2 * 10^-7 up to
    256 x 256 channels. That makes it an upper bound, for up to 10^7 entries, and at least the
    certificate `conv_norm_bound`, which adds d / 2.
    Proof: docs/guarantees.md#rounding-of-the-fourier-norm.

    Cost: for (oversampling (k - 1))^2 / 8 frequencies s = 9 products of matrices of size n = 2, 10
    for n <= 6, 11 for n <= 39, then 12, in the memory of three such families; complex128, which no
    setting shortens. At most 78 operations for a whole stack of weights. Measured:
    docs/measurements.md#norms-of-convolutions.

    References:
        Sedghi, Gupta, Long. The singular values of convolutional layers, 2019 (circular).
        Delattre, Barthelemy, Araujo, Allauzen. Efficient bound of Lipschitz constant for
        convolutional layers by Gram iteration, 2023 (squarings; the gradient here is exact).
        Ehlich, Zeller. Schwankung von Polynomen zwischen Gitterpunkten, 1964 (between points).

    Args:
        oversampling: 4, 8, 16 or 32. By default 32 where one side has at most 8 channels, 16 up
            to 64 channels, 8 beyond.

    Example:
        >>> kernel = torch.full((1, 1, 3, 3), 1 / 9)
        >>> bool(1.0 <= FourierNorm()(kernel) <= 1.01)
        True
    """

    oversampling: int | None = None

    def __post_init__(self) -> None:
        if self.oversampling is not None and self.oversampling not in OVERSAMPLINGS:
            raise ValueError(
                f"oversampling must be one of {OVERSAMPLINGS}, got {self.oversampling}"
            )

    def value_and_gradient(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return the bound and its gradient, for a weight or a stack (K, out, in, k_1, k_2)."""
        if weight.shape[-2:].numel() == 1:
            value, gradient = _of_matrix(weight).value_and_gradient(weight[..., 0, 0], state)
            return value, gradient[..., None, None]
        stack = weight if weight.dim() == 5 else weight[None]
        values, gradients = self._bounds(_tall(stack))
        gradients = gradients if stack.shape[1] >= stack.shape[2] else gradients.transpose(1, 2)
        return values.view(weight.shape[:-4]), gradients.reshape(weight.shape)

    def of_stack(self, weights: Tensor, states: Sequence[State]) -> tuple[Tensor, Tensor]:
        """Return the norms (K,) and gradients of a stack of weights, as many at once as may be."""
        parts = weights.split(max(1, _LARGE // self._size(_tall(weights))))
        pairs = [self.value_and_gradient(part, {}) for part in parts]
        if len(pairs) == 1:
            return pairs[0]
        values, gradients = zip(*pairs, strict=True)
        return torch.cat(values), torch.cat(gradients)

    def differentiable(self, weight: Tensor, state: State) -> Tensor:
        """Return the same bound of one weight, the frequency of the maximum held fixed."""
        if weight.shape[2:].numel() == 1:
            return _of_matrix(weight).differentiable(weight[:, :, 0, 0], state)
        stack = _tall(weight.double()[None])
        largest = _largest(stack.detach())
        stack = stack / largest
        grid = self._grid(stack)
        with torch.no_grad():
            _, index, _ = _highest(gram_symbol(stack.detach(), *grid))
        phases = torch.view_as_complex(_phases(index, grid, stack))
        symbol = stack[0].flatten(2).to(phases.dtype) @ phases[0]
        return _schatten_norm(symbol) * largest.flatten()[0] * self._factor(stack)

    def _bounds(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return bounds and gradients for weights (K, out, in, k_1, k_2) with out >= in."""
        largest = _largest(weights)
        scaled = weights.double() / largest
        grid = self._grid(weights)
        norms, index, power = _highest(gram_symbol(scaled, *grid))
        norms = norms * self._factor(weights)
        phases = _phases(index, grid, scaled)
        entries = scaled.flatten(3).flatten(1, 2)
        symbol = torch.view_as_complex(torch.bmm(entries, phases)).view(scaled.shape[:3])
        direction = torch.view_as_real(torch.bmm(symbol, power)).flatten(1, 2)
        gradient = torch.bmm(direction, phases.mT)
        paired = (gradient * entries).sum((1, 2)).clamp_min(_TINY)
        gradient = gradient * (norms / paired)[:, None, None]
        return norms * largest.flatten(), gradient.view(scaled.shape)

    def _oversampling(self, tall: Tensor) -> int:
        return self.oversampling or _default_oversampling(tall.shape[-3])

    def _grid(self, tall: Tensor) -> tuple[int, int]:
        """Return the numbers of frequencies in the two dimensions."""
        height, width = tall.shape[-2:]
        oversampling = self._oversampling(tall)
        return grid_size(height, oversampling), grid_size(width, oversampling)

    def _factor(self, tall: Tensor) -> float:
        """Return what the norm on the grid is multiplied by: the excess between, and rounding."""
        excess = [between_frequencies(size, self._oversampling(tall)) for size in tall.shape[-2:]]
        inputs, rounding = tall.shape[-3], symbol_rounding(tall[0], 64)
        error = rounding - 1 + 2 * inputs * (inputs + 2) * torch.finfo(torch.float64).eps
        return math.prod(excess) * rounding * (1 + 1.1 * math.sqrt(inputs) * error)

    def _size(self, tall: Tensor) -> int:
        """Return how many numbers the norm of one weight of a stack handles at a time."""
        first, second = self._grid(tall)
        return max(tall[0].numel(), first * (second // 2 + 1) * tall.shape[2] ** 2)


def num_squarings(size: int) -> int:
    """Return the smallest s with size^{1/p} <= exp(9e-4), p = 2^{s+1} + 2; none for size 1."""
    squarings = 0
    while math.log(size) > _MAX_EXCESS * _order(squarings):
        squarings += 1
    return squarings


def _order(squarings: int) -> int:
    return 2 ** (squarings + 1) + 2


def _of_matrix(weight: Tensor) -> SchattenNorm:
    """Return the norm for kernels of 1 x 1."""
    return SchattenNorm(num_squarings(min(weight.shape[-4:-2])))


def _tall(weights: Tensor) -> Tensor:
    """Return weights (*, out, in, k_1, k_2) or their transposes: out >= in."""
    return weights if weights.shape[-4] >= weights.shape[-3] else weights.transpose(-4, -3)


def _largest(weights: Tensor) -> Tensor:
    """Return numbers to divide a stack by, so that no square overflows or vanishes."""
    largest = torch.linalg.vector_norm(weights, math.inf, dim=(1, 2, 3, 4), keepdim=True)
    return largest.double().clamp_min(_TINY)


def _default_oversampling(thin: int) -> int:
    return 32 if thin <= 8 else 16 if thin <= 64 else 8


def _phases(index: Tensor, grid: tuple[int, int], tall: Tensor) -> Tensor:
    """Return exp(-i <a, t>) for all entries a at the frequencies of some indices: (K, k_1 k_2, 2).

    The last dimension holds real and imaginary parts.
    """
    height, width = tall.shape[-2:]
    columns = grid[1] // 2 + 1
    index = index[:, None, None]
    rows = _angles(height, grid[0], tall)[:, None] * (index // columns)
    angles = rows + _angles(width, grid[1], tall) * (index % columns)
    return torch.stack([angles.cos(), angles.sin()], -1).flatten(1, 2)


def _angles(kernel_size: int, count: int, like: Tensor) -> Tensor:
    """Return -a t for the entries a of a kernel at the first frequency t."""
    last = -2 * math.pi * (kernel_size - 1) / count
    return torch.linspace(0, last, kernel_size, dtype=like.dtype, device=like.device)


def gram_symbol(weights: Tensor, first: int, second: int) -> Tensor:
    """Return S^H S on half of a grid, shape (K, first * (second // 2 + 1), in, in)."""
    count, _, inputs, height, width = weights.shape
    rows = weights.flatten(2)
    pairs = torch.bmm(rows.mT, rows).view(count, inputs, height * width, inputs, height * width)
    pairs = pairs.permute(0, 2, 4, 1, 3).reshape(count, -1, inputs * inputs)
    lags = _lags(height, first, weights)[:, None, :, None] * second
    lags = lags + _lags(width, second, weights)[None, :, None, :]
    correlation = weights.new_zeros(count, first * second, inputs * inputs)
    correlation.index_add_(1, lags.flatten(), pairs)
    symbol = torch.fft.rfft2(correlation.view(count, first, second, -1), dim=(1, 2))
    return symbol.reshape(count, -1, inputs, inputs).contiguous()


def _lags(kernel_size: int, count: int, weight: Tensor) -> Tensor:
    """Return b - a modulo the grid for all pairs (a, b): frequencies of a grid see no more."""
    entries = torch.arange(kernel_size, device=weight.device)
    return (entries[None, :] - entries[:, None]) % count


def _highest(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest Schatten norm over frequencies, where it is, and the power there.

    Args:
        gram: G, shape (K, F, n, n); overwritten.

    Returns:
        Shapes (K,), (K,) and (K, n, n), the power G^{2^s} up to a factor.
    """
    count, _, inputs, _ = gram.shape
    squarings = num_squarings(inputs)
    gram = gram.flatten(0, 1)
    size = _rescale(gram)
    power, log_scale = _power(gram, squarings)
    trace = torch.bmm(_row(gram), _row(power).mT).flatten()
    log_norms = (trace.log() + log_scale) / _order(squarings) + size.log() / 2
    highest, index = log_norms.view(count, -1).max(1)
    power = power.view(count, -1, inputs, inputs)
    chosen = index[:, None, None, None].expand(count, 1, inputs, inputs)
    return highest.exp(), index, power.gather(1, chosen)[:, 0]


def _power(unit: Tensor, squarings: int) -> tuple[Tensor, Tensor | float]:
    """Return the power 2^squarings of matrices (F, n, n) divided by a scale, and its logarithm.

    The powers are written in turn to two pieces of memory; the given matrices are kept.
    """
    power, spare = unit, None
    log_scale: Tensor | float = 0.0
    for index in range(1, squarings + 1):
        is_free = power is not unit and not is_traced()
        power, spare = torch.bmm(power, power, out=spare), power if is_free else None
        if index % _SQUARINGS_IN_RANGE == 0 and index < squarings:
            size = _rescale(power)
            log_scale = log_scale + 2.0 ** (squarings - index) * size.log()
    return power, log_scale


def _rescale(matrices: Tensor) -> Tensor:
    """Divide complex matrices (F, n, n) by their Frobenius norms in place, and return these."""
    rows = _row(matrices)
    size = torch.linalg.vector_norm(rows, dim=(1, 2), keepdim=True).clamp_min(_TINY)
    rows.mul_(size.reciprocal())
    return size.flatten()


def _row(matrices: Tensor) -> Tensor:
    """Return complex matrices (F, n, n) as real rows (F, 1, 2 n^2)."""
    return torch.view_as_real(matrices).view(matrices.shape[0], 1, -1)


def _schatten_norm(matrix: Tensor) -> Tensor:
    """Return the Schatten norm of a symbol (out, in), out >= in, differentiable repeatedly."""
    squarings = num_squarings(matrix.shape[1])
    gram = matrix.mH @ matrix
    size = torch.linalg.matrix_norm(gram.detach()).clamp_min(_TINY)
    power = unit = gram / size
    log_scale = size.log() * (_order(squarings) / 2)
    for index in range(1, squarings + 1):
        power = power @ power
        if index % _SQUARINGS_IN_RANGE == 0 and index < squarings:
            size = torch.linalg.matrix_norm(power.detach()).clamp_min(_TINY)
            power = power / size
            log_scale = log_scale + 2.0 ** (squarings - index) * size.log()
    trace = (unit.conj() * power).real.sum().clamp_min(_TINY)
    return ((trace.log() + log_scale) / _order(squarings)).exp()


@dataclass(frozen=True)
class ConvPowerIteration(ConvNorm):
    r"""<u, W * v> after power iteration on images of one size, as in the papers: a LOWER bound.

    v <- W^T * u / \|W^T * u\|, u <- W * v / \|W * v\| with the convolution as it is applied. The
    images u and v are kept as buffers, start from fixed noise (a constant image would never leave
    the frequency zero of a circular convolution) and are improved in each training step. Nothing
    is guaranteed, least of all for images of another size; `lipschitz_bound` never relies on this
    estimate.

    Cost: two convolutions of one image per step.

    References:
        Gouk, Frank, Pfahringer, Cree. Regularisation of neural networks by enforcing Lipschitz
        continuity, 2021. Behrmann et al. Invertible residual networks, 2019.

    Args:
        image_size: (H, W) of the images.
        padding_mode: 'zeros' or 'circular', that of the layer.
        num_steps: iterations per training step.
        num_initial_steps: iterations when the buffers are made.

    Raises:
        ValueError: if a size, a number of steps or the padding mode makes no sense.
    """

    image_size: tuple[int, int]
    padding_mode: PaddingMode = "zeros"
    num_steps: int = 1
    num_initial_steps: int = 50
    is_upper_bound = False

    def __post_init__(self) -> None:
        validated_padding_mode(self.padding_mode)
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size must be (height, width), got {self.image_size}")
        if self.num_steps < 1 or self.num_initial_steps < 0:
            raise ValueError(
                f"num_steps must be at least 1 and num_initial_steps at least 0, got "
                f"{self.num_steps} and {self.num_initial_steps}"
            )

    def initial_state(self, weight: Tensor) -> State:
        """Return the images u and v, started from noise that is always the same."""
        generator = torch.Generator("cpu").manual_seed(0)
        noise = partial(torch.randn, generator=generator, device="cpu")
        state = {
            "u": _unit(noise(1, weight.shape[0], *self.image_size)).to(weight),
            "v": _unit(noise(1, weight.shape[1], *self.image_size)).to(weight),
        }
        self._iterate(weight, state, self.num_initial_steps)
        return state

    def advance(self, weight: Tensor, state: State) -> None:
        """Improve u and v in place by `num_steps` iterations."""
        self._iterate(weight, state, self.num_steps)

    @in_full_products()
    @torch.no_grad()
    def _iterate(self, weight: Tensor, state: State, steps: int) -> None:
        adjoint = adjoint_kernel(weight)
        for _ in range(steps):
            state["v"].copy_(_unit(convolve(state["u"], adjoint, self.padding_mode)))
            state["u"].copy_(_unit(convolve(state["v"], weight, self.padding_mode)))

    def value_and_gradient(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return <u, W * v> and its gradient."""
        left, right = state["u"].double(), padded(state["v"].double(), weight, self.padding_mode)
        gradient = conv2d_weight(right, list(weight.shape), left)
        return (gradient * weight.double()).sum(), gradient

    def differentiable(self, weight: Tensor, state: State) -> Tensor:
        """Return <u, W * v>, linear in the weight, for autograd to differentiate repeatedly."""
        with torch.no_grad():
            _, gradient = self.value_and_gradient(weight.detach(), state)
        return (gradient * weight.double()).sum()


def _unit(image: Tensor) -> Tensor:
    return image / torch.linalg.vector_norm(image).clamp_min(torch.finfo(image.dtype).tiny)
