"""The loop that all solvers share: verified residuals, the best points, and errors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nflows_iresnet.linearization import concrete, is_traced
from nflows_iresnet.validation import validated_size

Map = Callable[[Tensor], Tensor]

_STALL_STEPS = 50
"""A row is given up when its best residual has not improved between two multiples of this."""

_LOOSEST = 1 / 16
"""Of the size of a point and its image: what rounding may excuse at most."""

_FEW_VALUES = 512
_DONE = 0.25
"""Rows that are done are left out when they are this part, and have `_FEW_VALUES` values."""

_FIRST_LOOK = 10
"""Evaluations before the first look where looking makes the host wait.

Blocks of flows take 5 to 25 evaluations in float32, trained ones mostly 8 to 12: this first look
and `steps_to_next_look` make one or two looks of them.
On a CPU, where looking costs next to nothing, the evaluations beyond those that were needed would:
with a first look after 5, 8 or 10, inverses of six blocks took 1.1 to 2.0, 1.2 to 2.2 and 1.4 to
2.9 times as long (2 to 256 dimensions, up to 10,000 rows, before and after 60 training steps).
"""


@runtime_checkable
class SelectableMap(Protocol):
    """A map that can be had for some rows alone, so that rows that are done cost nothing."""

    def __call__(self, point: Tensor, /) -> Tensor:
        """Return f(point), shape (B, *)."""

    def select(self, rows: Tensor, /) -> SelectableMap:
        """Return the map for the rows with these indices."""


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
        """Whether the residual is at most its tolerance, and that is finite, shape (B,)."""
        return (self.residual <= self.tolerance) & (self.tolerance < torch.inf)

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
        kind, size = torch.finfo(self.value.dtype), row_norm(self.value.flatten(start_dim=1))
        rounding = 4 * kind.eps * size.clamp_min(kind.tiny)
        return (self.residual + rounding) / (1 - lipschitz)


class FixedPointNotConverged(RuntimeError):  # noqa: N818
    """Raised when a residual is above its tolerance, or not a number.

    Attributes:
        solution: the best point found, with its residual, for those who want to look at it. Inside
            `torch.func.vmap` the mapped dimensions of its tensors are in front.
    """

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message, solution)  # both, as copies and other processes make it anew
        self.solution = solution

    def __str__(self) -> str:
        """Return the message."""
        return str(self.args[0])


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

    Inside `torch.func.vmap` the calls that are mapped go on together until the last row is done.

    Args:
        atol: absolute tolerance of the residual; by default 8 eps, 1e-6 in float32, and 1e-12 in
            float64. Rows that are smaller than that need one of their own. Gradients through a
            solution are solved for their own scale, for which a larger one does not count.
        rtol: relative tolerance of the residual; by default 4 eps, 5e-7 in float32, and 1e-14 in
            float64.
        max_steps: the number of evaluations of f after which an exception is raised.
        first_look: after how many evaluations the residual is looked at first. A look makes the
            host wait for the device. After 1 it is looked at in each step; else rarely, see
            `steps_to_next_look`, for a few evaluations more than were needed. What is accepted is
            verified in both cases. By default 1 on a CPU, where looking is free, and 10 elsewhere.
    """

    atol: float | None = None
    rtol: float | None = None
    max_steps: int = 10_000
    first_look: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in (("atol", self.atol), ("rtol", self.rtol)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if self.atol == 0 and self.rtol == 0:
            raise ValueError("atol and rtol must not both be zero: no residual would be accepted")
        validated_size("max_steps", self.max_steps)
        if self.first_look is not None:
            validated_size("first_look", self.first_look)

    @abstractmethod
    def start(self, init: Tensor) -> Accelerator:
        """Return a fresh accelerator for one solve."""

    @torch.no_grad()
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
        point = init.detach().flatten(start_dim=1)
        next_look = self.first_look or (1 if point.device.type == "cpu" else _FIRST_LOOK)
        is_free = next_look == 1 or point.numel() == 0
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise RuntimeError(
                "torch.jit.trace would repeat the steps of this call for every other input, and "
                "verify nothing: trace what does not solve, so no inverse and no MonotoneTransform"
            )
        best = everything = Progress(point, looks_each_step=is_free)
        accelerator, is_sure = self.start(point), True
        can_select = accelerator.can_select and not is_traced()
        for step in range(1, self.max_steps + 1):
            image = fn(point.reshape(point.shape[0], *init.shape[1:])).flatten(start_dim=1)
            if step == 1:
                _require_same_shape(init, point, image)
                self._begin(best, point, image, lipschitz)
            best.update(point, image)
            is_stall, is_last = step % _STALL_STEPS == 0, step == self.max_steps
            if is_stall or is_last or (step >= next_look and best.needs_a_look()):
                tolerance = self._tolerance(best)
                best.accept(tolerance, step)
                if is_stall:
                    best.close_stalled(self._tolerance(best, lipschitz), step)
                    is_sure = False
                remaining = best.look(tolerance, step)
                if best.num_open == 0 or best.has_lost_rows:
                    break
                if can_select and _is_worth_it(best) and isinstance(fn, SelectableMap):
                    everything.take_over(best)
                    keep = best.open_rows()
                    best, fn = best.select(keep), fn.select(keep)
                    point, image = point[keep], image[keep]
                    accelerator.select(keep)
                next_look = step + steps_to_next_look(step, remaining)
            point = accelerator.propose(point, image, best)
        if best.num_open > 0:
            best.close(best.is_open, self._tolerance(best), step)
            is_sure = False
        everything.take_over(best)
        solution = Solution(
            everything.value.reshape(init.shape),
            row_norm(everything.residual),
            everything.tolerance,
            everything.num_steps,
        )
        if not is_sure and not holds(solution.converged):
            raise _failure(solution)
        return solution

    def _tolerance(self, best: Progress, lipschitz: float | None = None) -> Tensor:
        """Return the tolerance of the best points; for a bound L, at least what rounding leaves."""
        kind = torch.finfo(best.value.dtype)
        size, image_size = best.size, best.norm(best.value + best.residual)
        rtol = self._rtol(kind)
        tolerance = torch.add(self._atol(kind) + rtol * size, image_size, alpha=rtol)
        if self.rtol is not None or lipschitz is None:
            return tolerance
        rounding = min(32 * kind.eps / (1 - lipschitz), max(rtol, _LOOSEST))
        return tolerance.maximum(rounding * size + rounding * image_size)

    def without_units(self, dtype: torch.dtype) -> Solver:
        """Return the strategy for rows whose largest value is 1, where theirs was any number.

        An `atol` above the default was for the units of other rows, and is left out; so is an
        `rtol` of zero, which asks for more than rounding permits of such rows, and a `max_steps`
        that was enough for them.
        """
        is_loose = self.atol is not None and self.atol > _default_atol(torch.finfo(dtype))
        if not is_loose and self.rtol != 0:
            return self
        steps = max(self.max_steps, Solver.max_steps)
        atol = None if is_loose else self.atol
        return replace(self, atol=atol, rtol=self.rtol or None, max_steps=steps)

    def _atol(self, kind: torch.finfo) -> float:
        return _default_atol(kind) if self.atol is None else self.atol

    def _rtol(self, kind: torch.finfo) -> float:
        default = 1e-14 if kind.bits == 64 else 4 * kind.eps
        return default if self.rtol is None else self.rtol

    def _begin(self, best: Progress, point: Tensor, image: Tensor, lipschitz: float | None) -> None:
        r"""Set the norm that is used, how long points may be, and which residuals may be accepted.

        A fixed point is within \|f(x_0) - x_0\| / (1 - L) of the guess x_0. Points beyond are
        escapes to where rounding hides any residual. Within, the scale of an accepted residual is
        at most 2 |x| plus itself, and torch's norm is right where no square overflows, and those
        that vanish are of residuals below `atol`.
        """
        kind = torch.finfo(point.dtype)
        atol, rtol = self._atol(kind), self._rtol(kind)
        times = 1e3 if lipschitz is None else 1 + 2 / (1 - lipschitz)
        if best.looks_each_step and atol >= _smallest_exact_norm(point):
            best.farthest = times * (_plain_norm(point) + _plain_norm(image))
            if holds(best.farthest < math.sqrt(kind.max)):
                best.norm, best.has_plain_squares = _plain_norm, True
        if not best.has_plain_squares:
            best.farthest = (times * (row_norm(point) + row_norm(image))).clamp_max(kind.max)
        if rtol < 0.5:
            best.loosest = (atol + 2 * rtol * best.farthest) * (1.01 / (1 - rtol))


def _default_atol(kind: torch.finfo) -> float:
    return 1e-12 if kind.bits == 64 else 8 * kind.eps


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


class Progress:
    """The best point of each row so far, and which rows are done.

    Attributes:
        value: the best point, shape (B, D).
        residual: f(value) - value, shape (B, D).
        residual_norm: its 2-norm, shape (B,).
        size: the 2-norm of the best point, shape (B,); NaN before there is one.
        latest_norm: that of the residual of the latest point, infinite for an escape, shape (B,).
        looks_each_step: whether decisions may be taken by looking at values.
        is_latest: whether all rows are open, and the latest point of each is known to be its best.
        tolerance: what the residual was to be at most when the row was closed, shape (B,).
        is_open: whether the row is neither accepted nor given up, shape (B,).
        num_open: how many rows were open at the last look.
        has_lost_rows: whether a row had no finite residual at the last look.
        num_steps: evaluations until the row was closed, shape (B,).
        norm: the 2-norm of rows, (B, D) -> (B,).
        has_plain_squares: whether squares of residuals neither overflow nor vanish.
        farthest: the norm beyond which a point is an escape, shape (B,).
        loosest: what a residual that is not to be accepted is above, shape (B,).
    """

    def __init__(self, init: Tensor, *, looks_each_step: bool) -> None:
        infinite = init.new_full((init.shape[0],), torch.inf)
        self.value, self.residual = init, torch.full_like(init, torch.inf)
        self.residual_norm = self.latest_norm = infinite
        self.farthest = self.loosest = self._norm_before = infinite
        self._first_norm: Tensor | None = None
        self.size = torch.full_like(infinite, torch.nan)
        self.tolerance = torch.zeros_like(infinite)
        self.is_open = torch.ones_like(infinite, dtype=torch.bool)
        self.num_steps = torch.zeros_like(infinite, dtype=torch.int64)
        self.num_open, self.is_latest, self.has_lost_rows = init.shape[0], False, False
        self._rows: Tensor | None = None
        self.norm: Map = row_norm
        self.has_plain_squares = False
        self.looks_each_step, self._are_all_open = looks_each_step, True

    def update(self, point: Tensor, image: Tensor) -> None:
        """Take a new point (B, D) and its image into account; one that is no number is no better.

        Where looking is free, it is seen at once that all points are better.
        """
        residual = image - point
        norm, size = self.norm(residual), self.norm(point)
        is_near = size <= self.farthest
        if self._first_norm is None:
            self._first_norm = norm
        if self.looks_each_step and self._are_all_open:
            self.is_latest = holds((norm < self.residual_norm) & is_near)
            if self.is_latest:
                self.value, self.residual, self.size = point, residual, size
                self.residual_norm = self.latest_norm = norm
                return
        self.latest_norm = torch.where(is_near, norm, torch.inf)
        is_better = self.is_open & (self.latest_norm < self.residual_norm)
        column = is_better[:, None]
        self.value = torch.where(column, point, self.value)
        self.residual = torch.where(column, residual, self.residual)
        self.residual_norm = torch.where(is_better, norm, self.residual_norm)
        self.size = torch.where(is_better, size, self.size)
        self.is_latest = False

    def needs_a_look(self) -> bool:
        """Whether rows may be done: where looking is free, whether any residual is small enough."""
        if not self.looks_each_step or not self.is_latest:
            return True
        return not holds(self.latest_norm > self.loosest)

    def close(self, rows: Tensor, tolerance: Tensor, step: int) -> None:
        """Close some of the open rows after `step` evaluations, at a tolerance."""
        closed = self.is_open & rows
        self.tolerance = torch.where(closed, tolerance, self.tolerance)
        self.num_steps = torch.where(closed, step, self.num_steps)
        self.is_open = self.is_open & ~rows

    def accept(self, tolerance: Tensor, step: int) -> None:
        """Close the open rows whose best residual is within a tolerance that is finite."""
        is_within = self.residual_norm <= tolerance
        if not self.has_plain_squares:
            is_within = is_within & (tolerance < torch.inf)
        self.close(is_within, tolerance, step)

    def close_stalled(self, tolerance: Tensor, step: int) -> None:
        """Close the open rows that have not improved since the last call."""
        self.close(~(self.residual_norm < self._norm_before), tolerance, step)
        self._norm_before = self.residual_norm

    def look(self, tolerance: Tensor, step: int) -> float:
        """Count the open rows: the one place where the host waits for the device.

        Args:
            tolerance: of the best points, shape (B,).
            step: evaluations so far.

        Returns:
            How many evaluations the worst open row still needs at its mean rate so far, NaN if it
            has none; 1 where each step is looked at.
        """
        if self.looks_each_step or self._first_norm is None:
            is_open = read(self.is_open)
            self.num_open = int(np.count_nonzero(is_open))
            self._are_all_open = self.num_open == is_open.size
            self.is_latest = self.is_latest and self._are_all_open
            self.has_lost_rows = step == 1 and not holds(self.residual_norm < torch.inf)
            return 1.0
        is_lost = self.residual_norm == torch.inf
        now = self.residual_norm.log()
        needed = (step - 1) * (now - tolerance.log()) / (self._first_norm.log() - now)
        numbers = [each.sum() for each in (concrete(self.is_open), concrete(is_lost))]
        numbers.append(concrete(torch.where(self.is_open, needed, 0)).max())
        num_open, num_lost, remaining = read(torch.stack([each.double() for each in numbers]))
        self.num_open, self.has_lost_rows = int(num_open), bool(num_lost > 0)
        return float(remaining)

    def open_rows(self) -> Tensor:
        """Return the indices of the rows that were open at the last look, without another one."""
        return (~self.is_open).byte().argsort(stable=True)[: self.num_open]

    def select(self, rows: Tensor) -> Progress:
        """Return the state of some rows, all of them open."""
        selected = copy(self)
        for name, values in self._states():
            setattr(selected, name, values[rows])
        selected._rows = rows if self._rows is None else self._rows[rows]
        selected._are_all_open = True
        return selected

    def take_over(self, selected: Progress) -> None:
        """Take over the state of rows that were selected."""
        if selected._rows is None:
            return
        for name, values in selected._states():
            setattr(self, name, getattr(self, name).index_copy(0, selected._rows, values))

    def _states(self) -> list[tuple[str, Tensor]]:
        return [(name, getattr(self, name)) for name in _ROW_STATES]


_ROW_STATES = (
    "value",
    "residual",
    "residual_norm",
    "size",
    "latest_norm",
    "farthest",
    "loosest",
    "tolerance",
    "is_open",
    "num_steps",
    "_norm_before",
    "_first_norm",
)
"""What `Progress` knows of each row."""


def steps_to_next_look(step: int, remaining: float) -> int:
    """Return how many evaluations to wait for the next look at the residuals.

    As many as are predicted, in doubt too few of them: at most twice those so far. Plain iteration
    keeps its rate, Anderson's method becomes faster.

    Args:
        step: evaluations so far.
        remaining: how many more the worst row needs at its rate so far; NaN if it has none.

    Example:
        >>> [steps_to_next_look(8, remaining) for remaining in (0.2, 5.1, 100.0, float("nan"))]
        [1, 6, 16, 16]
    """
    return max(1, math.ceil(remaining)) if 0 <= remaining < 2 * step else 2 * step


def row_norm(rows: Tensor) -> Tensor:
    """Return the 2-norm of each row of (B, D), shape (B,), where squares over- or underflow too."""
    if rows.device.type != "cpu" and rows.numel() > 0:
        return _wide_norm(rows)
    norm = _plain_norm(rows)
    smallest = _smallest_exact_norm(rows)
    values = read(norm.detach() if norm.dtype != torch.bfloat16 else norm.detach().float())
    if values.size == 0 or (smallest < values.min() and values.max() < math.inf):
        return norm
    return torch.where((norm > smallest) & (norm < torch.inf), norm, _wide_norm(rows))


def _plain_norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


def _wide_norm(rows: Tensor) -> Tensor:
    if rows.dtype != torch.float64:
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).to(rows.dtype)
    largest = rows.abs().amax(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
    return torch.linalg.vector_norm(rows / largest[:, None], dim=1) * largest


def _smallest_exact_norm(rows: Tensor) -> float:
    """Return the norm below which squares that vanish are more than rounding."""
    kind = torch.finfo(rows.dtype)
    return math.sqrt(rows.shape[1] * kind.tiny / kind.eps)


def holds(mask: Tensor) -> bool:
    """Whether a mask is true everywhere, see `read`."""
    values = read(mask)
    return bool(np.count_nonzero(values) == values.size)


def read(values: Tensor) -> NDArray[Any]:
    """Return values to decide by, for which the host waits unless they are on a CPU.

    Inside transforms of `torch.func` they are those of all the calls that are mapped.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(values):
        inner = concrete(values)
        with torch._C._DisableFuncTorch():  # else torch 2.4 wraps it again
            return np.array(inner.tolist())
    return values.numpy() if values.device.type == "cpu" else values.cpu().numpy()


def _require_same_shape(init: Tensor, point: Tensor, image: Tensor) -> None:
    if image.shape != point.shape:
        raise ValueError(
            f"the map must keep the shape of its inputs, {tuple(init.shape)}, and returned "
            f"{tuple(image.shape)} for {tuple(point.shape)} values"
        )


def _is_worth_it(best: Progress) -> bool:
    num_rows, size = best.value.shape
    num_done = num_rows - best.num_open
    return num_done * size >= _FEW_VALUES and num_done >= _DONE * num_rows


def _failure(solution: Solution) -> FixedPointNotConverged:
    """Return the exception that says which rows failed, and why."""
    solution = Solution(
        *map(concrete, (solution.value, solution.residual, solution.tolerance, solution.num_steps))
    )
    residual, tolerance = solution.residual.flatten(), solution.tolerance.flatten()
    bad = ~residual.isfinite()
    if bool(bad.any()):
        return FixedPointNotConverged(
            f"{_rows(bad)} have a residual that is not finite; check the inputs, the context and "
            f"the weights for NaN, for infinite values and for values close to the largest of "
            f"{residual.dtype}",
            solution,
        )
    bad = ~solution.converged.flatten()
    worst = int(torch.where(bad, residual / tolerance, -torch.inf).argmax())
    return FixedPointNotConverged(
        f"no fixed point within the tolerance after {int(solution.num_steps.max())} steps: "
        f"{_rows(bad)} have a residual above it, the worst {residual[worst]:.3g} > "
        f"{tolerance[worst]:.3g} (row {worst}). Either the map is no contraction (check that "
        "Lip(g) < 1), or it needs more max_steps or solvers.Anderson, or the tolerance is below "
        f"what {residual.dtype} resolves: use .double(), or larger atol and rtol",
        solution,
    )


def _rows(bad: Tensor) -> str:
    """Return how many rows are bad, and which."""
    indices = [str(int(each)) for each in bad.nonzero()[:6]]
    shown = ", ".join(indices[:5]) + (", ..." if len(indices) > 5 else "")
    return f"{int(bad.sum())} of {bad.numel()} rows ({shown})"
