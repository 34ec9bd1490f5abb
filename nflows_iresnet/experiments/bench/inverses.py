"""The inverse and its gradient, on problems whose solution is known.

Each library runs at the loosest tolerance whose true error is small enough.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from nflows_iresnet.experiments.adapters import value_and_jacobian
from nflows_iresnet.experiments.bench.items import (
    BASELINE,
    ERROR,
    EVALUATIONS,
    GRADIENT_ERROR,
    MEMORY,
    OURS,
    TOLERANCE,
)
from nflows_iresnet.experiments.bench.measure import Case, Run, Settings, measure_runs
from nflows_iresnet.experiments.bench.models import (
    FrozenNet,
    SlowestMap,
    default_block,
    trained_branch,
)
from nflows_iresnet.experiments.evaluation import peak_megabytes
from nflows_iresnet.linearization import Linearization, ResidualFunction, bind
from nflows_iresnet.logdet import LogDetEstimate, LogDetEstimator
from nflows_iresnet.solvers import FixedPointIteration, FixedPointNotConverged, Solver
from nflows_iresnet.training import seed_everything
from nflows_iresnet.transforms import ResidualTransform

Inverse = Callable[[Tensor], Tensor]
InverseAt = Callable[[nn.Module, float], Inverse]
_TRUTH_STEPS = 5_000
_ROUNDING = 1e-15

# --- problems -------------------------------------------------------------------------------------


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
    state = {name: value.double() for name, value in plain.state_dict().items()}

    def exact(inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(plain, state, inputs)
        return outputs

    solution = start.double()
    with torch.no_grad():
        targets = (solution + exact(solution)).to(_first_tensor(plain).dtype)
        for _ in range(_TRUTH_STEPS):
            before, solution = solution, targets.double() - exact(solution)
            if (solution - before).abs().max() <= _ROUNDING * solution.abs().max():
                break
    return Problem(net, plain, targets, solution)


def _first_tensor(net: nn.Module) -> Tensor:
    return next(iter([*net.parameters(), *net.buffers()]))


def trained_problem(features: int, batch: int, settings: Settings, dtype: torch.dtype) -> Problem:
    """Make a problem of a trained network that uses up its Lipschitz bound."""
    branch = trained_branch(features, settings)
    frozen = FrozenNet(copy.deepcopy(branch.net).to(dtype))
    rows = branch.inputs.repeat(-(-batch // len(branch.inputs)), 1)[:batch]
    return make_problem(frozen, frozen, rows)


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


def our_tolerances() -> Iterator[float]:
    """Yield 1e-4 to 1e-14 in quarters of a decade.

    normflows compares the square of a step with its tolerance, so that this is as fine as half
    decades there.
    """
    return (10 ** (-quarter / 4) for quarter in range(16, 57))


def normflows_tolerances() -> Iterator[float]:
    """Yield 1e-5, its default, to 1e-14 in halves of a decade."""
    return (10 ** (-half / 2) for half in range(10, 29))


class Counted(nn.Module):
    """A network that counts the rows for which it was evaluated."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.rows = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Return net(inputs)."""
        self.rows += inputs.shape[0]
        outputs: Tensor = self.net(inputs)
        return outputs

    def bind(self, context: Tensor | None = None) -> ResidualFunction:
        """Return the network as a function that counts here."""
        return _CountedFunction(bind(self.net, context), self)


class _CountedFunction(ResidualFunction):
    def __init__(self, function: ResidualFunction, counter: Counted) -> None:
        self._function, self._counter = function, counter
        self.lipschitz = function.lipschitz

    def __call__(self, inputs: Tensor) -> Tensor:
        self._counter.rows += inputs.shape[0]
        return self._function(inputs)

    def linearize(self, inputs: Tensor) -> Linearization:
        self._counter.rows += inputs.shape[0]
        return self._function.linearize(inputs)

    def select(self, rows: Tensor | slice) -> ResidualFunction:
        return _CountedFunction(self._function.select(rows), self._counter)


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
    def numbers(self) -> dict[str, float]:
        """The columns of a table."""
        return {
            ERROR.key: self.error,
            EVALUATIONS.key: self.evaluations,
            TOLERANCE.key: self.tolerance,
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


# --- time and evaluations -------------------------------------------------------------------------


def _runs(problem: Problem, error: float) -> list[Run]:
    """Return the runs of all libraries, each at the loosest tolerance that reaches an error."""
    solvers = {OURS: default_block().solver, "ours-picard": FixedPointIteration()}
    found = {
        name: reach(problem, problem.net, partial(our_inverse, solver), our_tolerances(), error)
        for name, solver in solvers.items()
    }
    theirs = reach(problem, problem.plain, normflows_inverse, normflows_tolerances(), error)
    runs = {**found, BASELINE: theirs}
    return [_run(name, reached, problem.targets, error) for name, reached in runs.items()]


def _run(name: str, reached: Reached | None, targets: Tensor, error: float) -> Run:
    if reached is None or not reached.is_reached:
        best = "no result" if reached is None else f"best {reached.error:.1e}"
        return Run(name, None, note=f"{error:.0e} not reached, {best}")

    def work() -> Tensor:
        with torch.no_grad():
            return reached.inverse(targets)

    return Run(name, work, lambda: reached.numbers)


def of_trained_blocks(settings: Settings) -> list[Case]:
    """Return the cases of trained blocks in both precisions."""
    return [
        _trained_case(features, batch, error, dtype)
        for error, dtype in ((1e-5, torch.float32), (1e-6, torch.float64))
        for features, batch in ((2, 256), (2, 8192), (64, 256))
    ]


def _trained_case(features: int, batch: int, error: float, dtype: torch.dtype) -> Case:
    def prepare(settings: Settings) -> list[Run]:
        return _runs(trained_problem(features, batch, settings, dtype), error)

    precision = str(dtype).removeprefix("torch.")
    label = f"d={features} B={batch} error<={error:.0e} {precision}"
    parameters = {"d": features, "B": batch, "error": error}
    return Case(label, parameters, partial(measure_runs, prepare))


def over_the_bound(settings: Settings) -> list[Case]:
    """Return the cases of linear maps whose eigenvalues fill [-L, 0]."""
    bounds = (0.5, 0.9, 0.97) if settings.quick else (0.5, 0.8, 0.9, 0.97, 0.99, 0.997)
    return [_slowest_case(bound) for bound in bounds]


def _slowest_case(lipschitz: float) -> Case:
    def prepare(settings: Settings) -> list[Run]:
        seed_everything(settings.seed)
        net = SlowestMap(features=16, lipschitz=lipschitz).to(settings.device, torch.float64)
        return _runs(make_problem(net, net, torch.randn(64, 16).to(settings.device)), 1e-5)

    parameters = {"1/(1-L)": 1 / (1 - lipschitz)}
    return Case(f"L={lipschitz}", parameters, partial(measure_runs, prepare))


# --- the gradient of the inverse ------------------------------------------------------------------

_NORMFLOWS_DEFAULT = 1e-5
_UNROLLED_ERROR = 1e-5


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
    state = {
        name: value.detach().double().requires_grad_()
        for name, value in problem.plain.named_parameters()
    }

    def function(inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(problem.plain, state, inputs)
        return outputs

    _, jacobian = value_and_jacobian(function, problem.solution)
    identity = torch.eye(problem.solution.shape[1]).to(jacobian)
    adjoint = torch.linalg.solve((identity + jacobian).mT, cotangent.double())
    values = function(problem.solution)
    return _flat([adjoint, *torch.autograd.grad(values, list(state.values()), -adjoint)])


def with_gradients(settings: Settings) -> list[Case]:
    """Return the cases of our implicit gradient beside normflows' unrolled one."""
    return [_gradient_case(2, 256), _gradient_case(64, 256)]


def _gradient_case(features: int, batch: int) -> Case:
    def prepare(settings: Settings) -> list[Run]:
        problem = trained_problem(features, batch, settings, torch.float32)
        torch.manual_seed(settings.seed)
        cotangent = torch.randn(batch, features).to(problem.targets)
        truth = dense_gradient(problem, cotangent)
        return [
            _gradient_run(name, inverse, problem, cotangent, truth)
            for name, inverse in _inverses(problem).items()
        ]

    return Case.timed(prepare, d=features, B=batch)


def _inverses(problem: Problem) -> dict[str, Inverse | None]:
    solver = default_block().solver
    block = ResidualTransform(problem.plain, estimator=NoLogDet(), solver=solver)
    unrolled = reach(
        problem, problem.plain, normflows_inverse, normflows_tolerances(), _UNROLLED_ERROR
    )
    return {
        OURS: lambda targets: block.inverse(targets)[0],
        BASELINE: normflows_inverse(problem.plain, _NORMFLOWS_DEFAULT),
        "unrolled": unrolled.inverse if unrolled is not None and unrolled.is_reached else None,
    }


def _gradient_run(
    name: str, inverse: Inverse | None, problem: Problem, cotangent: Tensor, truth: Tensor
) -> Run:
    if inverse is None:
        return Run(name, None, note=f"error {_UNROLLED_ERROR:.0e} not reached")

    def work() -> tuple[Tensor, Tensor]:
        return pull_back(inverse, problem.plain, problem.targets, cotangent)

    def numbers() -> dict[str, float]:
        found, gradient = work()
        return {
            ERROR.key: problem.error(found),
            GRADIENT_ERROR.key: float((gradient.double() - truth).norm() / truth.norm()),
            MEMORY.key: peak_megabytes(work, problem.targets.device),
        }

    return Run(name, work, numbers)
