"""Inverse problems with a known solution, and the cheapest tolerance that reaches it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from nflows_iresnet.experiments.bench.contestants import Size, our_flow, residual_block
from nflows_iresnet.experiments.bench.functions import Counted, FrozenNet, NoLogDet
from nflows_iresnet.experiments.bench.items import Settings
from nflows_iresnet.experiments.bench.trained import trained_branch
from nflows_iresnet.solvers import FixedPointNotConverged, Solver
from nflows_iresnet.transforms import ResidualTransform

Inverse = Callable[[Tensor], Tensor]
InverseAt = Callable[[nn.Module, float], Inverse]
_TRUTH_STEPS = 5_000
_ROUNDING = 1e-15


@dataclass(frozen=True, eq=False)
class Problem:
    """Find x with x + g(x) = y.

    Args:
        net: g as this library's users have it.
        plain: the same function for any library.
        targets: y, (B, d), in the precision of the work.
        solution: x, (B, d), float64, to the rounding of float64.
    """

    net: nn.Module
    plain: nn.Module
    targets: Tensor
    solution: Tensor

    def error(self, found: Tensor) -> float:
        """Return the largest distance of a row to the solution."""
        return float((found.double() - self.solution).norm(dim=1).max())


def make_problem(net: nn.Module, plain: nn.Module, start: Tensor) -> Problem:
    """Round y = x + g(x) to the precision of the network, and solve for the x of that y.

    Args:
        net: g as this library's users have it.
        plain: the same function for any library.
        start: x, (B, d).
    """
    like = next(iter([*plain.parameters(), *plain.buffers()]))
    exact, solution = partial(_in_double, plain), start.double()
    with torch.no_grad():
        targets = (solution + exact(solution)).to(like.dtype)
        for _ in range(_TRUTH_STEPS):
            before, solution = solution, targets.double() - exact(solution)
            if (solution - before).abs().max() <= _ROUNDING * solution.abs().max():
                break
    return Problem(net, plain, targets, solution)


def _in_double(net: nn.Module, inputs: Tensor) -> Tensor:
    """Evaluate a network in float64 with the weights that it has in its own precision."""
    state = {name: value.double() for name, value in net.state_dict().items()}
    outputs: Tensor = torch.func.functional_call(net, state, inputs)
    return outputs


def trained_problem(features: int, batch: int, settings: Settings, dtype: torch.dtype) -> Problem:
    """Make a problem of a trained network that uses up its Lipschitz bound."""
    branch = trained_branch(features, settings)
    net = copy.deepcopy(branch.net).to(dtype)
    rows = branch.inputs.repeat(-(-batch // len(branch.inputs)), 1)[:batch]
    frozen = FrozenNet(net)
    return make_problem(frozen, frozen, rows)


def our_solver() -> Solver:
    """Return the solver that `ResidualFlow` uses by default."""
    return residual_block(our_flow(Size(2, 8))).solver


def our_inverse(solver: Solver) -> InverseAt:
    """Return the inverse of this library at a tolerance of the residual."""

    def at(net: nn.Module, tolerance: float) -> Inverse:
        chosen = replace(solver, atol=tolerance, rtol=0.0)
        block = ResidualTransform(net, estimator=NoLogDet(), solver=chosen)
        return lambda targets: block.inverse(targets)[0]

    return at


def normflows_inverse(net: nn.Module, tolerance: float) -> Inverse:
    """Return the inverse of normflows at a tolerance, which it takes as absolute and relative."""
    from normflows.flows.residual import iResBlock

    block = iResBlock(net)
    block.to(next(iter([*net.parameters(), *net.buffers()])).device)
    return lambda targets: block._inverse_fixed_point(targets, atol=tolerance, rtol=tolerance)


def our_tolerances() -> Iterator[float]:
    """Yield 1e-4 to 1e-14 in quarters of a decade.

    normflows compares the square of a step with its tolerance, so that this is as fine as half
    decades there.
    """
    return (10 ** (-quarter / 4) for quarter in range(16, 57))


def normflows_tolerances() -> Iterator[float]:
    """Yield 1e-5, its default, to 1e-14 in halves of a decade."""
    return (10 ** (-half / 2) for half in range(10, 29))


@dataclass(frozen=True, eq=False)
class Reached:
    """The loosest tolerance that reaches an error, or the best that was reached.

    Args:
        inverse: at that tolerance.
        tolerance: what was asked for.
        error: what was reached.
        evaluations: of the network, per row.
        is_reached: whether the error is as small as it was to be.
    """

    inverse: Inverse
    tolerance: float
    error: float
    evaluations: float
    is_reached: bool

    @property
    def figures(self) -> dict[str, float]:
        """The columns of a table."""
        return {
            "error": self.error,
            "evaluations": self.evaluations,
            "tolerance": self.tolerance,
        }


def reach(
    problem: Problem, net: nn.Module, inverse_at: InverseAt, tolerances: Iterator[float], to: float
) -> Reached | None:
    """Lower the tolerance until the true error of every row is small enough.

    Args:
        problem: what is solved.
        net: the network that is handed to the library.
        inverse_at: the library's inverse at a tolerance.
        tolerances: those to try, falling.
        to: the error.

    Returns:
        What was reached; None if no tolerance gave a result.
    """
    best: Reached | None = None
    for tolerance in tolerances:
        counted = Counted(net)
        try:
            with torch.no_grad():
                error = problem.error(inverse_at(counted, tolerance)(problem.targets))
        except FixedPointNotConverged:
            break
        evaluations = counted.rows / len(problem.targets)
        found = Reached(inverse_at(net, tolerance), tolerance, error, evaluations, error <= to)
        best = found if best is None or error < best.error else best
        if found.is_reached:
            break
    return best
