"""The inverse, timed at the loosest tolerance whose true error is small enough."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nflows_iresnet.experiments.bench.functions import SlowestMap
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
    Reached,
    make_problem,
    normflows_inverse,
    normflows_tolerances,
    our_inverse,
    our_solver,
    our_tolerances,
    reach,
    trained_problem,
)
from nflows_iresnet.experiments.bench.steps import our_speed
from nflows_iresnet.solvers import FixedPointIteration
from nflows_iresnet.training import seed_everything

ERROR = Figure("error", "true\nerror", ".1e", baseline=None)
EVALUATIONS = Figure("evaluations", "evalu-\nations", ".1f")
TOLERANCE = Figure("tolerance", "toler-\nance", ".0e", baseline=None)


def race_to(problem: Problem, error: float) -> list[Entrant]:
    """Return the contestants, each at the loosest tolerance that reaches an error."""
    found = {
        OURS: reach(problem, problem.net, our_inverse(our_solver()), our_tolerances(), error),
        "ours-picard": reach(
            problem, problem.net, our_inverse(FixedPointIteration()), our_tolerances(), error
        ),
        BASELINE: reach(problem, problem.plain, normflows_inverse, normflows_tolerances(), error),
    }
    return [_entrant(name, reached, problem.targets, error) for name, reached in found.items()]


def _entrant(name: str, reached: Reached | None, targets: Tensor, error: float) -> Entrant:
    if reached is None or not reached.is_reached:
        best = "no result" if reached is None else f"best {reached.error:.1e}"
        return Entrant(name, None, note=f"{error:.0e} not reached, {best}")
    return Entrant(name, _without_graph(reached.inverse, targets), lambda: reached.figures)


def _without_graph(inverse: Inverse, targets: Tensor) -> Callable[[], object]:
    def work() -> Tensor:
        with torch.no_grad():
            return inverse(targets)

    return work


def inverse_case(features: int, batch: int, error: float, dtype: torch.dtype) -> Case:
    """Return the case of one dimension, one batch and one error."""

    def enter(settings: Settings) -> list[Entrant]:
        return race_to(trained_problem(features, batch, settings, dtype), error)

    precision = str(dtype).removeprefix("torch.")
    label = f"d={features} B={batch} error<={error:.0e} {precision}"
    parameters = {"d": features, "B": batch, "error": error}
    return Case(label, parameters, enter)


def _cases(settings: Settings) -> list[Case]:
    tasks = [(2, 256), (2, 8192), (64, 256)]
    single, double = torch.float32, torch.float64
    cases = [inverse_case(features, batch, 1e-5, single) for features, batch in tasks]
    return cases + [inverse_case(features, batch, 1e-6, double) for features, batch in tasks]


INVERSE = Item(
    "inverse of a trained block with the bound 0.97, to a verified true error (1e-6 in float64)",
    _cases,
    figures=(ERROR, EVALUATIONS, TOLERANCE),
    targets=(Target("inverse, times faster", 3.0, our_speed, lambda p: p["error"] < 2e-6),),
)


def slowest_case(lipschitz: float) -> Case:
    """Return the case of a linear map whose eigenvalues fill [-lipschitz, 0]."""

    def enter(settings: Settings) -> list[Entrant]:
        seed_everything(settings.seed)
        net = SlowestMap(features=16, lipschitz=lipschitz).to(settings.device, torch.float64)
        return race_to(make_problem(net, net, torch.randn(64, 16).to(settings.device)), 1e-5)

    return Case(f"L={lipschitz}", {"1/(1-L)": 1 / (1 - lipschitz)}, enter)


def _slowest_cases(settings: Settings) -> list[Case]:
    bounds = (0.5, 0.9, 0.97) if settings.quick else (0.5, 0.8, 0.9, 0.97, 0.99, 0.997)
    return [slowest_case(bound) for bound in bounds]


INVERSE_SCALING = Item(
    "evaluations of the inverse over the bound: a linear map that attains it, error <= 1e-5",
    _slowest_cases,
    figures=(ERROR, EVALUATIONS, TOLERANCE),
    variable="1/(1-L)",
    fitted=EVALUATIONS.key,
)
