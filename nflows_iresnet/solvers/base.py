"""The loop that all solvers share: verified residuals, the best points, and errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_iresnet.solvers.progress import Map, Progress, SelectableMap, row_norm

_STALL_STEPS = 50
"""A row is given up when its best residual has not improved between two multiples of this."""

_FEW_VALUES = 512
_DONE = 0.25
"""Rows that are done are left out when they are this part, and have `_FEW_VALUES` values."""


@dataclass(frozen=True)
class Solution:
    r"""What a solver returns.

    Attributes:
        value: x, shape (B, *).
        residual: \|f(x) - x\| in the 2-norm, evaluated at `value` itself, shape (B,).
        tolerance: what the residual was asked to be at most, shape (B,).
        num_steps: evaluations of f until the row was accepted, integers of shape (B,).
    """

    value: Tensor
    residual: Tensor
    tolerance: Tensor
    num_steps: Tensor

    @property
    def converged(self) -> Tensor:
        """Whether the residual is a number and at most the tolerance, shape (B,)."""
        return (self.residual <= self.tolerance) & (self.residual < torch.inf)

    def error_bound(self, lipschitz: float) -> Tensor:
        r"""Return a bound of \|x - x*\|, shape (B,): residual / (1 - L), plus rounding.

        The residual itself is only known up to rounding of x and f(x), for which 4 eps \|x\| is
        added. (What f loses internally to cancellation is not visible here: use float64 where the
        last digits matter.)

        Args:
            lipschitz: L, an upper bound of Lip(f), in [0, 1).
        """
        if not 0 <= lipschitz < 1:
            raise ValueError(f"the Lipschitz bound must be in [0, 1), got {lipschitz}")
        rounding = 4 * torch.finfo(self.value.dtype).eps * row_norm(self.value)
        return (self.residual + rounding) / (1 - lipschitz)


class FixedPointNotConverged(RuntimeError):  # noqa: N818
    """Raised when a residual is above its tolerance, or not a number.

    Attributes:
        solution: the best point found, with its residual, for those who want to look at it.
    """

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution


@dataclass(frozen=True)
class Solver(ABC):
    r"""A strategy for x = f(x), row by row.

    A row is accepted when \|f(x) - x\| <= atol + rtol (\|x\| + \|f(x)\|): the residual of the very
    point that is returned. Accepted rows no longer move. Implementing one: subclass as a frozen
    dataclass and implement `start`; the best point of each row, the stopping test and the errors
    are handled here.

    With the default rtol the request is "as far as rounding permits". Rounding of relative size
    eps in each step leaves plain iteration with residuals around eps \|x\| / (1 - L), so a row that
    has stopped improving is then accepted at 32 eps (\|x\| + \|f(x)\|) / (1 - L) if L is known;
    `Solution.tolerance` says which tolerance held. An rtol that is given is never exceeded.

    Args:
        atol: absolute tolerance of the residual; by default 8 eps, 1e-6 in float32, and 1e-12 in
            float64.
        rtol: relative tolerance of the residual; by default 4 eps, 5e-7 in float32, and 1e-14 in
            float64.
        max_steps: the number of evaluations of f after which an exception is raised.
    """

    atol: float | None = None
    rtol: float | None = None
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        for name, value in (("atol", self.atol), ("rtol", self.rtol)):
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.atol == 0 and self.rtol == 0:
            raise ValueError("atol and rtol must not both be zero: no residual would be accepted")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")

    @abstractmethod
    def start(self, init: Tensor) -> Accelerator:
        """Return a fresh accelerator for one solve."""

    def __call__(self, fn: Map, init: Tensor, lipschitz: float | None = None) -> Solution:
        """Solve x = fn(x) from `init`; no gradient is recorded.

        Args:
            fn: maps (B, *) to (B, *), row by row, contracting. If it has a method `select(rows)`,
                see `SelectableMap`, rows that are done are no longer evaluated.
            init: the first guess, shape (B, *).
            lipschitz: a bound L < 1 of Lip(fn), if one is known.

        Returns:
            The solution, every row of which is within its tolerance.

        Raises:
            FixedPointNotConverged: if a residual is not finite, stops decreasing above its
                tolerance, or is above it after `max_steps` evaluations.
        """
        with torch.no_grad():
            best = self._iterate(fn, init.detach(), lipschitz)
        solution = Solution(
            best.value.reshape(init.shape), best.residual_norm, best.tolerance, best.num_steps
        )
        if not bool(solution.converged.all()):
            is_finite = bool(solution.residual.isfinite().all())
            message = _not_converged if is_finite else _not_finite
            raise FixedPointNotConverged(message(solution), solution)
        return solution

    def _iterate(self, fn: Map, init: Tensor, lipschitz: float | None) -> Progress:
        flat = init.flatten(start_dim=1)
        accelerator, point, best = self.start(flat), flat, Progress(flat)
        everything, rows = best, torch.arange(len(flat), device=flat.device)
        for step in range(1, self.max_steps + 1):
            image = fn(point.reshape(len(point), *init.shape[1:])).flatten(start_dim=1)
            if step == 1:
                farthest = (row_norm(point) + row_norm(image)) * _farthest(lipschitz)
                loosest = self._loosest(farthest)
            residual, point_norm = image - point, row_norm(point)
            norm = row_norm(residual)
            best.update(point, residual, norm, point_norm <= farthest)
            if bool((norm <= loosest).any()):
                best.accept(self._tolerance(point_norm + row_norm(image)))
            if step % _STALL_STEPS == 0:
                best.close_stalled(self._at_rounding(best.scale, lipschitz))
            if best.num_open == 0 or (step == 1 and not best.is_latest):
                break
            if _is_worth_it(best) and accelerator.can_select and isinstance(fn, SelectableMap):
                keep = best.is_open.nonzero()[:, 0]
                if best is not everything:
                    everything.write(rows, best)
                fn, best, rows = fn.select(keep), best.select(keep), rows[keep]
                point, image = point[keep], image[keep]
                farthest, loosest = farthest[keep], loosest[keep]
                accelerator.select(keep)
            point = accelerator.propose(point, image, best)
        if best.num_open > 0:
            best.close(self._tolerance(best.scale))
        if best is not everything:
            everything.write(rows, best)
        return everything

    def _tolerance(self, scale: Tensor) -> Tensor:
        return self._atol(scale.dtype) + self._rtol(scale.dtype) * scale

    def _atol(self, dtype: torch.dtype) -> float:
        default = 1e-12 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
        return default if self.atol is None else self.atol

    def _rtol(self, dtype: torch.dtype) -> float:
        default = 1e-14 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
        return default if self.rtol is None else self.rtol

    def _loosest(self, farthest: Tensor) -> Tensor:
        """Return what no residual that is accepted exceeds: its scale is at most 2 |x| + itself."""
        rtol = self._rtol(farthest.dtype)
        if rtol >= 0.5:
            return torch.full_like(farthest, torch.inf)
        return self._tolerance(2 * farthest) * (1.01 / (1 - rtol))

    def _at_rounding(self, scale: Tensor, lipschitz: float | None) -> Tensor:
        if self.rtol is not None or lipschitz is None:
            return self._tolerance(scale)
        rounding = 32 * torch.finfo(scale.dtype).eps * scale / (1 - lipschitz)
        return self._tolerance(scale).maximum(rounding)


class Accelerator(ABC):
    """Proposes the next point of one solve from what has been seen.

    Rows that are done are left out only for accelerators that override `select`.
    """

    @property
    def can_select(self) -> bool:
        """Whether `select` is implemented."""
        return type(self).select is not Accelerator.select

    @abstractmethod
    def propose(self, point: Tensor, image: Tensor, best: Progress) -> Tensor:
        """Return the next point, shape (B, D); rows that are not `best.is_open` are ignored.

        Args:
            point: the latest point, shape (B, D).
            image: f(point), shape (B, D).
            best: the best points so far, and the norm of the latest residual.
        """

    def select(self, rows: Tensor) -> None:  # noqa: B027
        """Go on with these rows only.

        Args:
            rows: indices into the rows so far.
        """


def _farthest(lipschitz: float | None) -> float:
    r"""How many times farther than the first step a point may be and still count as a solution.

    A fixed point is within \|f(x_0) - x_0\| / (1 - L) of the guess. Points beyond are escapes to
    where rounding hides any residual.
    """
    return 1e3 if lipschitz is None else 1 + 2 / (1 - lipschitz)


def _is_worth_it(best: Progress) -> bool:
    num_rows, size = best.value.shape
    num_done = num_rows - best.num_open
    return num_done * size >= _FEW_VALUES and num_done >= _DONE * num_rows


def _not_finite(solution: Solution) -> str:
    bad = ~solution.residual.isfinite()
    return (
        f"{int(bad.sum())} of {len(bad)} rows have a residual that is not finite; check the "
        "inputs, the context and the weights for NaN and infinite values"
    )


def _not_converged(solution: Solution) -> str:
    bad = ~solution.converged
    worst = int(torch.where(bad, solution.residual, -torch.inf).argmax())
    return (
        f"no fixed point within the tolerance after {int(solution.num_steps.max())} steps: "
        f"{int(bad.sum())} of {len(bad)} rows have a residual above it, the worst "
        f"{solution.residual[worst]:.3g} > {solution.tolerance[worst]:.3g} (row {worst}). Either "
        "the map is no contraction (check that Lip(g) < 1), or it needs more max_steps or "
        f"solvers.Anderson, or the tolerance is below what {solution.value.dtype} resolves: use "
        ".double(), or larger atol and rtol"
    )
