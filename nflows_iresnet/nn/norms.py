r"""Upper bounds of the operator norm \|W\|_2 = max \|W x\| / \|x\| that can be differentiated.

A network divides its weights by such a norm, so the norm must be an UPPER bound for the weights to
be certified. `SpectralNorm` (the norm itself), `SchattenNorm` and `FrobeniusNorm` are;
`PowerIteration`, the method of the papers, is a lower bound and is named for what it is.

All allow for the rounding of their arithmetic, and none over- or underflows for float32 weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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

    def of_stack(self, weights: Tensor, states: Sequence[State]) -> tuple[Tensor, Tensor]:
        """Return the norms (K,) and gradients of weights (K, out, in, *kernel)."""
        pairs = [self.value_and_gradient(*each) for each in zip(weights, states, strict=True)]
        values, gradients = zip(*pairs, strict=True)
        return torch.stack(values), torch.stack(gradients)

    def __call__(self, weight: Tensor, state: State | None = None) -> Tensor:
        r"""Return the norm of a weight as a float64 scalar, differentiable in it.

        Norms are homogeneous of degree one: \|W\| = <grad \|W\|, W> by Euler's theorem. With the
        gradient held constant the product has the derivative of the norm, and nothing of how the
        gradient was computed needs to be recorded.
        """
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            value, gradient = self.value_and_gradient(weight.detach(), state or {})
        paired = (gradient * weight.double()).sum()
        return value + paired - paired.detach()

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

    def value_and_gradient(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return the largest singular values and u v^T."""
        tall = tall_side(weight.double())
        right = eigenvectors(tall.mT @ tall)[..., -1:]
        left = tall @ right
        value = torch.linalg.matrix_norm(left)
        outer = left / value.clamp_min(_TINY)[..., None, None] @ right.mT
        return value * _rounding_allowance(weight), undo_tall_side(outer, weight)


@dataclass(frozen=True)
class FrobeniusNorm(MatrixNorm):
    r"""\|W\|_F = sqrt(sum W_ij^2) >= \|W\|_2. The cheapest bound, up to sqrt(rank) too large."""

    def value_and_gradient(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return the Frobenius norms and W divided by them."""
        weight = weight.double()
        value = torch.linalg.matrix_norm(weight)
        unit = weight / value.clamp_min(_TINY)[..., None, None]
        return value * _rounding_allowance(weight), unit


@dataclass(frozen=True)
class PowerIteration(MatrixNorm):
    r"""u^T W v after power iteration, as in the papers: a LOWER bound, so nothing is guaranteed.

    v <- W^T u / \|W^T u\|, u <- W v / \|W v\|. The vectors are kept as buffers, start from ones
    and are improved in each training step. A network normalised with it may exceed its coefficient;
    `lipschitz_bound` reports by how much, because it never relies on this estimate.

    Cost: two matrix-vector products per step.

    Args:
        num_steps: iterations per training step.
        num_initial_steps: iterations when the buffers are made.

    References:
        Miyato, Kataoka, Koyama, Yoshida. Spectral normalization for generative adversarial
        networks, 2018. Behrmann et al. Invertible residual networks, 2019.
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
        """Return u and v, started from ones."""
        rows, columns = weight.shape
        state = {"u": weight.new_ones(rows).detach(), "v": weight.new_ones(columns).detach()}
        self._iterate(weight, state, self.num_initial_steps)
        return state

    def advance(self, weight: Tensor, state: State) -> None:
        """Improve u and v in place by `num_steps` iterations."""
        self._iterate(weight, state, self.num_steps)

    @torch.no_grad()
    def _iterate(self, weight: Tensor, state: State, steps: int) -> None:
        for _ in range(steps):
            state["v"].copy_(torch.nn.functional.normalize(weight.mT @ state["u"], dim=0))
            state["u"].copy_(torch.nn.functional.normalize(weight @ state["v"], dim=0))

    def value_and_gradient(self, weight: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return u^T W v and u v^T."""
        left, right = state["u"].double(), state["v"].double()
        outer = left[..., :, None] * right[..., None, :]
        return (outer * weight.double()).sum((-2, -1)), outer
