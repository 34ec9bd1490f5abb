"""The Schatten norm of a matrix, from matrix products alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_iresnet.linearization import is_traced
from nflows_iresnet.nn.norms import MatrixNorm, State, tall_side, undo_tall_side

_MAX_ALLOWANCE = 0.005
"""What float32 may add to a norm; above, the products are float64."""

_UNIT_ROUNDOFFS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}

_SQUARINGS_IN_RANGE = {torch.float32: 3, torch.float64: 6}
"""Squarings of a matrix of Frobenius norm 1 before it is rescaled. Its largest eigenvalue is then
at least n^{-4} in float32 and n^{-32} in float64: nothing that matters is lost to underflow, and
nothing is subnormal, which would be slow."""


@dataclass(frozen=True)
class SchattenNorm(MatrixNorm):
    r"""The Schatten norm \|W\|_p = (sum_i sigma_i^p)^{1/p} >= \|W\|_2, from matrix products alone.

    With G = W^T W, p = 2^{s+1} + 2 and P = G^{2^{s-1}} from s - 1 squarings, \|W\|_p^p =
    \|W P\|_F^2, and the gradient is (W P) P / \|W\|_p^{p-1}. Smooth where singular values cross,
    no decomposition, no wait for a GPU. At most n^{1/p} above \|W\|_2, n = min(out, in): 1.6 % for
    64 equal singular values at s = 7, and usually far less. (s = 0 takes \|G\|_F and W G.)

    Cost: s + 2 products of size n, without a graph; G in float64, the others in float32 for float32
    weights as long as that adds at most 0.5 % (n <= 608 at s = 7), otherwise in float64.

    **Rounding.** The value is multiplied by 1 + e (0.6 + 4 (s + 1) / p) + v m (2 n + 128), which
    makes it an upper bound of \|W\|_2: with e = u (n + 3) (1 + sqrt(n) / 2)^2, m = max(out, in),
    u the unit roundoff of the products and v that of float64; 0.09 % for n = 256, 0.34 % for
    n = 512 in float32. The proof needs e (4 + sqrt(n)) <= 1, true for n < 10^6 in float64 and for
    all n that float32 is used for:

    Let |A| have the absolute values of the entries of A, norms be 2-norms, l = \|G\|. *A positive
    semidefinite Q has \| |Q| \| <= h \|Q\|, h = (1 + sqrt(n)) / 2*: for \|Q\| = 1 it is
    |Q| <= (I + |2 Q - I|) / 2, and \|2 Q - I\| <= 1 has a Frobenius norm of at most sqrt(n).

    The computed matrices are P_0 = G + E_0 and P_j = Q_j + E_j, Q_j = P_{j-1}^T P_{j-1}, up to
    factors that are recorded (e stands for the larger of e and e_0 below); let q_j = \|Q_j\|, q_0 =
    l. A product of n terms and a rescaling give |E_j| <= (n + 3) u |P_{j-1}|^T |P_{j-1}|. If \|
    |E_{j-1}| \| <= e q_{j-1}, then \| |P_{j-1}| \| <= (h + e) q_{j-1} and q_j = \|P_{j-1}\|^2 >= (1
    - e)^2 q_{j-1}^2, so \| |E_j| \| <= e q_j, as e (4 + sqrt(n)) <= 1 says that (h + e) / (1 - e)
    <= 1 + sqrt(n) / 2. Hence, with e_0 = v (m + 3) n + u h for the float64 product G and its
    rounding, q_{s-1} is at least l^{2^{s-1}} (1 - e_0)^{2^{s-1}} (1 - e)^{2^{s-1} - 2} (the last
    factor for s > 1), and \|P\| >= (1 - e) q_{s-1} for P = P_{s-1}.

    Let y and z be the top singular vectors, P z = \|P\| y. From (y^T Q z)^2 <= y^T Q y z^T Q z
    follows \|P_{s-2} y\| >= (1 - 2 e) \|P_{s-2}\|; and y^T Q y >= \|Q y\|^2 / \|Q\| gives
    \|P_{j-1} y\| >= (1 - a - 2 e) \|P_{j-1}\| from \|P_j y\| >= (1 - a) \|P_j\|. Down to G this is
    \|W y\|^2 >= l (1 - 2 s e)^2, so \|W P z\| >= \|P\| sqrt(l) (1 - 2 s e). The product W P loses
    at most 2 e more, as \| |W| \| <= sqrt(n l). Altogether the p-th root of \|W P\|_F^2 loses at
    most e_0 / 2 + e / 2 + 4 (s + 1) e / p to first order; e / 10 and the multiples of v hold what
    is of second order, the rounding of sums of squares, and logarithms.

    Args:
        num_squarings: s.

    References:
        Delattre, Barthelemy, Araujo, Allauzen. Efficient bound of Lipschitz constant for
        convolutional layers by Gram iteration, 2023 (the iteration; the gradient here is exact).
    """

    num_squarings: int = 7

    def __post_init__(self) -> None:
        if not 0 <= self.num_squarings <= 20:
            raise ValueError(f"num_squarings must be between 0 and 20, got {self.num_squarings}")

    def value_and_gradient(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return the Schatten norms of order 2^{s+1} + 2 and their gradients."""
        double, largest = _squarable(tall_side(weight))
        gram = gram_matrix(double)
        size = _frobenius(gram)
        scale, dtype = size.sqrt(), self._dtype(weight)
        unit = double.mul_(scale.reciprocal()).to(dtype)
        power, log_scale = self._power(gram.mul_(size.reciprocal()).to(dtype))
        root = _product(unit, power) if self.num_squarings > 0 else power
        root_norm = _exact_frobenius(root)
        norm = ((root_norm.log() + log_scale) * (2 / self._order)).exp() * self._allowance(weight)
        factor = norm / root_norm.square().clamp_min(torch.finfo(torch.float64).tiny)
        left = root if self.num_squarings > 0 else unit
        gradient = _product(left, power * factor.to(dtype))
        return (norm * scale * largest)[..., 0, 0], undo_tall_side(gradient, weight)

    @property
    def _order(self) -> int:
        return 2 ** (self.num_squarings + 1) + 2

    def _dtype(self, weight: Tensor) -> torch.dtype:
        is_single = weight.dtype == torch.float32 and _products_are_single()
        return self._shortest(weight) if is_single else torch.float64

    def _shortest(self, weight: Tensor) -> torch.dtype:
        """Return the dtype of the products for float32 weights, by the shape alone."""
        size = min(weight.shape[-2:])
        is_worth_it = size > 16 and self.num_squarings > 0
        is_fine = self._excess(size, torch.float32) <= _MAX_ALLOWANCE
        return torch.float32 if is_worth_it and is_fine else torch.float64

    def _excess(self, size: int, dtype: torch.dtype) -> float:
        error = _UNIT_ROUNDOFFS[dtype] * (size + 3) * (1 + size**0.5 / 2) ** 2
        return error * (0.6 + 4 * (self.num_squarings + 1) / self._order)

    def _allowance(self, weight: Tensor) -> float:
        """Return the allowance of the docstring, the same for a float32 model and its double."""
        rows, columns = max(weight.shape[-2:]), min(weight.shape[-2:])
        of_gram = _UNIT_ROUNDOFFS[torch.float64] * rows * (2 * columns + 128)
        return 1 + self._excess(columns, self._shortest(weight)) + of_gram

    def _power(self, power: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return P^{2^{s-1}} divided by a scale, and the logarithm of that scale."""
        num_products, period = self.num_squarings - 1, _SQUARINGS_IN_RANGE[power.dtype]
        log_scale: Tensor | float = 0.0
        spare = None
        for index in range(1, num_products + 1):
            power, spare = gram_matrix(power, out=spare), None if is_traced() else power
            if index % period == 0 and index < num_products:
                size = _frobenius(power)
                power = power.mul_(size.reciprocal())
                log_scale = log_scale + 2.0 ** (num_products - index) * size.double().log()
        return power, log_scale


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left @ right, past the preparations of `matmul` where it is a stack."""
    multiply = torch.bmm if left.dim() == 3 else torch.matmul
    return multiply(left, right, out=out)


def gram_matrix(matrix: Tensor, out: Tensor | None = None) -> Tensor:
    r"""Return X^T X, shape (*, n, n), for X of shape (*, m, n).

    What lies below the diagonal blocks of large ones is copied from above: 5/8 of the products.

    Args:
        matrix: X.
        out: memory to write the result to, if there is some to spare.
    """
    size = matrix.shape[-1]
    if size <= 256 or matrix.device.type != "cpu" or is_traced():
        return _product(matrix.mT, matrix, out)
    gram = matrix.new_empty(*matrix.shape[:-2], size, size) if out is None else out
    step = -(-size // 4)
    for start in range(0, size, step):
        stop = start + step
        rows = _product(matrix[..., start:stop].mT, matrix[..., start:])
        gram[..., start:stop, start:] = rows
        gram[..., stop:, start:stop] = rows[..., step:].mT
    return gram


def _squarable(weight: Tensor) -> tuple[Tensor, Tensor | float]:
    """Return a copy with squares in the range of float64, and what it was divided by."""
    if weight.dtype != torch.float64:
        return weight.double(), 1.0
    largest = weight.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return weight / largest, largest


def _frobenius(matrix: Tensor) -> Tensor:
    """Return Frobenius norms to divide by, shape (*, 1, 1)."""
    size = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
    return size.clamp_min(torch.finfo(matrix.dtype).tiny)


def _exact_frobenius(matrix: Tensor) -> Tensor:
    """Return Frobenius norms in float64, with no sum in short precision longer than a row."""
    rows = torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(rows, dim=-2, keepdim=True, dtype=torch.float64)


def _products_are_single() -> bool:
    """Whether float32 products are known to be just that, not TensorFloat-32 or bfloat16.

    torch raises where the precision was set per backend.
    """
    if torch.compiler.is_compiling():
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        return False
