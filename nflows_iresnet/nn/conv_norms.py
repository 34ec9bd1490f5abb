r"""Upper bounds of the operator norm of a 2-D convolution, for images of EVERY size at once.

A convolution with the kernel W_a (matrices out x in, a = (a_1, a_2)) on the infinite grid is
diagonalised by the Fourier transform, so its norm is the supremum of the norm of its symbol

    S(t) = sum_a W_a exp(-i <a, t>),        t in [0, 2 pi)^2.

* Zero padding on an image of any size is crop o (infinite convolution) o embed, and crop and embed
  have norm 1: at most sup_t \|S(t)\|_2.
* Circular padding on n_1 x n_2 pixels is diagonalised by the discrete Fourier transform: the
  maximum of \|S(t)\|_2 over n_1 n_2 of the frequencies t.

So one number bounds all of them. It is computed on a grid of N_1 x N_2 frequencies.

**Between the frequencies of the grid.** Let M = \|S(t*)\|_2 be the supremum, u and v its singular
vectors, and let all but one frequency be fixed. P(s) = |u^H S(s) v|^2 >= 0 is a trigonometric
polynomial of degree k - 1 with maximum P(t*) = M^2, so |P - M^2 / 2| <= M^2 / 2, and by M. Riesz'
lemma P(t* + d) - M^2 / 2 >= cos((k - 1) d) M^2 / 2 for |d| <= pi / (k - 1), that is
P(t* + d) >= M^2 cos^2((k - 1) d / 2). Some frequency of the grid has |d| <= pi / N. Once for each
of the two frequencies:

    M <= max over the grid of \|S\|_2 / (cos((k_1 - 1) pi / 2 N_1) cos((k_2 - 1) pi / 2 N_2)).

With N = oversampling (k - 1) / 2 that is 1 / cos^2(pi / oversampling), whatever the kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from nflows_iresnet.nn.convolution import (
    PaddingMode,
    adjoint_kernel,
    convolve,
    padded,
    validated_padding_mode,
)
from nflows_iresnet.nn.norms import (
    OperatorNorm,
    SpectralNorm,
    State,
    eigenvectors,
)

OVERSAMPLINGS = (4, 8, 16, 32)
"""Nested grids. The certificate of a layer takes the smallest of their bounds, so it is at most the
norm that any of them would have divided by."""

_TINY = torch.finfo(torch.float64).tiny


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
class SymbolNorm(ConvNorm):
    r"""sup_t \|S(t)\|_2 from a grid of frequencies: an upper bound for images of every size.

    The Gram symbol S^H S (or S S^H, whichever is smaller) is the Fourier transform of the
    autocorrelation of the kernel, which one matrix product gives; half of the frequencies are
    enough for a real kernel. With u and v the singular vectors at the frequency t of the maximum,
    the gradient is Re(conj(u) v^T exp(-i <a, t>)) for each entry a. Kernels of 1 x 1 are matrices:
    their norm is `SpectralNorm`, exactly.

    Between 0 and 1 / cos^2(pi / oversampling) - 1 above the supremum (32: 1.0 %, 16: 4.0 %,
    8: 17 %). For zero padding the supremum itself is above the norm for one size by what a border
    takes away, which vanishes as images grow.

    Cost: eigenvalues of (oversampling (k - 1))^2 / 8 Hermitian matrices of size min(out, in). With
    its gradient, 3 x 3, one CPU thread, at the defaults: 0.3 ms for 64 x 1, 1.2 ms for 64 x 4 and
    512 x 3, 2.2 ms for 128 x 12, 45 ms for 64 x 64 (15 ms with oversampling 8).

    Args:
        oversampling: 4, 8, 16 or 32. By default 32 where one side has at most 8 channels, 16 up
            to 64 channels, 8 beyond.

    References:
        Sedghi, Gupta, Long. The singular values of convolutional layers, 2019 (circular).
        Ehlich, Zeller. Schwankung von Polynomen zwischen Gitterpunkten, 1964 (between points).

    Example:
        >>> kernel = torch.full((1, 1, 3, 3), 1 / 9)
        >>> bool(1.0 <= SymbolNorm()(kernel) <= 1.01)
        True
    """

    oversampling: int | None = None

    def __post_init__(self) -> None:
        if self.oversampling is not None and self.oversampling not in OVERSAMPLINGS:
            raise ValueError(
                f"oversampling must be one of {OVERSAMPLINGS}, got {self.oversampling}"
            )

    def differentiable(self, weight: Tensor, state: State) -> Tensor:
        """PLACEHOLDER."""
        raise NotImplementedError

    def value_and_gradient(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return the bound, and the gradient at the frequency of the maximum."""
        weight = weight.double()
        if weight.shape[2:].numel() == 1:
            value, gradient = SpectralNorm().value_and_gradient(weight[:, :, 0, 0], state)
            return value, gradient[:, :, None, None]
        if weight.shape[0] < weight.shape[1]:
            value, gradient = self._tall(weight.transpose(0, 1))
            return value, gradient.transpose(0, 1)
        return self._tall(weight)

    def _tall(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return bound and gradient for out >= in."""
        oversampling = self.oversampling or _default_oversampling(weight.shape[1])
        first, second = (grid_size(size, oversampling) for size in weight.shape[2:])
        gram = gram_symbol(weight, first, second)
        index = _largest_eigenvalues(gram).argmax()
        columns = second // 2 + 1
        phases = torch.outer(
            _phases(index // columns, first, weight.shape[2], weight),
            _phases(index % columns, second, weight.shape[3], weight),
        )
        symbol = (weight * phases).sum((2, 3))
        right = eigenvectors(symbol.mH @ symbol)[:, -1]
        left = symbol @ right
        value = torch.linalg.vector_norm(left)
        outer = torch.outer(left.conj() / value.clamp_min(_TINY), right)
        excess = math.prod([between_frequencies(size, oversampling) for size in weight.shape[2:]])
        gradient = (outer[:, :, None, None] * phases).real * excess
        return value * excess * symbol_rounding(weight, 64), gradient


def _default_oversampling(thin: int) -> int:
    return 32 if thin <= 8 else 16 if thin <= 64 else 8


def _phases(index: Tensor, count: int, kernel_size: int, weight: Tensor) -> Tensor:
    """Return exp(-i a t) for the entries a of a kernel at the frequency t = 2 pi index / count."""
    entries = torch.arange(kernel_size, dtype=weight.dtype, device=weight.device)
    angle = entries * index * (2 * math.pi / count)
    return torch.polar(torch.ones_like(angle), -angle)


def gram_symbol(weight: Tensor, first: int, second: int) -> Tensor:
    """Return S^H S on half of a grid, shape (first * (second // 2 + 1), in, in)."""
    _, inputs, height, width = weight.shape
    rows = weight.permute(1, 2, 3, 0).reshape(inputs * height * width, -1)
    pairs = (rows @ rows.mT).reshape(inputs, height * width, inputs, height * width)
    pairs = pairs.permute(1, 3, 0, 2).reshape(-1, inputs, inputs)
    lags = _lags(height, first, weight)[:, None, :, None] * second
    lags = lags + _lags(width, second, weight)[None, :, None, :]
    correlation = weight.new_zeros(first * second, inputs, inputs)
    correlation.index_add_(0, lags.flatten(), pairs)
    symbol = torch.fft.rfft2(correlation.reshape(first, second, inputs, inputs), dim=(0, 1))
    return symbol.reshape(-1, inputs, inputs)


def _lags(kernel_size: int, count: int, weight: Tensor) -> Tensor:
    """Return b - a modulo the grid for all pairs (a, b): frequencies of a grid see no more."""
    entries = torch.arange(kernel_size, device=weight.device)
    return (entries[None, :] - entries[:, None]) % count


def _largest_eigenvalues(gram: Tensor) -> Tensor:
    if gram.shape[-1] == 1:
        return gram[:, 0, 0].real
    try:
        return torch.linalg.eigvalsh(gram)[:, -1]
    except RuntimeError as error:
        raise ValueError(_NOT_FINITE) from error


_NOT_FINITE = (
    "the norm of a convolution cannot be computed: its weight has entries that are not finite or "
    "overflow when squared; training has diverged: lower the learning rate or clip gradients"
)


@dataclass(frozen=True)
class ConvPowerIteration(ConvNorm):
    r"""<u, W * v> after power iteration on images of one size, as in the papers: a LOWER bound.

    v <- W^T * u / \|W^T * u\|, u <- W * v / \|W * v\| with the convolution as it is applied. The
    images u and v are kept as buffers, start from fixed noise (a constant image would never leave
    the frequency zero of a circular convolution) and are improved in each training step. Nothing
    is guaranteed, least of all for images of another size; `lipschitz_bound` never relies on this
    estimate.

    Cost: two convolutions of one image per step.

    Args:
        image_size: (H, W) of the images.
        padding_mode: 'zeros' or 'circular', that of the layer.
        num_steps: iterations per training step.
        num_initial_steps: iterations when the buffers are made.

    Raises:
        ValueError: if a size, a number of steps or the padding mode makes no sense.

    References:
        Gouk, Frank, Pfahringer, Cree. Regularisation of neural networks by enforcing Lipschitz
        continuity, 2021. Behrmann et al. Invertible residual networks, 2019.
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
        generator = torch.Generator().manual_seed(0)
        shapes = {"u": weight.shape[0], "v": weight.shape[1]}
        state = {
            name: _unit(torch.randn(1, channels, *self.image_size, generator=generator)).to(weight)
            for name, channels in shapes.items()
        }
        self._iterate(weight, state, self.num_initial_steps)
        return state

    def advance(self, weight: Tensor, state: State) -> None:
        """Improve u and v in place by `num_steps` iterations."""
        self._iterate(weight, state, self.num_steps)

    @torch.no_grad()
    def _iterate(self, weight: Tensor, state: State, steps: int) -> None:
        adjoint = adjoint_kernel(weight)
        for _ in range(steps):
            state["v"].copy_(_unit(convolve(state["u"], adjoint, self.padding_mode)))
            state["u"].copy_(_unit(convolve(state["v"], weight, self.padding_mode)))

    def differentiable(self, weight: Tensor, state: State) -> Tensor:
        """PLACEHOLDER."""
        raise NotImplementedError

    def value_and_gradient(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return <u, W * v> and its gradient."""
        left, right = state["u"].double(), padded(state["v"].double(), weight, self.padding_mode)
        gradient = conv2d_weight(right, list(weight.shape), left)
        return (gradient * weight.double()).sum(), gradient


def _unit(image: Tensor) -> Tensor:
    return image / torch.linalg.vector_norm(image).clamp_min(torch.finfo(image.dtype).tiny)
