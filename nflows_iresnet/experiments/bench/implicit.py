"""The gradient of the inverse: implicit here, unrolled in normflows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nflows_iresnet.experiments.adapters import value_and_jacobian
from nflows_iresnet.experiments.bench.functions import NoLogDet
from nflows_iresnet.experiments.bench.items import (
    BASELINE,
    OURS,
    Case,
    Entrant,
    Figure,
    Item,
    Settings,
    Target,
)
from nflows_iresnet.experiments.bench.problems import (
    Inverse,
    Problem,
    normflows_inverse,
    normflows_tolerances,
    our_solver,
    reach,
    trained_problem,
)
from nflows_iresnet.experiments.bench.steps import MEMORY
from nflows_iresnet.experiments.evaluation import peak_megabytes
from nflows_iresnet.transforms import ResidualTransform

GRADIENT_ERROR = Figure("gradient_error", "gradient\nerror", ".1e")
ERROR = Figure("error", "error\nof x", ".1e", baseline=None)
NORMFLOWS_DEFAULT = 1e-5
UNROLLED_ERROR = 1e-5


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


def gradient_case(features: int, batch: int) -> Case:
    """Return the case of one dimension and one batch, float32 on the same frozen weights."""

    def enter(settings: Settings) -> list[Entrant]:
        problem = trained_problem(features, batch, settings, torch.float32)
        torch.manual_seed(settings.seed)
        cotangent = torch.randn(batch, features).to(problem.targets)
        truth = dense_gradient(problem, cotangent)
        return [
            _entrant(name, inverse, problem, cotangent, truth)
            for name, inverse in _inverses(problem).items()
        ]

    return Case(f"d={features} B={batch}", {"d": features, "B": batch}, enter)


def _inverses(problem: Problem) -> dict[str, Inverse | None]:
    block = ResidualTransform(problem.plain, estimator=NoLogDet(), solver=our_solver())
    unrolled = reach(
        problem, problem.plain, normflows_inverse, normflows_tolerances(), UNROLLED_ERROR
    )
    return {
        OURS: lambda targets: block.inverse(targets)[0],
        BASELINE: normflows_inverse(problem.plain, NORMFLOWS_DEFAULT),
        "unrolled": unrolled.inverse if unrolled is not None and unrolled.is_reached else None,
    }


def _entrant(
    name: str, inverse: Inverse | None, problem: Problem, cotangent: Tensor, truth: Tensor
) -> Entrant:
    if inverse is None:
        return Entrant(name, None, note=f"error {UNROLLED_ERROR:.0e} not reached")

    def work() -> tuple[Tensor, Tensor]:
        return pull_back(inverse, problem.plain, problem.targets, cotangent)

    def figures() -> dict[str, float]:
        found, gradient = work()
        return {
            ERROR.key: problem.error(found),
            GRADIENT_ERROR.key: float((gradient.double() - truth).norm() / truth.norm()),
            MEMORY.key: peak_megabytes(work, problem.targets.device),
        }

    return Entrant(name, work, figures)


def _cases(settings: Settings) -> list[Case]:
    return [gradient_case(2, 256), gradient_case(64, 256)]


IMPLICIT_GRADIENT = Item(
    "inverse and its gradient: ours, normflows' loop as it is, and the same loop run to 1e-5",
    _cases,
    figures=(ERROR, GRADIENT_ERROR, MEMORY),
    targets=(
        Target(
            "memory of the inverse's gradient, times less",
            8.0,
            lambda result: result.figure_ratio(OURS, MEMORY.key),
        ),
    ),
)
