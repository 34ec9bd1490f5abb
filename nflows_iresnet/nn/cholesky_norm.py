r"""An upper bound of \|W\|_2 of wide matrices: an estimate, and a Cholesky factorisation as proof.

Rounding is part of it. Proof: docs/guarantees.md#rounding-of-the-cholesky-norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_iresnet.linearization import is_traced
from nflows_iresnet.nn.norms import (
    _UNIT_ROUNDOFFS,
    MatrixNorm,
    SchattenNorm,
    State,
    gram_matrix,
    tall_side,
    undo_tall_side,
)
from nflows_iresnet.tensor_float import in_full_products

_LARGEST_IN_SINGLE = 1024
"""Up to this size float32 is used: its rounding adds 1.4 % for Gaussian matrices, 2.9 % at most."""

_TERMS = 512
"""Terms of a sum in short precision, at most: a Gram matrix is the sum of such sums."""

_SQUARINGS = 12
"""Squarings of the small matrix that find its top vector."""

_SQUARINGS_IN_RANGE = 5
"""Squarings of a 24 x 24 matrix of Frobenius norm 1 before it is rescaled, in float64."""

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class CholeskyNorm(MatrixNorm):
    r"""An estimate of \|W\|_2 that a Cholesky factorisation proves to be large enough.

    k Lanczos steps on G = W^T W, of size n = min(out, in), give a unit vector v with t = \|W v\|
    just below \|W\|_2. With z = t (1 + slack), z^2 I - G has a Cholesky factorisation if and only
    if z > \|W\|_2: where it runs through in floating point, z with an allowance for rounding is the
    value. Where it does not, `SchattenNorm()` stands in. So the value is at most `slack` and the
    allowance above \|W\|_2, or at most the Schatten norm; every matrix has an upper bound.

    **Gradient.** With u = W v / \|W v\|, it is u v^T value / t: that of W -> \|W v\| value / t for
    the v that was found. By <gradient, W> = value, dividing by the norm is a projection. As
    \|W\|_2 <= value, u v^T is an e-subgradient of the norm with e = value - t, and where the top
    singular value is separated, k steps find its vectors, and u v^T is the gradient of \|W\|_2.
    There are no second derivatives: how v moves is not known. `SecondDerivativeError` says so.

    Where the singular values below the top lie densely, the vector of k steps mixes some of the
    top ones. The start of Lanczos is fixed, so that nothing is random, and the value jumps (by
    what the two norms differ by) only where the factorisation begins to fail.

    Cost: one product of size n, one factorisation (a third of a product), and 2 k products with
    vectors; in float32 for float32 weights up to n = 1024, otherwise in float64. On a CPU the
    Schatten norm is computed where it is needed only; elsewhere nothing waits for a value, so it is
    computed always: there this norm is not for speed.

    **Rounding.** With u the unit roundoff, U = W / max |W|, p sums of at most c = 512 terms in G,
    and z^2 the number that was used,

        value^2 / max |W|^2 = z^2 + u (l + n + 3) / (1 - 2 (n + 1) u) max_j (z^2 - G_jj)
                              + u k / (1 - 2 k u) tr G,    k = c + p + 4,

    l = 1 / (4 sin^2(pi / (4 n + 2))) = 0.41 n^2: for Gaussian matrices 0.1 % for n = 256, 0.5 %
    for n = 512 and 1.4 % for n = 1024 in float32. Proof:
    docs/guarantees.md#rounding-of-the-cholesky-norm.

    References:
        Rump. Verification of positive definiteness, 2006.
        Higham. Accuracy and stability of numerical algorithms, 2002, theorem 10.3.
        Kuczynski, Wozniakowski. Estimating the largest eigenvalue by the power and Lanczos
        algorithms with a random start, 1992.

    Args:
        num_steps: k.
        slack: by how much t is raised, relatively.

    Example:
        >>> import torch
        >>> weight = torch.eye(300)
        >>> 1 <= float(CholeskyNorm()(weight)) <= 1.01
        True
    """

    num_steps: int = 24
    slack: float = 0.005

    def __post_init__(self) -> None:
        if not isinstance(self.num_steps, int) or not 1 <= self.num_steps <= 1000:
            raise ValueError(f"num_steps must be between 1 and 1000, got {self.num_steps}")
        if not 0 < self.slack <= 1:
            raise ValueError(f"slack must be positive and at most 1, got {self.slack}")

    def of_stack(self, weights: Tensor, states: Sequence[State]) -> tuple[Tensor, Tensor]:
        """Return the norms (K,) and gradients of weights (K, out, in); in turn on a CPU."""
        if weights.device.type == "cpu":
            return super().of_stack(weights, states)
        return self.value_and_gradient(weights, {})

    @in_full_products()
    def value_and_gradient(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return the bounds of the norms and u v^T value / t."""
        value, gradient, is_proved = self._proved(weight)
        if weight.device.type == "cpu" and not is_traced() and bool(is_proved.all()):
            return value, gradient
        instead, its_gradient = SchattenNorm().value_and_gradient(weight, state)
        gradient = torch.where(is_proved[..., None, None], gradient, its_gradient)
        return torch.where(is_proved, value, instead), gradient

    def _proved(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the values, their gradients, and for which of them there is a proof."""
        tall = tall_side(weight).to(self._dtype(weight))
        largest = _largest(tall)
        unit = tall / largest
        gram = _summed_gram_matrix(unit)
        right = top_vector(gram, self.num_steps)
        left = unit @ right
        reached = torch.linalg.vector_norm(left, dim=(-2, -1), keepdim=True)
        square = (reached * (1 + self.slack)).square()
        error = _relative_error_of_gram(tall.shape) * _trace(gram)
        shifted = gram.neg_()
        pivots = shifted.diagonal(dim1=-2, dim2=-1).add_(square[..., 0])
        info = torch.linalg.cholesky_ex(shifted).info
        error = error + _relative_error_of_cholesky(tall.shape[-1]) * pivots.amax(-1).double()
        bound = (square[..., 0, 0].double() + error).sqrt() * (1 + 16 * _UNIT_ROUNDOFFS[_DOUBLE])
        factor = bound / reached[..., 0, 0].double().square().clamp_min(_TINY)
        gradient = (left * factor.to(left.dtype)[..., None, None]) * right.mT
        value = bound * largest[..., 0, 0].double()
        return value, undo_tall_side(gradient, weight), (info == 0) & value.isfinite()

    def _dtype(self, weight: Tensor) -> torch.dtype:
        is_single = weight.dtype == torch.float32 and not torch.compiler.is_compiling()
        return _shortest(min(weight.shape[-2:])) if is_single else _DOUBLE


_DOUBLE = torch.float64


def _shortest(size: int) -> torch.dtype:
    """Return the dtype for float32 weights; allowed for in float64 too, for one value of both."""
    return torch.float32 if size <= _LARGEST_IN_SINGLE else _DOUBLE


def _relative_error_of_gram(shape: Sequence[int]) -> float:
    r"""Return what \|G - W^T W\| is at most, relative to tr G, for W of shape (*, m, n)."""
    rows, columns = shape[-2:]
    roundings = min(rows, _TERMS) + -(-rows // _TERMS) + 4
    share = roundings * _UNIT_ROUNDOFFS[_shortest(columns)]
    return share / (1 - 2 * share)


def _relative_error_of_cholesky(size: int) -> float:
    r"""Return what \|R^T R - A\| is at most, relative to the largest diagonal entry of A."""
    unit = _UNIT_ROUNDOFFS[_shortest(size)]
    norm_of_minima = 1 / (4 * math.sin(math.pi / (4 * size + 2)) ** 2)
    return unit * (norm_of_minima + size + 3) / (1 - 2 * (size + 1) * unit)


def _largest(matrix: Tensor) -> Tensor:
    """Return the largest absolute value of an entry, to divide by, shape (*, 1, 1)."""
    above, below = (each((-2, -1), keepdim=True) for each in (matrix.amax, matrix.amin))
    return torch.maximum(above, -below).clamp_min(torch.finfo(matrix.dtype).tiny)


def _summed_gram_matrix(matrix: Tensor) -> Tensor:
    """Return X^T X, with no sum longer than 512 terms."""
    first, *others = matrix.split(_TERMS, dim=-2)
    gram = gram_matrix(first)
    for part in others:
        gram = gram.add_(gram_matrix(part))
    return gram


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=_DOUBLE)


def top_vector(gram: Tensor, num_steps: int) -> Tensor:
    r"""Return unit vectors v with v^T G v nearly as large as the largest eigenvalue of G.

    The Ritz vector of `num_steps` Lanczos steps, from a fixed start. The basis is orthonormal until
    the Krylov space is exhausted; what it is then does no harm, because the Ritz vector is that of
    the pencil (Q G Q^T, Q Q^T). It is a column of a high power of that small matrix: no
    eigendecomposition, which a GPU would wait for. Nothing is guaranteed.

    Args:
        gram: positive semidefinite matrices G, shape (*, n, n).
        num_steps: dimension of the Krylov space; for n up to it, G itself is the small matrix.

    Returns:
        Shape (*, n, 1).
    """
    basis = _krylov_basis(gram, num_steps)
    images, basis = (basis @ gram).double(), basis.double()
    overlaps = basis @ basis.mT
    overlaps.diagonal(dim1=-2, dim2=-1).add_(64 * torch.finfo(gram.dtype).eps)
    factor = torch.linalg.cholesky_ex(overlaps).L
    power = torch.linalg.solve_triangular(factor, images @ basis.mT, upper=False)
    power = torch.linalg.solve_triangular(factor.mT, power, upper=True, left=False)
    for index in range(_SQUARINGS):
        if index % _SQUARINGS_IN_RANGE == 0:
            power = _divided_by_norm(power)
        power = power @ power
    coordinates = torch.linalg.solve_triangular(factor.mT, power[..., :1], upper=True)
    return _divided_by_norm(basis.mT @ coordinates).to(gram.dtype)


def _krylov_basis(gram: Tensor, num_steps: int) -> Tensor:
    """Return orthonormal q_1, ..., q_k as rows, shape (*, k, n), of the span of the G^j q_1."""
    size = gram.shape[-1]
    if size <= num_steps:
        identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
        return identity.expand(gram.shape)
    basis = gram.new_zeros(*gram.shape[:-2], num_steps, size)
    columns, vector = basis.mT, _start(gram)
    columns[..., :1] = vector
    multiply, add = (torch.mm, torch.addmm) if gram.dim() == 2 else (torch.bmm, torch.baddbmm)
    for index in range(1, num_steps):
        image = multiply(gram, vector)
        image = add(image, columns, multiply(basis, image), alpha=-1)
        vector = _divided_by_norm(image)
        columns[..., index : index + 1] = vector
    return basis


def _start(gram: Tensor) -> Tensor:
    """Return a unit vector without structure, always the same, shape (*, n, 1)."""
    index = torch.arange(1, gram.shape[-1] + 1, dtype=_DOUBLE, device=gram.device)
    vector = _divided_by_norm((index + 0.618 * index.square()).cos()[:, None]).to(gram.dtype)
    return vector.expand(*gram.shape[:-1], 1)


def _divided_by_norm(matrix: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
    return matrix / size.clamp_min(torch.finfo(matrix.dtype).tiny)


NARROWEST = 256
"""Weights with fewer rows or columns are measured by the Schatten norm, unless one says otherwise.
Measured: docs/measurements.md#norms-of-matrices."""


def default_norm(outputs: int, inputs: int) -> MatrixNorm:
    """Return the norm for weights (outputs, inputs) of layers that are not given one."""
    return CholeskyNorm() if min(outputs, inputs) >= NARROWEST else SchattenNorm()
