"""Cholesky norms with one bug each, and the matrix that finds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_iresnet.nn import cholesky_norm
from nflows_iresnet.nn.cholesky_norm import CholeskyNorm

Parts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class IgnoresTheFactorisation(CholeskyNorm):
    """Takes the estimate where the factorisation did not run through."""

    def _proved(self, weight: Tensor) -> Parts:
        value, gradient, is_proved = super()._proved(weight)
        return value, gradient, torch.ones_like(is_proved)


@dataclass(frozen=True)
class ForgetsToRaise(CholeskyNorm):
    """Returns the estimate t, not the z = t (1 + slack) that was proved."""

    def _proved(self, weight: Tensor) -> Parts:
        value, gradient, is_proved = super()._proved(weight)
        return value / (1 + self.slack), gradient, is_proved


@dataclass(frozen=True)
class LooksAtTheFirst(CholeskyNorm):
    """Takes the proof of the first matrix of a stack for all."""

    def _proved(self, weight: Tensor) -> Parts:
        value, gradient, is_proved = super()._proved(weight)
        return value, gradient, is_proved.flatten()[0].expand(is_proved.shape)


def orthogonal_to_the_start(size: int) -> Tensor:
    """Return singular values from 0 to 1, and 1.05 in a direction that Lanczos never sees."""
    start = cholesky_norm._start(torch.eye(size, dtype=torch.float64))
    top = torch.zeros_like(start)
    top[0], top[1] = start[1, 0], -start[0, 0]
    top = top / top.norm()
    below = torch.linspace(0, 1, size, dtype=torch.float64)
    below[:2] = 0
    return below.diag() + 1.05 * top @ top.mT


def dense_below_the_top() -> Tensor:
    """Return a matrix whose norm four steps find to some per cent."""
    return torch.linspace(0, 1, 100, dtype=torch.float64).diag()


def half_hidden() -> Tensor:
    """Return a stack of a matrix that is proved, and one that is not."""
    return torch.stack([torch.eye(64, dtype=torch.float64), orthogonal_to_the_start(64)])


BUGS: dict[str, Callable[[], tuple[CholeskyNorm, Tensor]]] = {
    "the factorisation is ignored": lambda: (
        IgnoresTheFactorisation(),
        orthogonal_to_the_start(64),
    ),
    "the value is not raised": lambda: (
        ForgetsToRaise(num_steps=4, slack=0.1),
        dense_below_the_top(),
    ),
    "the first proof counts for all": lambda: (LooksAtTheFirst(), half_hidden()),
}
