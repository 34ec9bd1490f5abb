"""The interface of all log-determinant estimators, and the estimator that needs no estimate."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nflows_iresnet.constants import made_once
from nflows_iresnet.linearization import Linearization, ResidualFunction, bind, is_traced
from nflows_iresnet.precision import (
    at_least_single,
    context_like_weights,
    is_inside_autocast,
    like_weights,
    precision_of_here,
)
from nflows_iresnet.validation import validated_size


class LogDetEstimate(NamedTuple):
    """What an estimator knows after one call.

    Attributes:
        outputs: g(x), shape (B, *).
        logabsdet: (an estimate of) log|det(I + J)|, shape (B,).
        standard_error: of `logabsdet`, shape (B,): zero where it is exact, None where one probe
            was used, from which no error can be told.
    """

    outputs: Tensor
    logabsdet: Tensor
    standard_error: Tensor | None


class LogDetEstimator(ABC):  # noqa: B024
    r"""A strategy that returns g(x) together with log\|det(I + J)\|, J = dg/dx.

    Implementing one: subclass as a frozen dataclass, implement `logabsdet`. The value must be (an
    estimate of) the log-determinant itself, and its derivative must be right for any upstream
    gradient: return `value.detach() + surrogate - surrogate.detach()`, where the derivative of
    `surrogate` is (in expectation) the one of the log-determinant. `testing.check_transform`
    checks both.
    """

    def logabsdet(
        self,
        at_inputs: Linearization,
        lipschitz: float | None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the log-determinant and its standard error, shapes (B,).

        Args:
            at_inputs: g at x as a linear operator.
            lipschitz: the guaranteed bound of Lip(g), None where there is none.
            generator: source of randomness; torch's default generator if None.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement logabsdet(at_inputs, lipschitz, generator)"
        )

    def estimate(
        self,
        net: Callable[..., Tensor],
        inputs: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> LogDetEstimate:
        """Return value, log-determinant and its standard error.

        Args:
            net: g, see `linearization.bind`.
            inputs: x, shape (B, *).
            context: shape (B, C), or None.
            generator: source of randomness; torch's default generator if None.

        Raises:
            ValueError: if the values of the network have another shape than its inputs.
        """
        inputs, context = _like(net, inputs, context)
        with precision_of_here(inputs.device):
            return self._estimate(bind(net, context), inputs, generator)

    def _estimate(
        self, function: ResidualFunction, inputs: Tensor, generator: torch.Generator | None
    ) -> LogDetEstimate:
        """Return what `estimate` does, of g that is bound, and in the precision that holds here."""
        at_inputs = function.linearize(inputs)
        if at_inputs.shape != inputs.shape:
            raise ValueError(
                f"the network maps shape {tuple(inputs.shape)} to {tuple(at_inputs.shape)}; "
                "a residual block needs a network that keeps the shape of its inputs"
            )
        logabsdet, error = self.logabsdet(at_inputs, function.lipschitz, generator)
        return LogDetEstimate(at_inputs.value, logabsdet, error)

    def __call__(
        self, net: Callable[..., Tensor], inputs: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (g(x), log|det(I + J)|), shapes (B, *) and (B,)."""
        estimate = self.estimate(net, inputs, context)
        return estimate.outputs, estimate.logabsdet


def _like(
    net: Callable[..., Tensor], inputs: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return inputs and context in the precision of a network, where autocast has shortened them.

    A function that is no module has weights that nobody knows: it gets single precision.
    """
    if not is_inside_autocast(inputs.device):
        return inputs, context
    if isinstance(net, nn.Module):
        return like_weights(inputs, net), context_like_weights(context, net)
    return at_least_single(inputs), None if context is None else at_least_single(context)


_DENSE_ELEMENTS = 2**24
"""Rows are taken in chunks of at most this many Jacobian elements (128 MiB in float64)."""


@dataclass(frozen=True)
class Exact(LogDetEstimator):
    r"""The exact log\|det(I + J)\| from the full Jacobian. No error but rounding.

    In closed form for at most three dimensions, else by an LU factorisation. The derivative is
    automatic: d log det(I + J) = tr((I + J)^{-1} dJ).

    Cost: the Jacobian (for our networks one matrix product per layer and dimension, otherwise D
    vjps) and O(D^3) per row. Memory O(B D (D + hidden)), or that of one chunk without gradients.

    Args:
        chunk_size: number of rows handled at a time; by default as many as keep the Jacobians
            under 2^24 elements. Splitting bounds the memory only where no gradient is recorded.

    Example:
        >>> import torch
        >>> _, logabsdet = Exact()(lambda x: 0.5 * x, torch.zeros(1, 2))
        >>> torch.allclose(logabsdet, torch.tensor(2 * 1.5).log() * 0 + 2 * torch.tensor(1.5).log())
        True
    """

    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            validated_size("chunk_size", self.chunk_size)

    def _estimate(
        self, function: ResidualFunction, inputs: Tensor, generator: torch.Generator | None
    ) -> LogDetEstimate:
        estimate, chunks = super()._estimate, self._chunks(inputs)
        if len(chunks) == 1:
            return estimate(function, inputs, generator)
        parts = [estimate(function.select(chunk), inputs[chunk], generator) for chunk in chunks]
        outputs, logabsdet, errors = zip(*parts, strict=True)
        return LogDetEstimate(torch.cat(outputs), torch.cat(logabsdet), torch.cat(errors))

    def logabsdet(
        self,
        at_inputs: Linearization,
        lipschitz: float | None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the exact value and zeros."""
        jacobian = at_inputs.jacobian()
        logabsdet = log_abs_det(jacobian + _identity_like(jacobian))
        return logabsdet, torch.zeros_like(logabsdet)

    def _chunks(self, inputs: Tensor) -> list[slice]:
        elements = max(1, inputs.shape[1:].numel()) ** 2
        size = self.chunk_size or max(1, _DENSE_ELEMENTS // elements)
        if is_traced():
            return [slice(None)]
        return [slice(start, start + size) for start in range(0, max(1, len(inputs)), size)]


def _identity_like(matrices: Tensor) -> Tensor:
    """Return the identity of the size of matrices (*, D, D), made once where they are plain."""
    return _constant(torch.eye, matrices)


def _signs_like(matrices: Tensor) -> Tensor:
    """Return 1 on the diagonal and -1 beside it, of the size of matrices (*, D, D)."""
    return _constant(_signs, matrices)


def _signs(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    return 2 * torch.eye(size, dtype=dtype, device=device) - 1


def _constant(make: Callable[..., Tensor], matrices: Tensor) -> Tensor:
    size, dtype, device = matrices.shape[-1], matrices.dtype, matrices.device
    if type(matrices) is Tensor and not matrices.is_meta and not is_traced():
        return _made_once(make, size, dtype, device)
    return make(size, dtype=dtype, device=device)


@made_once(16)
def _made_once(
    make: Callable[..., Tensor], size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return make(size, dtype=dtype, device=device)


def log_abs_det(matrix: Tensor) -> Tensor:
    r"""Return log\|det A\| of matrices A of shape (*, D, D): closed form for D <= 3, else by LU."""
    if matrix.dtype in (torch.float16, torch.bfloat16):
        return log_abs_det(matrix.float()).to(matrix.dtype)
    if matrix.shape[-1] > 3:
        return torch.linalg.slogdet(matrix).logabsdet
    if matrix.shape[-1] == 2 and not is_traced():
        return _LogAbsDet2.apply(matrix)
    return _small_determinant(matrix).abs().log()


class _LogAbsDet2(torch.autograd.Function):
    """log|ad - bc| of 2 x 2 matrices, whose derivative is ((d, -c), (-b, a)) / (ad - bc)."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        determinant = _small_determinant(matrix)
        ctx.save_for_backward(matrix, determinant)
        return determinant.abs().log()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        matrix, determinant = ctx.saved_tensors
        if torch.is_grad_enabled():
            determinant = _small_determinant(matrix)
        rate = (cotangent / determinant)[..., None, None]
        return matrix.flip(-2, -1) * (rate * _signs_like(matrix))


def _small_determinant(matrix: Tensor) -> Tensor:
    """Expand the determinant of (*, D, D) matrices, D <= 3, along the first row."""
    dimension = matrix.shape[-1]
    if dimension == 1:
        return matrix[..., 0, 0]
    if dimension == 2:
        (a, b), (c, d) = [row.unbind(-1) for row in matrix.unbind(-2)]
        return torch.addcmul(a * d, b, c, value=-1)
    first, second, third = matrix.unbind(-2)
    return (first * torch.linalg.cross(second, third, dim=-1)).sum(-1)
