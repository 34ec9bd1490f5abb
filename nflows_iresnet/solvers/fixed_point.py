"""Plain fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nflows_iresnet.solvers.base import Accelerator, Progress, Solver


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
