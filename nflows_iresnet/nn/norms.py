r"""Upper bounds of the operator norm \|W\|_2 = max \|W x\| / \|x\| that can be differentiated.

A network divides its weights by such a norm, so the norm must be an UPPER bound for the weights to
be certified. `SpectralNorm` (the norm itself), `SchattenNorm` and `FrobeniusNorm` are;
`PowerIteration`, the method of the papers, is a lower bound and is named for what it is.

The bounds allow for the rounding of their arithmetic, and square nothing that would over- or
underflow.

A norm is computed without a graph, together with its gradient: `norms_of` makes one node of both.
Derivatives of higher order are those of `OperatorNorm.differentiable`, the slow twin: see
docs/guarantees.md#second-derivatives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nflows_iresnet.linearization import first_derivative_only, is_traced, pulled_back
from nflows_iresnet.precision import full_precision, is_foreign
from nflows_iresnet.tensor_float import Work, in_full_products

State = dict[str, Tensor]
_TINY = torch.finfo(torch.float64).tiny
_LARGE = 2**15
"""Matrices of more elements gain nothing from being handled together, and leave the caches."""

NOT_FINITE = (
    "it has entries that are not finite or overflow when squared; training has diverged: lower the "
    "learning rate or clip gradients"
)


class OperatorNorm(ABC):
    r"""A strategy for the norm \|W\| = max \|W x\| / \|x\| of the linear map of a weight.

    Implementing one: subclass as a frozen dataclass, implement `value_and_gradient` and, for second
    derivatives, its slow twin `differentiable`.

    Attributes:
        is_upper_bound: whether the value is guaranteed to be at least \|W\|.
    """

    is_upper_bound: bool = True

    @abstractmethod
    def value_and_gradient(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return the norm and its gradient, without a graph.

        Args:
            weight: shape (out, in, *kernel), any floating dtype, without a graph.
            state: the buffers made by `initial_state`.

        Returns:
            A float64 scalar, and a gradient of the shape of the weight.
        """

    def differentiable(self, weight: Tensor, state: State) -> Tensor:
        """Return the same value by operations that can be differentiated any number of times.

        Slower, and asked for where a second derivative is taken, and inside `torch.func`. By
        default the value with its gradient, whose derivative raises `SecondDerivativeError`.
        """
        with torch.no_grad():
            value, gradient = self.value_and_gradient(weight.detach(), state)
        paired = (gradient.detach() * weight.double()).sum()
        once = first_derivative_only(
            paired,
            f"{self!r} has no second derivatives: take one that has them, such as SchattenNorm()",
        )
        return value.detach() + (once - once.detach())

    def of_stack(self, weights: Tensor, states: Sequence[State]) -> tuple[Tensor, Tensor]:
        """Return the norms (K,) and gradients of weights (K, out, in, *kernel)."""
        pairs = [self.value_and_gradient(*each) for each in zip(weights, states, strict=True)]
        values, gradients = zip(*pairs, strict=True)
        return torch.stack(values), torch.stack(gradients)

    def __call__(self, weight: Tensor, state: State | None = None) -> Tensor:
        """Return the norm of a weight as a float64 scalar, differentiable in it."""
        return norms_of([weight[None]], [self], [[state or {}]])[0, 0]

    def initial_state(self, weight: Tensor) -> State:
        """Return the buffers that the strategy keeps for one weight; none by default."""
        return {}

    def advance(self, weight: Tensor, state: State) -> None:  # noqa: B027
        """Improve the buffers of one weight in place; does nothing by default."""


class MatrixNorm(OperatorNorm):
    r"""A strategy for \|W\|_2 of matrices, shape (*, out, in): many at once for the price of one.

    Implementing one: `value_and_gradient` takes stacks of weights, and of buffers alike.
    """

    def of_stack(self, weights: Tensor, states: Sequence[State]) -> tuple[Tensor, Tensor]:
        """Return the norms (K,) and gradients of weights (K, out, in); large ones in turn."""
        if weights[0].numel() > _LARGE:
            return super().of_stack(weights, states)
        state = {name: torch.stack([each[name] for each in states]) for name in states[0]}
        return self.value_and_gradient(weights, state)


def norms_of(
    stacks: Sequence[Tensor], norms: Sequence[OperatorNorm], states: Sequence[Sequence[State]]
) -> Tensor:
    """Return the norms of several stacks of weights in float64, differentiable in them.

    Stacks of matrices of one size, or of its transpose, are taken together.

    Args:
        stacks: P stacks of K weights, shapes (K, out, in, *kernel).
        norms: the strategy of each stack.
        states: the buffers of each weight of each stack.

    Returns:
        Shape (P, K).
    """
    work: Work = "anything" if any(map(is_foreign, norms)) else "matrices"
    with full_precision(stacks[0].device, work):
        if torch.compiler.is_compiling():
            return _linear_in_weights(stacks, *_values_and_gradients(stacks, norms, states))
        if is_traced():
            return _differentiable(stacks, norms, states)
        values: Tensor = _Norms.apply(norms, states, *stacks)
        return values


def _differentiable(
    stacks: Sequence[Tensor], norms: Sequence[OperatorNorm], states: Sequence[Sequence[State]]
) -> Tensor:
    rows = [
        torch.stack([norm.differentiable(*each) for each in zip(stack, state, strict=True)])
        for stack, norm, state in zip(stacks, norms, states, strict=True)
    ]
    return torch.stack(rows)


def _linear_in_weights(
    stacks: Sequence[Tensor], values: Tensor, gradients: Sequence[Tensor]
) -> Tensor:
    r"""Return values with the given gradients as derivative, for compilers: first order only.

    Norms are homogeneous of degree one, \|W\| = <grad \|W\|, W> by Euler's theorem, so that the
    product has the value of the norm, and with the gradient held constant its derivative.
    """
    products = [
        (gradient.detach() * stack.double()).flatten(start_dim=1).sum(1)
        for gradient, stack in zip(gradients, stacks, strict=True)
    ]
    paired = torch.stack(products)
    return values.detach() + (paired - paired.detach())


class _Norms(torch.autograd.Function):
    """Norms and their gradients as one node; its backward, where recorded, is the slow twin's."""

    @staticmethod
    def forward(
        ctx: Any,
        norms: Sequence[OperatorNorm],
        states: Sequence[Sequence[State]],
        *stacks: Tensor,
    ) -> Tensor:
        values, gradients = _values_and_gradients(stacks, norms, states)
        ctx.norms, ctx.num_stacks = norms, len(stacks)
        ctx.states = [[{k: v.clone() for k, v in each.items()} for each in row] for row in states]
        ctx.save_for_backward(*stacks, *gradients)
        return values

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        stacks, gradients = saved[: ctx.num_stacks], saved[ctx.num_stacks :]
        if torch.is_grad_enabled():

            def again(*stacks: Tensor) -> Tensor:
                return _differentiable(stacks, ctx.norms, ctx.states)

            return None, None, *pulled_back(again, cotangent, stacks)
        return (
            None,
            None,
            *[
                (gradient * _column(rate, gradient)).to(stack.dtype)
                for gradient, rate, stack in zip(gradients, cotangent, stacks, strict=True)
            ],
        )


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Return values (K,) as (K, 1, ...), to multiply rows of another tensor."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


@torch.no_grad()
def _values_and_gradients(
    stacks: Sequence[Tensor], norms: Sequence[OperatorNorm], states: Sequence[Sequence[State]]
) -> tuple[Tensor, list[Tensor]]:
    """Return the norms (P, K) and their gradients; stacks of one size are taken together."""
    groups: dict[object, list[int]] = {}
    for index, (stack, norm, state) in enumerate(zip(stacks, norms, states, strict=True)):
        is_plain_matrix = stack.dim() == 3 and not state[0]
        size = tuple(sorted(stack.shape[1:])) if is_plain_matrix else ("stack", index)
        groups.setdefault((norm, size), []).append(index)
    values: list[Tensor] = list(stacks)
    gradients: list[Tensor] = list(stacks)
    for indices in groups.values():
        turned = [stacks[i].shape != stacks[indices[0]].shape for i in indices]
        alike = [
            stacks[i].mT if turn else stacks[i] for i, turn in zip(indices, turned, strict=True)
        ]
        together = alike[0] if len(alike) == 1 else torch.cat(alike)
        of_all, gradient = norms[indices[0]].of_stack(
            together, [s for i in indices for s in states[i]]
        )
        count = stacks[0].shape[0]
        parts = zip(indices, of_all.split(count), gradient.split(count), turned, strict=True)
        for i, value, part, turn in parts:
            values[i], gradients[i] = value, part.mT if turn else part
    return torch.stack(values), gradients


def _rounding_allowance(weight: Tensor) -> float:
    """Relative error allowed for a float64 norm: twice what `spectral_norm_bound` adds."""
    return 1 + 64 * max(weight.shape[-2:]) * torch.finfo(torch.float64).eps


def tall_side(weight: Tensor) -> Tensor:
    """Return the weights or their transposes: at least as many rows as columns."""
    return weight if weight.shape[-2] >= weight.shape[-1] else weight.mT


def undo_tall_side(tall: Tensor, weight: Tensor) -> Tensor:
    """Undo `tall_side`."""
    return tall if weight.shape[-2] >= weight.shape[-1] else tall.mT


def eigenvectors(gram: Tensor) -> Tensor:
    """Return the eigenvectors of symmetric or Hermitian matrices, by ascending eigenvalues."""
    try:
        return torch.linalg.eigh(gram).eigenvectors
    except RuntimeError as error:
        raise ValueError(
            f"the norm of a weight of size {gram.shape[-1]} cannot be computed: {NOT_FINITE}"
        ) from error


@dataclass(frozen=True)
class SpectralNorm(MatrixNorm):
    r"""\|W\|_2 itself, from the eigenvalues of the smaller Gram matrix. The tightest bound.

    With u the top eigenvector of W W^T and v = W^T u / \|W^T u\|, the gradient is u v^T.

    Cost: one symmetric eigendecomposition of size min(out, in).
    """

    def differentiable(self, weight: Tensor, state: State) -> Tensor:
        """Return the same norm by a singular value decomposition."""
        return torch.linalg.matrix_norm(weight.double(), ord=2) * _rounding_allowance(weight)

    def value_and_gradient(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return the largest singular values and u v^T."""
        tall, largest = _squarable(tall_side(weight))
        right = eigenvectors(tall.mT @ tall)[..., -1:]
        left = tall @ right
        value = torch.linalg.matrix_norm(left, keepdim=True)
        outer = left / value.clamp_min(_TINY) @ right.mT
        value = value * _rounding_allowance(weight) * largest
        return value[..., 0, 0], undo_tall_side(outer, weight)


@dataclass(frozen=True)
class FrobeniusNorm(MatrixNorm):
    r"""\|W\|_F = sqrt(sum W_ij^2) >= \|W\|_2. The cheapest bound, up to sqrt(rank) too large."""

    def differentiable(self, weight: Tensor, state: State) -> Tensor:
        """Return the same norm."""
        _, largest = _squarable(weight.detach())
        value = torch.linalg.matrix_norm(weight.double() / largest, keepdim=True)
        return (value * _rounding_allowance(weight) * largest)[..., 0, 0]

    def value_and_gradient(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return the Frobenius norms and W divided by them."""
        unit, largest = _squarable(weight)
        value = torch.linalg.matrix_norm(unit, keepdim=True)
        unit = unit / value.clamp_min(_TINY)
        return (value * _rounding_allowance(weight) * largest)[..., 0, 0], unit


@dataclass(frozen=True)
class PowerIteration(MatrixNorm):
    r"""u^T W v after power iteration, as in the papers: a LOWER bound, so nothing is guaranteed.

    v <- W^T u / \|W^T u\|, u <- W v / \|W v\|. The vectors are kept as buffers, start from
    equal entries and are improved in each training step. A network normalised with it may exceed
    its coefficient; `lipschitz_bound`, which never relies on this estimate, reports by how much.

    Cost: two matrix-vector products per step.

    References:
        Miyato, Kataoka, Koyama, Yoshida. Spectral normalization for generative adversarial
        networks, 2018. Behrmann et al. Invertible residual networks, 2019.

    Args:
        num_steps: iterations per training step.
        num_initial_steps: iterations when the buffers are made.
    """

    num_steps: int = 1
    num_initial_steps: int = 50
    is_upper_bound = False

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_initial_steps < 0:
            raise ValueError(
                f"num_steps must be at least 1 and num_initial_steps at least 0, got "
                f"{self.num_steps} and {self.num_initial_steps}"
            )

    def initial_state(self, weight: Tensor) -> State:
        """Return u and v, started from equal entries, of norm 1."""
        rows, columns = weight.shape
        state = {
            "u": weight.detach().new_full((rows,), rows**-0.5),
            "v": weight.detach().new_full((columns,), columns**-0.5),
        }
        self._iterate(weight, state, self.num_initial_steps)
        return state

    def advance(self, weight: Tensor, state: State) -> None:
        """Improve u and v in place by `num_steps` iterations."""
        self._iterate(weight, state, self.num_steps)

    @in_full_products()
    @torch.no_grad()
    def _iterate(self, weight: Tensor, state: State, steps: int) -> None:
        for _ in range(steps):
            state["v"].copy_(torch.nn.functional.normalize(weight.mT @ state["u"], dim=0))
            state["u"].copy_(torch.nn.functional.normalize(weight @ state["v"], dim=0))

    def differentiable(self, weight: Tensor, state: State) -> Tensor:
        """Return u^T W v, linear in W."""
        return state["u"].double() @ weight.double() @ state["v"].double()

    def value_and_gradient(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return u^T W v and u v^T."""
        left, right = state["u"].double(), state["v"].double()
        outer = left[..., :, None] * right[..., None, :]
        return (outer * weight.double()).sum((-2, -1)), outer


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
    n = 512 in float32. It needs e (4 + sqrt(n)) <= 1, true for n < 10^6 in float64 and for all n
    that float32 is used for. Proof: docs/guarantees.md#rounding-of-the-schatten-norm.

    References:
        Delattre, Barthelemy, Araujo, Allauzen. Efficient bound of Lipschitz constant for
        convolutional layers by Gram iteration, 2023 (the iteration; the gradient here is exact).

    Args:
        num_squarings: s.
    """

    num_squarings: int = 7

    def __post_init__(self) -> None:
        if not isinstance(self.num_squarings, int) or not 0 <= self.num_squarings <= 20:
            raise ValueError(f"num_squarings must be between 0 and 20, got {self.num_squarings}")

    @in_full_products()
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

    def differentiable(self, weight: Tensor, state: State) -> Tensor:
        """Return the same norm in float64; rescaling is by constants, which cancel."""
        tall = tall_side(weight.double())
        largest = tall.detach().abs().amax().clamp_min(_TINY)
        unit = tall / largest
        gram = unit.mT @ unit
        size = _frobenius(gram.detach())
        power, log_scale = gram / size, torch.zeros((), dtype=gram.dtype, device=gram.device)
        for remaining in reversed(range(self.num_squarings - 1)):
            power = power @ power
            scale = _frobenius(power.detach())
            power = power / scale
            log_scale = log_scale + 2.0**remaining * scale.log()
        root = (unit / size.sqrt()) @ power if self.num_squarings > 0 else power
        log_norm = torch.linalg.matrix_norm(root).clamp_min(_TINY).log() + log_scale.sum()
        norm = (log_norm * (2 / self._order)).exp() * self._allowance(weight)
        return norm * size.sqrt().sum() * largest

    @property
    def _order(self) -> int:
        return 2 ** (self.num_squarings + 1) + 2

    def _dtype(self, weight: Tensor) -> torch.dtype:
        is_single = weight.dtype == torch.float32 and not torch.compiler.is_compiling()
        return self._shortest(min(weight.shape[-2:]))[0] if is_single else torch.float64

    def _allowance(self, weight: Tensor) -> float:
        """Return the allowance of the docstring, the same for a float32 model and its double."""
        rows, columns = max(weight.shape[-2:]), min(weight.shape[-2:])
        of_gram = _UNIT_ROUNDOFFS[torch.float64] * rows * (2 * columns + 128)
        return 1 + self._shortest(columns)[1] + of_gram

    def _shortest(self, size: int) -> tuple[torch.dtype, float]:
        """Return the dtype of the products for float32 weights, and what their rounding adds."""
        share = 0.6 + 4 * (self.num_squarings + 1) / self._order
        error = (size + 3) * (1 + size**0.5 / 2) ** 2 * share
        in_single = _UNIT_ROUNDOFFS[torch.float32] * error
        if size > 16 and self.num_squarings > 0 and in_single <= _MAX_ALLOWANCE:
            return torch.float32, in_single
        return torch.float64, _UNIT_ROUNDOFFS[torch.float64] * error

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
