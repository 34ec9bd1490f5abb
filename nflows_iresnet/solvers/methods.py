"""Plain and accelerated fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_iresnet.solvers.base import Accelerator, Solver
from nflows_iresnet.solvers.progress import Progress


class _Plain(Accelerator):
    def propose(self, point: Tensor, image: Tensor, best: Progress) -> Tensor:
        return image

    def select(self, rows: Tensor) -> None:
        pass


@dataclass(frozen=True)
class FixedPointIteration(Solver):
    r"""Picard iteration x <- f(x). The residual shrinks at least by L in each step.

    After n steps \|x_n - x*\| <= L^n / (1 - L) \|x_1 - x_0\|.

    Cost: about log(tolerance) / log(L) evaluations of f.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen. Invertible residual networks, 2019.

    Example:
        >>> import torch
        >>> solution = FixedPointIteration()(torch.cos, torch.ones(1, 1, dtype=torch.float64))
        >>> f"{solution.value.item():.6f}"
        '0.739085'
    """

    def start(self, init: Tensor) -> Accelerator:
        """Return the accelerator that does not accelerate."""
        return _Plain()


def solve_small(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve systems (B, m, m) without raising on singular ones, half precisions in float32."""
    if matrix.dtype in (torch.float32, torch.float64):
        return torch.linalg.solve_ex(matrix, right).result
    return torch.linalg.solve_ex(matrix.float(), right.float()).result.to(matrix.dtype)


_GROWTH = 2.0
"""A residual this many times the best one makes Anderson return to the best point."""


class _AndersonMemory(Accelerator):
    """The last differences of residuals and images, (B, history, D), and their inner products.

    Slots that are not filled yet hold zeros, and get the coefficient zero.
    """

    def __init__(self, history: int, init: Tensor) -> None:
        self._history, self._count = history, -1
        self._residual_steps = init.new_zeros(len(init), history, init.shape[1])
        self._image_steps = torch.zeros_like(self._residual_steps)
        self._gram = init.new_zeros(len(init), history, history)
        self._identity = torch.eye(history, dtype=init.dtype, device=init.device)[None]
        self._residual = self._image = init

    def select(self, rows: Tensor) -> None:
        """Forget the other rows."""
        for name, values in vars(self).items():
            if isinstance(values, Tensor) and values is not self._identity:
                setattr(self, name, values[rows])

    def propose(self, point: Tensor, image: Tensor, best: Progress) -> Tensor:
        """Extrapolate from points near the best one, else take the plain step from the best."""
        plain = best.value + best.residual
        is_near = (best.latest_norm <= _GROWTH * best.residual_norm)[:, None]
        residual = torch.where(is_near, image - point, best.residual)
        image = torch.where(is_near, image, plain)
        self._remember(residual, image)
        if self._count < 1:
            return plain
        return torch.where(is_near, self._extrapolate(residual, image), plain)

    def _remember(self, residual: Tensor, image: Tensor) -> None:
        if self._count >= 0:
            slot = self._count % self._history
            step = residual - self._residual
            self._residual_steps[:, slot] = step
            self._image_steps[:, slot] = image - self._image
            products = _inner_products(self._residual_steps, step)
            self._gram[:, slot] = products
            self._gram[:, :, slot] = products
        self._residual, self._image = residual, image
        self._count += 1

    def _extrapolate(self, residual: Tensor, image: Tensor) -> Tensor:
        """Combine the images so that the same combination of residuals is smallest."""
        eps, tiny = torch.finfo(residual.dtype).eps, torch.finfo(residual.dtype).tiny
        size = self._gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        products = _inner_products(self._residual_steps, residual)
        coefficients = solve_small(
            self._gram + (eps * size + tiny) * self._identity, products[:, :, None]
        )
        return image - (self._image_steps.mT @ coefficients).squeeze(2)


def _inner_products(steps: Tensor, vector: Tensor) -> Tensor:
    """Return <step, vector> for steps (B, m, D) and vectors (B, D), shape (B, m)."""
    return (steps @ vector[:, :, None]).squeeze(2)


@dataclass(frozen=True)
class Anderson(Solver):
    r"""Safeguarded Anderson acceleration.

    The next point combines the last `history` + 1 images so that the same combination of their
    residuals is smallest. Residuals need not fall in each step, but a point whose residual is more
    than twice the best one is dropped for the plain step from the best point, whose residual is at
    most L times the best: whatever the acceleration does, it cannot diverge, and the point that is
    returned is the best one, verified.

    Cost: one evaluation of f per step, and a least-squares problem of size `history` per row.

    Args:
        history: how many differences are combined, at most the number of dimensions. Linear maps
            of L = 0.97 in 6 dimensions (float64): 920 plain steps, 880 with 1, 615 with 2, 33 with
            5; trained 2-D blocks: 70, 24 and, with 2, 10.

    References:
        Anderson. Iterative procedures for nonlinear integral equations, 1965.
        Walker, Ni. Anderson acceleration for fixed-point iterations, 2011.

    Example:
        >>> import torch
        >>> solution = Anderson()(torch.cos, torch.ones(1, 1, dtype=torch.float64))
        >>> f"{solution.value.item():.6f}", bool(solution.num_steps < 15)
        ('0.739085', True)
    """

    history: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history < 1:
            raise ValueError(f"history must be at least 1, got {self.history}")

    def start(self, init: Tensor) -> Accelerator:
        """Return an empty memory."""
        return _AndersonMemory(min(self.history, max(1, init.shape[1])), init)
