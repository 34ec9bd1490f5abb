"""Residuals that are verified, errors that are bounded, failures that are loud."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nflows_iresnet import solvers

SOLVERS: dict[str, solvers.Solver] = {
    "picard": solvers.FixedPointIteration(),
    "anderson-1": solvers.Anderson(history=1),
    "anderson-2": solvers.Anderson(history=2),
    "anderson-5": solvers.Anderson(),
}


class Contraction:
    """x -> A x + b with a matrix of a given norm, and its fixed point."""

    def __init__(
        self, lipschitz: float, features: int = 6, dtype: torch.dtype = torch.float64
    ) -> None:
        torch.manual_seed(0)
        rotation, _ = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))
        self.matrix = (lipschitz * rotation).to(dtype)
        self.offset = torch.randn(5, features, dtype=torch.float64).to(dtype)
        identity = torch.eye(features, dtype=torch.float64)
        inverse = torch.linalg.inv(identity - self.matrix.double())
        self.fixed_point = self.offset.double() @ inverse.mT
        self.lipschitz = lipschitz

    def __call__(self, points: Tensor) -> Tensor:
        return points @ self.matrix.mT + self.offset


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("lipschitz", [0.0, 0.5, 0.97, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_bounded_by_the_verified_residual(
    solver: solvers.Solver, lipschitz: float, dtype: torch.dtype
) -> None:
    problem = Contraction(lipschitz, dtype=dtype)
    solution = solver(problem, torch.zeros_like(problem.offset), lipschitz)
    residual = torch.linalg.vector_norm(problem(solution.value) - solution.value, dim=1)
    assert bool(solution.converged.all())
    assert torch.equal(residual, solution.residual)
    error = torch.linalg.vector_norm(solution.value.double() - problem.fixed_point, dim=1)
    assert bool((error <= solution.error_bound(lipschitz)).all())


@pytest.mark.parametrize("lipschitz", [0.9, 0.97])
def test_the_inverse_of_minus_l_times_x_is_found(lipschitz: float) -> None:
    targets = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for solver in SOLVERS.values():
        solution = solver(lambda x: targets + lipschitz * x, targets)
        error = (solution.value - targets / (1 - lipschitz)).norm(dim=1)
        assert bool((error <= solution.error_bound(lipschitz)).all())


def test_the_tolerance_that_is_asked_for_is_kept() -> None:
    problem = Contraction(0.9)
    for atol in (1e-3, 1e-8):
        solution = solvers.Anderson(atol=atol, rtol=0.0)(problem, problem.offset)
        assert bool((solution.residual <= atol).all())
    loose = solvers.FixedPointIteration(atol=1e-3)(problem, problem.offset)
    tight = solvers.FixedPointIteration(atol=1e-10)(problem, problem.offset)
    assert bool((loose.num_steps < tight.num_steps).all())


def test_anderson_needs_fewer_steps() -> None:
    problem = Contraction(0.97)
    plain = solvers.FixedPointIteration()(problem, problem.offset)
    accelerated = solvers.Anderson(history=5)(problem, problem.offset)
    assert int(accelerated.num_steps.max()) < int(plain.num_steps.min()) / 2


def test_rows_are_solved_as_if_alone() -> None:
    problem = Contraction(0.9)
    together = solvers.Anderson()(problem, problem.offset)
    offset = problem.offset[:1]
    alone = solvers.Anderson()(lambda x: x @ problem.matrix.mT + offset, offset)
    torch.testing.assert_close(alone.value, together.value[:1], rtol=0, atol=1e-11)
    assert int(alone.num_steps[0]) == int(together.num_steps[0])


def test_a_row_that_stalls_does_not_stop_the_others() -> None:
    """Row 0 hovers at a noisy floor; row 1 needs thousands of steps."""
    noise = iter(range(100_000))

    def mapping(points: Tensor) -> Tensor:
        wobble = 1e-3 * (1 + next(noise) % 2)
        return torch.stack([points[0] + wobble, 0.995 * points[1]])

    with pytest.raises(solvers.FixedPointNotConverged, match="1 of 2 rows") as caught:
        solvers.FixedPointIteration()(mapping, torch.tensor([[0.0], [1e3]]))
    assert caught.value.solution.converged.tolist() == [False, True]


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_values_that_are_not_finite_raise(solver: solvers.Solver) -> None:
    for bad in (math.nan, math.inf):
        targets = torch.tensor([[1.0, bad], [0.0, 0.0]])
        with pytest.raises(solvers.FixedPointNotConverged, match="1 of 2 rows") as caught:
            solver(lambda x, y=targets: y + 0.5 * x, targets)  # type: ignore[misc]
        assert not bool(caught.value.solution.converged[0])


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_maps_that_do_not_contract_raise(solver: solvers.Solver) -> None:
    for without_fixed_point in (lambda x: x + 1, lambda x: 1 + 2 * x.abs()):
        with pytest.raises(solvers.FixedPointNotConverged, match=r"Lip\(g\)|not finite"):
            solver(without_fixed_point, torch.full((2, 2), 5.0))


def test_too_few_steps_raise_and_keep_the_best_point() -> None:
    problem = Contraction(0.97)
    with pytest.raises(solvers.FixedPointNotConverged, match="after 12 steps") as caught:
        solvers.FixedPointIteration(max_steps=12)(problem, problem.offset)
    solution = caught.value.solution
    residual = torch.linalg.vector_norm(problem(solution.value) - solution.value, dim=1)
    torch.testing.assert_close(residual, solution.residual)


def test_a_tolerance_below_rounding_raises_with_advice() -> None:
    problem = Contraction(0.9, dtype=torch.float32)
    with pytest.raises(solvers.FixedPointNotConverged, match="double"):
        solvers.Anderson(atol=1e-12, rtol=0.0)(problem, problem.offset)


def test_no_graph_is_built_and_the_guess_is_not_changed() -> None:
    problem = Contraction(0.5)
    guess = problem.offset.clone().requires_grad_()
    solution = solvers.Anderson()(problem, guess)
    assert not solution.value.requires_grad
    assert torch.equal(guess.detach(), problem.offset)


def test_images_and_empty_batches_keep_their_shape() -> None:
    guess = torch.zeros(2, 3, 4, 4)
    assert solvers.Anderson()(lambda x: 0.5 * x + 1, guess).value.shape == guess.shape
    assert solvers.Anderson()(lambda x: 0.5 * x, torch.zeros(0, 3)).value.shape == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"atol": -1e-3}, "atol"),
        ({"rtol": -1.0}, "rtol"),
        ({"atol": math.nan}, "atol"),
        ({"atol": 0.0, "rtol": 0.0}, "both"),
        ({"max_steps": 0}, "max_steps"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    for solver in (solvers.FixedPointIteration, solvers.Anderson):
        with pytest.raises(ValueError, match=message):
            solver(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="history"):
        solvers.Anderson(history=0)
    with pytest.raises(ValueError, match="Lipschitz"):
        solvers.Anderson()(lambda x: x * 0, torch.zeros(1, 1)).error_bound(1.0)


def test_the_banach_rate_of_plain_iteration() -> None:
    """After n steps the error is at most L^n / (1 - L) times the first step."""
    problem, start = Contraction(0.9), torch.zeros(5, 6, dtype=torch.float64)
    point, first_step = start, torch.linalg.vector_norm(problem(start) - start, dim=1)
    for step in range(1, 60):
        point = problem(point)
        error = torch.linalg.vector_norm(point - problem.fixed_point, dim=1)
        assert bool((error <= 0.9**step / 0.1 * first_step * (1 + 1e-9)).all())


@pytest.mark.parametrize("rtol", [0.0, 1e-6, 1e-2, 0.3, 0.6])
@pytest.mark.parametrize("atol", [1e-9, 1e-2, 1.0])
@pytest.mark.parametrize("known", [True, False])
def test_a_row_is_accepted_at_the_first_point_within_its_tolerance(
    rtol: float, atol: float, known: bool
) -> None:
    problem = Contraction(0.9)
    solver = solvers.FixedPointIteration(atol=atol, rtol=rtol)
    solution = solver(problem, problem.offset, 0.9 if known else None)
    point, first = problem.offset, torch.zeros(5, dtype=torch.int64)
    for step in range(1, 300):
        image = problem(point)
        tolerance = atol + rtol * (point.norm(dim=1) + image.norm(dim=1))
        is_within = (image - point).norm(dim=1) <= tolerance
        first = torch.where((first == 0) & is_within, step, first)
        point = image
    assert solution.num_steps.tolist() == first.tolist()


@pytest.mark.parametrize("history", [1, 2, 3])
def test_as_many_differences_as_dimensions_solve_a_linear_map(history: int) -> None:
    """Two evaluations give the first difference; each later one gives another."""
    problem = Contraction(0.97, features=history)
    solver = solvers.Anderson(history=history, atol=1e-9, rtol=0.0)
    solution = solver(problem, problem.offset)
    assert int(solution.num_steps.max()) <= history + 2


@pytest.mark.parametrize("history", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parallel_differences_do_no_harm(history: int, dtype: torch.dtype) -> None:
    """A map of rank one: from the second on, all differences point the same way."""
    direction = torch.nn.functional.normalize(torch.arange(1.0, 7.0, dtype=dtype), dim=0)
    offset = torch.linspace(-3, 5, 24, dtype=dtype).reshape(4, 6)
    solution = solvers.Anderson(history=history)(
        lambda x: offset - 0.97 * (x @ direction)[:, None].sin() * direction, offset, 0.97
    )
    assert int(solution.num_steps.max()) < 40


def test_rows_that_are_done_do_not_move_while_others_go_on() -> None:
    """The first row is a fixed point from the start."""
    problem = Contraction(0.97)
    start = problem.offset.clone()
    start[0] = problem.fixed_point[0]
    for solver in SOLVERS.values():
        solution = solver(problem, start, 0.97)
        assert torch.equal(solution.value[0], start[0])
        assert int(solution.num_steps[0]) == 1 < int(solution.num_steps[1:].min())


class Jump(solvers.Accelerator):
    """Proposes a point far away once, then plain steps from the best point."""

    has_jumped = False

    def propose(self, point: Tensor, image: Tensor, best: solvers.Progress) -> Tensor:
        plain = best.value + best.residual
        proposal = plain if self.has_jumped else torch.full_like(point, 1e9)
        self.has_jumped = True
        return proposal


class JumpingSolver(solvers.Solver):
    """A solver that tries what an extrapolation might."""

    def start(self, init: Tensor) -> solvers.Accelerator:
        return Jump()


def test_a_point_too_far_away_to_be_the_solution_is_none() -> None:
    """Rounding hides any residual of a point that is far enough."""
    for lipschitz in (0.5, None):
        solution = JumpingSolver()(
            lambda x: torch.where(x > 1e8, x, 0.5 * x + 1), torch.zeros(3, 2), lipschitz
        )
        torch.testing.assert_close(solution.value, torch.full((3, 2), 2.0), rtol=1e-5, atol=0)
