"""The loop that all solvers share: verified residuals, the best points, and errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]

_STALL_STEPS = 100
"""A row is given up when its best residual has not improved for this many steps."""


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
        """Whether the residual is at most the tolerance, shape (B,); False for NaN."""
        return self.residual <= self.tolerance

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
        rounding = 4 * torch.finfo(self.value.dtype).eps * _row_norm(self.value)
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
            fn: maps (B, *) to (B, *), row by row, contracting.
            init: the first guess, shape (B, *).
            lipschitz: a bound L < 1 of Lip(fn), if one is known.

        Returns:
            The solution, every row of which is within its tolerance.

        Raises:
            FixedPointNotConverged: if a residual is not finite, stops decreasing above its
                tolerance, or is above it after `max_steps` evaluations.
        """
        with torch.no_grad():
            return self._solve(fn, init.detach().flatten(start_dim=1), init.shape, lipschitz)

    def _solve(self, fn: Map, init: Tensor, shape: torch.Size, lipschitz: float | None) -> Solution:
        accelerator, point, best = self.start(init), init, Progress(init)
        for step in range(1, self.max_steps + 1):
            image = fn(point.reshape(shape)).flatten(start_dim=1)
            scale = _row_norm(point) + _row_norm(image)
            if step == 1:
                farthest = scale * _farthest(lipschitz)
            residual_norm = torch.where(scale <= farthest, _row_norm(image - point), torch.inf)
            best.update(point, image - point, residual_norm, self._tolerance(scale), step)
            if not best.residual_norm.isfinite().all():
                solution = best.solution(shape)
                raise FixedPointNotConverged(_not_finite(solution), solution)
            best.give_up_stalled(step, self._rounding(scale, lipschitz))
            if best.finished():
                break
            point = accelerator.propose(point, image, best)
        solution = best.solution(shape)
        if not bool(solution.converged.all()):
            raise FixedPointNotConverged(_not_converged(solution, step), solution)
        return solution

    def _tolerance(self, scale: Tensor) -> Tensor:
        is_double = scale.dtype == torch.float64
        eps = torch.finfo(scale.dtype).eps
        atol = (1e-12 if is_double else 8 * eps) if self.atol is None else self.atol
        rtol = (1e-14 if is_double else 4 * eps) if self.rtol is None else self.rtol
        return atol + rtol * scale

    def _rounding(self, scale: Tensor, lipschitz: float | None) -> Tensor:
        if self.rtol is not None or lipschitz is None:
            return torch.zeros_like(scale)
        return 32 * torch.finfo(scale.dtype).eps * scale / (1 - lipschitz)


class Progress:
    """The best point of each row so far, and which rows are accepted."""

    def __init__(self, init: Tensor) -> None:
        rows = init[:, 0] if init.shape[1] else init.sum(1)
        self.value, self.residual = init, torch.zeros_like(init)
        self.residual_norm = torch.full_like(rows, torch.inf)
        self.tolerance = torch.zeros_like(rows)
        self.accepted = torch.zeros_like(rows, dtype=torch.bool)
        self.given_up = torch.zeros_like(rows, dtype=torch.bool)
        self.improved = torch.ones_like(rows, dtype=torch.bool)
        self.num_steps = torch.zeros_like(rows, dtype=torch.int64)
        self.last_improvement = torch.zeros_like(rows, dtype=torch.int64)

    def update(
        self, point: Tensor, residual: Tensor, norm: Tensor, tolerance: Tensor, step: int
    ) -> None:
        """Take a new point into account; rows that are accepted stay as they are."""
        is_open = self._open()
        self.improved = is_open & (norm < self.residual_norm)
        column = self.improved[:, None]
        self.value = torch.where(column, point, self.value)
        self.residual = torch.where(column, residual, self.residual)
        self.tolerance = torch.where(self.improved, tolerance, self.tolerance)
        self.residual_norm = torch.where(self.improved, norm, self.residual_norm)
        self.num_steps = torch.where(is_open, step, self.num_steps)
        self.last_improvement = torch.where(self.improved, step, self.last_improvement)
        self.accepted = self.accepted | (self.residual_norm <= self.tolerance)

    def give_up_stalled(self, step: int, rounding: Tensor) -> None:
        """Close the rows that have not improved for many steps; accept those down to rounding."""
        stalled = self._open() & (step - self.last_improvement >= _STALL_STEPS)
        self.tolerance = torch.where(stalled, self.tolerance.maximum(rounding), self.tolerance)
        self.accepted = self.accepted | (stalled & (self.residual_norm <= self.tolerance))
        self.given_up = self.given_up | (stalled & ~self.accepted)

    def finished(self) -> bool:
        """Whether every row is accepted or given up."""
        return not bool(self._open().any())

    def _open(self) -> Tensor:
        return ~self.accepted & ~self.given_up

    def solution(self, shape: torch.Size) -> Solution:
        """Return the best points in the shape of the caller."""
        return Solution(
            self.value.reshape(shape), self.residual_norm, self.tolerance, self.num_steps
        )


class Accelerator(ABC):
    """Proposes the next point of one solve from what has been seen."""

    @abstractmethod
    def propose(self, point: Tensor, image: Tensor, best: Progress) -> Tensor:
        """Return the next point, shape (B, D); rows in `best.accepted` are ignored."""


def _farthest(lipschitz: float | None) -> float:
    r"""How many times farther than the first step a point may be and still count as a solution.

    A fixed point is within \|f(x_0) - x_0\| / (1 - L) of the guess. Points beyond are escapes to
    where rounding hides any residual.
    """
    return 1e3 if lipschitz is None else 1 + 2 / (1 - lipschitz)


def _row_norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows.flatten(start_dim=1), dim=1)


def _not_finite(solution: Solution) -> str:
    bad = ~solution.residual.isfinite()
    return (
        f"{int(bad.sum())} of {len(bad)} rows have a residual that is not finite; check the "
        "inputs, the context and the weights for NaN and infinite values"
    )


def _not_converged(solution: Solution, step: int) -> str:
    bad = ~solution.converged
    worst = int(torch.where(bad, solution.residual, -torch.inf).argmax())
    return (
        f"no fixed point within the tolerance after {step} steps: {int(bad.sum())} of {len(bad)} "
        f"rows have a residual above it, the worst {solution.residual[worst]:.3g} > "
        f"{solution.tolerance[worst]:.3g} (row {worst}). Either the map is no contraction (check "
        "that Lip(g) < 1), or it needs more max_steps or solvers.Anderson, or the tolerance is "
        f"below what {solution.value.dtype} resolves: use .double(), or larger atol and rtol"
    )
