"""A trained block: its inverse and the gradient of that, on problems whose solution is known.

Each library runs at the loosest tolerance whose true error is small enough.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet import datasets
from nflows_iresnet.experiments.adapters import DensityModel, residual_blocks, value_and_jacobian
from nflows_iresnet.experiments.bench import (
    BASELINE,
    ERROR,
    EVALUATIONS,
    GRADIENT_ERROR,
    MEMORY,
    OURS,
    TOLERANCE,
)
from nflows_iresnet.experiments.bench.measure import Case, Run
from nflows_iresnet.experiments.evaluation import peak_megabytes
from nflows_iresnet.experiments.models import MODELS, Architecture
from nflows_iresnet.experiments.options import BenchOptions
from nflows_iresnet.flows import ResidualFlow
from nflows_iresnet.linearization import ResidualFunction
from nflows_iresnet.logdet import LogDetEstimate, LogDetEstimator
from nflows_iresnet.nn import LipschitzMLP
from nflows_iresnet.solvers import FixedPointIteration, FixedPointNotConverged, Solver
from nflows_iresnet.training.loop import Training, run
from nflows_iresnet.training.processes import seed_everything
from nflows_iresnet.training.progress import TrainingPlan
from nflows_iresnet.training.rows import Batches
from nflows_iresnet.transforms import ResidualTransform

# --- networks -------------------------------------------------------------------------------------


def default_block() -> ResidualTransform:
    """Return a block with the estimator and the solver that `ResidualFlow` has by default."""
    return residual_blocks(ResidualFlow(2, 8, 1))[0]


class FrozenNet(nn.Module):
    """The function of a `LipschitzMLP` now, with the weights in use as ordinary parameters.

    As a module it is a plain network for any library. This one, which asks for `bind`, sees its
    structure.

    Args:
        net: whose function it is.
    """

    def __init__(self, net: LipschitzMLP) -> None:
        super().__init__()
        with torch.no_grad():
            self._function = net.bind()
        self.lipschitz = self._function.lipschitz
        self.weights = nn.ParameterList(each.detach().clone() for each in self._function.weights)
        self.shifts = nn.ParameterList(each.detach().clone() for each in self._function.shifts)
        self.activations = nn.ModuleList(net.activations)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return g(inputs), (B, d) -> (B, d)."""
        hidden = F.linear(inputs, self.weights[0], self.shifts[0])
        for index, activation in enumerate(self.activations, start=1):
            hidden = F.linear(activation(hidden), self.weights[index], self.shifts[index])
        return hidden

    def bind(self, context: Tensor | None = None) -> ResidualFunction:
        """Return the same as a function with structure."""
        return replace(self._function, weights=list(self.weights), shifts=list(self.shifts))


class SlowestMap(nn.Module):
    """x -> -S x, S diagonal from 0 to the bound: linear, and as slow as the bound allows."""

    def __init__(self, features: int, lipschitz: float) -> None:
        super().__init__()
        self.lipschitz = lipschitz
        self.register_buffer("diagonal", torch.linspace(0.0, lipschitz, features))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return -S x, (B, d) -> (B, d)."""
        return -inputs * self.get_buffer("diagonal")


_TRAINED = {2: ("checkerboard", 64), 64: ("digits", 128)}
"""Data set and hidden width, by dimension."""
_GAIN = 4.0


@dataclass(frozen=True)
class ConstantRate:
    """Some steps of which nothing counts as done before the end: the learning rate stays."""

    steps: float = math.inf

    def progress(self, steps: int, seconds: float) -> float:
        """Return the fraction of the training that is done, by which the schedule goes."""
        return float(steps >= self.steps)


@lru_cache(maxsize=4)
def trained_branch(features: int, options: BenchOptions) -> tuple[LipschitzMLP, Tensor]:
    """Train a small flow and return its branch with the largest Jacobian, and rows that enter it.

    Random weights would make inverses and estimates look too easy: the norms of their layers
    multiply to the bound 0.97, the norm of their product stays far below. Training aligns them, and
    larger weights then use the bound up.

    Args:
        features: 2 (checkerboard) or 64 (digits).
        options: seed, device, and how long: 300 steps, 150 if quick.
    """
    name, hidden = _TRAINED[features]
    rows = datasets.load(name, seed=options.seed).train.to(options.device)
    seed_everything(options.seed)
    model = MODELS["residual-flow-plain"].build(Architecture(features, hidden, 3, 2))
    model.to(options.device)
    plan = TrainingPlan(5e-3, ConstantRate(150 if options.quick else 300), clip_norm=None)
    batches = Batches(rows, 256, options.seed)
    run(Training(model.flow, batches, plan, validate=lambda: 0.0))
    inputs = {net: inputs.detach() for net, inputs in _entering(model, rows[:8192]).items()}
    chosen = max(inputs, key=lambda net: _enlarged_jacobian(net, inputs[net][:64]))
    return chosen.requires_grad_(True), inputs[chosen]


def _entering(model: DensityModel, rows: Tensor) -> dict[LipschitzMLP, Tensor]:
    """Return the rows that enter each branch."""
    seen: dict[Any, Tensor] = {}

    def see(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[block.net] = inputs[0]

    hooks = [block.register_forward_pre_hook(see) for block in residual_blocks(model)]
    with torch.no_grad():
        model.encode(rows)
    for hook in hooks:
        hook.remove()
    return seen


def _enlarged_jacobian(net: LipschitzMLP, inputs: Tensor) -> float:
    """Enlarge the weights, and return the mean of the 2-norm of dg/dx."""
    with torch.no_grad():
        for layer in net.normed_layers:
            layer.weight.mul_(_GAIN)
    _, jacobian = value_and_jacobian(net, inputs)
    return float(torch.linalg.matrix_norm(jacobian.double(), 2).mean())


Inverse = Callable[[Tensor], Tensor]
InverseAt = Callable[[nn.Module, float], Inverse]
_ROUNDING = 1e-15

# --- problems -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem:
    """Find the solution x, (B, d), of x + g(x) = y: it is known to the rounding of float64."""

    net: nn.Module
    targets: Tensor
    solution: Tensor

    def error(self, found: Tensor) -> float:
        """Return the largest distance of a row to the solution."""
        return float((found.double() - self.solution).norm(dim=1).max())


def make_problem(net: nn.Module, start: Tensor) -> Problem:
    """Round y = x + g(x) to the precision of the network g, and solve for the x of that y."""
    exact, solution = copy.deepcopy(net).double(), start.double()
    with torch.no_grad():
        targets = (solution + exact(solution)).to(_first_tensor(net).dtype)
        for _ in range(5_000):
            before, solution = solution, targets.double() - exact(solution)
            if (solution - before).abs().max() <= _ROUNDING * solution.abs().max():
                break
    return Problem(net, targets, solution)


def _first_tensor(net: nn.Module) -> Tensor:
    return next(itertools.chain(net.parameters(), net.buffers()))


def trained_problem(
    features: int, batch: int, options: BenchOptions, dtype: torch.dtype
) -> Problem:
    """Make a problem of a trained network that uses up its Lipschitz bound."""
    net, inputs = trained_branch(features, options)
    rows = inputs.repeat(-(-batch // len(inputs)), 1)[:batch]
    return make_problem(FrozenNet(copy.deepcopy(net).to(dtype)), rows)


# --- how each library solves them -----------------------------------------------------------------


@dataclass(frozen=True)
class NoLogDet(LogDetEstimator):
    """Zero, without an evaluation: for the inverse alone, which is what other libraries time.

    `ResidualTransform.inverse` takes nothing but the log-determinant from its estimator.
    """

    def estimate(
        self,
        net: Callable[..., Tensor],
        inputs: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> LogDetEstimate:
        """Return the inputs and zeros."""
        zeros = inputs.new_zeros(inputs.shape[0])
        return LogDetEstimate(inputs, zeros, zeros)


def our_inverse(solver: Solver, net: nn.Module, tolerance: float) -> Inverse:
    """Return the inverse of this library at a tolerance of the residual."""
    chosen = replace(solver, atol=tolerance, rtol=0.0)
    block = ResidualTransform(net, estimator=NoLogDet(), solver=chosen)
    return lambda targets: block.inverse(targets)[0]


def normflows_inverse(net: nn.Module, tolerance: float) -> Inverse:
    """Return the inverse of normflows at a tolerance, which it takes as absolute and relative."""
    from normflows.flows.residual import iResBlock

    block = iResBlock(net)
    block.to(_first_tensor(net).device)
    return lambda targets: block._inverse_fixed_point(targets, atol=tolerance, rtol=tolerance)


OUR_TOLERANCES = tuple(10 ** (-quarter / 4) for quarter in range(16, 57))
"""1e-4 to 1e-14 in quarters of a decade: as fine as half decades of normflows, which compares the
square of a step with its tolerance."""
NORMFLOWS_TOLERANCES = tuple(10 ** (-half / 2) for half in range(10, 29))
"""1e-5, its default, to 1e-14."""


@contextmanager
def counted_rows(net: nn.Module) -> Iterator[list[int]]:
    """Return the numbers of rows for which a network is evaluated, one call after the other."""
    rows: list[int] = []
    hook = net.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        hook.remove()


@dataclass(frozen=True, eq=False)
class Reached:
    """The loosest tolerance that reaches an error, or the best that was reached.

    Beside it the inverse at that tolerance, and its evaluations of the network, per row.
    """

    inverse: Inverse
    tolerance: float
    error: float
    evaluations: float
    is_reached: bool


def reach(
    problem: Problem, inverse_at: InverseAt, tolerances: Iterable[float], to: float
) -> Reached | None:
    """Try falling tolerances until the true error of every row is small enough.

    Returns:
        What was reached; None if no tolerance gave a result.
    """
    best: Reached | None = None
    for tolerance in tolerances:
        inverse = inverse_at(problem.net, tolerance)
        try:
            with torch.no_grad(), counted_rows(problem.net) as rows:
                error = problem.error(inverse(problem.targets))
        except FixedPointNotConverged:
            break
        evaluations = sum(rows) / len(problem.targets)
        found = Reached(inverse, tolerance, error, evaluations, error <= to)
        best = found if best is None or error < best.error else best
        if found.is_reached:
            break
    return best


# --- time and evaluations -------------------------------------------------------------------------


def _runs(problem: Problem, error: float) -> list[Run]:
    """Return the runs of all libraries, each at the loosest tolerance that reaches an error."""
    ours = partial(our_inverse, default_block().solver)
    found = {
        OURS: reach(problem, ours, OUR_TOLERANCES, error),
        "ours-picard": reach(
            problem, partial(our_inverse, FixedPointIteration()), OUR_TOLERANCES, error
        ),
        BASELINE: reach(problem, normflows_inverse, NORMFLOWS_TOLERANCES, error),
    }
    return [_run(name, reached, problem.targets, error) for name, reached in found.items()]


def _run(name: str, reached: Reached | None, targets: Tensor, error: float) -> Run:
    if reached is None or not reached.is_reached:
        best = "no result" if reached is None else f"best {reached.error:.1e}"
        return Run(name, None, note=f"{error:.0e} not reached, {best}")

    def work() -> Tensor:
        with torch.no_grad():
            return reached.inverse(targets)

    numbers = {
        ERROR.key: reached.error,
        EVALUATIONS.key: reached.evaluations,
        TOLERANCE.key: reached.tolerance,
    }
    return Run(name, work, lambda: numbers)


def of_trained_blocks(options: BenchOptions) -> list[Case]:
    """Return the cases of trained blocks in both precisions."""
    return [
        _trained_case(features, batch, error, dtype)
        for error, dtype in ((1e-5, torch.float32), (1e-6, torch.float64))
        for features, batch in ((2, 256), (2, 8192), (64, 256))
    ]


def _trained_case(features: int, batch: int, error: float, dtype: torch.dtype) -> Case:
    def prepare(options: BenchOptions) -> list[Run]:
        return _runs(trained_problem(features, batch, options, dtype), error)

    precision = str(dtype).removeprefix("torch.")
    label = f"d={features} B={batch} error<={error:.0e} {precision}"
    return Case.timed(prepare, label, d=features, B=batch, error=error)


def over_the_bound(options: BenchOptions) -> list[Case]:
    """Return the cases of linear maps whose eigenvalues fill [-L, 0]."""
    bounds = (0.5, 0.9, 0.97) if options.quick else (0.5, 0.8, 0.9, 0.97, 0.99, 0.997)
    return [_slowest_case(bound) for bound in bounds]


def _slowest_case(lipschitz: float) -> Case:
    def prepare(options: BenchOptions) -> list[Run]:
        seed_everything(options.seed)
        net = SlowestMap(features=16, lipschitz=lipschitz).to(options.device, torch.float64)
        return _runs(make_problem(net, torch.randn(64, 16).to(options.device)), 1e-5)

    return Case.timed(prepare, f"L={lipschitz}", **{"1/(1-L)": 1 / (1 - lipschitz)})


# --- the gradient of the inverse ------------------------------------------------------------------

_UNROLLED_ERROR = 1e-5
_DEFAULT_TOLERANCE = 1e-5
"""Of normflows."""


def pull_back(
    inverse: Inverse, net: nn.Module, targets: Tensor, cotangent: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the inverse and the gradient of <cotangent, inverse> in y and all parameters, flat."""
    targets = targets.detach().clone().requires_grad_()
    found = inverse(targets)
    gradients = torch.autograd.grad((found * cotangent).sum(), [targets, *net.parameters()])
    return found.detach(), _flat(gradients)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def dense_gradient(problem: Problem, cotangent: Tensor) -> Tensor:
    """Return the same gradient at the true solution, by a dense solve in float64.

    With lambda = (I + J)^{-T} v it is lambda in y, and that of -<lambda, g(x)> in the parameters.
    """
    exact = copy.deepcopy(problem.net).double()
    _, jacobian = value_and_jacobian(exact, problem.solution)
    identity = torch.eye(problem.solution.shape[1]).to(jacobian)
    adjoint = torch.linalg.solve((identity + jacobian).mT, cotangent.double())
    values = exact(problem.solution)
    return _flat([adjoint, *torch.autograd.grad(values, list(exact.parameters()), -adjoint)])


def with_gradients(options: BenchOptions) -> list[Case]:
    """Return the cases of our implicit gradient beside normflows' unrolled one."""
    return [_gradient_case(2, 256), _gradient_case(64, 256)]


def _gradient_case(features: int, batch: int) -> Case:
    def prepare(options: BenchOptions) -> list[Run]:
        problem = trained_problem(features, batch, options, torch.float32)
        torch.manual_seed(options.seed)
        cotangent = torch.randn(batch, features).to(problem.targets)
        truth = dense_gradient(problem, cotangent)
        return [
            _gradient_run(name, inverse, problem, cotangent, truth)
            for name, inverse in _inverses(problem).items()
        ]

    return Case.timed(prepare, d=features, B=batch)


def _inverses(problem: Problem) -> dict[str, Inverse | None]:
    solver = default_block().solver
    block = ResidualTransform(problem.net, estimator=NoLogDet(), solver=solver)
    unrolled = reach(problem, normflows_inverse, NORMFLOWS_TOLERANCES, _UNROLLED_ERROR)
    return {
        OURS: lambda targets: block.inverse(targets)[0],
        BASELINE: normflows_inverse(problem.net, _DEFAULT_TOLERANCE),
        "unrolled": unrolled.inverse if unrolled is not None and unrolled.is_reached else None,
    }


def _gradient_run(
    name: str, inverse: Inverse | None, problem: Problem, cotangent: Tensor, truth: Tensor
) -> Run:
    if inverse is None:
        return Run(name, None, note=f"error {_UNROLLED_ERROR:.0e} not reached")

    def work() -> tuple[Tensor, Tensor]:
        return pull_back(inverse, problem.net, problem.targets, cotangent)

    def numbers() -> dict[str, float]:
        found, gradient = work()
        return {
            ERROR.key: problem.error(found),
            GRADIENT_ERROR.key: float((gradient.double() - truth).norm() / truth.norm()),
            MEMORY.key: peak_megabytes(work, problem.targets.device),
        }

    return Run(name, work, numbers)
