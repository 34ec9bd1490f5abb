"""Residuals that are verified, errors that are bounded, failures that are loud."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nflows_iresnet import flows, logdet, nn, solvers, transforms
from nflows_iresnet.linearization import Linearization
from nflows_iresnet.nn.mlp import MLPFunction
from nflows_iresnet.solvers.base import Progress, row_norm, steps_to_next_look
from tests import device

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
    torch.testing.assert_close(residual, solution.residual, rtol=1e-6, atol=0)
    error = torch.linalg.vector_norm(solution.value.double() - problem.fixed_point, dim=1)
    assert bool((error <= solution.error_bound(lipschitz)).all())


@pytest.mark.parametrize("lipschitz", [0.9, 0.97])
def test_the_inverse_of_minus_l_times_x_is_found(lipschitz: float) -> None:
    targets = torch.randn(4, 6, generator=device.generator(0))
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


@pytest.mark.usefixtures("values_are_seen")
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
        ({"atol": math.inf}, "atol"),
        ({"rtol": math.inf}, "rtol"),
        ({"first_look": 0}, "first_look"),
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


@pytest.mark.usefixtures("values_are_seen")
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


@pytest.mark.usefixtures("values_are_seen")
@pytest.mark.parametrize("history", [1, 2, 3])
def test_as_many_differences_as_dimensions_solve_a_linear_map(history: int) -> None:
    """Two evaluations give the first difference, each later one another; one more for rounding.

    The map is not conformal: of one that is, differences are orthogonal by themselves.
    """
    problem = Contraction(0.97, features=history)
    problem.matrix = problem.matrix * torch.linspace(1, 0.5, history, dtype=torch.float64)
    solver = solvers.Anderson(history=history, atol=1e-9, rtol=0.0)
    solution = solver(problem, problem.offset)
    assert int(solution.num_steps.max()) <= history + 3


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


@pytest.mark.usefixtures("values_are_seen")
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


# --- magnitudes: squares overflow above 1e19 (1e154 in float64) and vanish below 1e-19 (1e-154) ---

SCALES = [
    *(
        (torch.float32, float(f"1e{power}"))
        for power in (-37, -30, -22, -18, 0, 18, 19, 20, 30, 37)
    ),
    *((torch.float64, float(f"1e{power}")) for power in (-300, -160, -154, 0, 154, 160, 300)),
]
LAZY = {f"{name}-lazy": replace(solver, first_look=4) for name, solver in SOLVERS.items()}
ALL_SOLVERS = SOLVERS | LAZY


@pytest.mark.parametrize("solver", ALL_SOLVERS.values(), ids=ALL_SOLVERS)
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
@pytest.mark.parametrize("atol", [None, 0.0])
def test_rows_of_any_magnitude_are_solved_and_their_error_is_bounded(
    solver: solvers.Solver, dtype: torch.dtype, scale: float, atol: float | None
) -> None:
    problem = Contraction(0.7)
    matrix, offset = problem.matrix.to(dtype), (scale * problem.offset).to(dtype)
    inverse = torch.linalg.inv(torch.eye(6).double() - matrix.double())
    exact = (offset.double() / scale) @ inverse.mT
    solution = replace(solver, atol=atol)(lambda x: x @ matrix.mT + offset, offset, 0.7)
    error = (solution.value.double() / scale - exact).norm(dim=1)
    assert bool((error <= solution.error_bound(0.7).double() / scale * (1 + 1e-6)).all())
    if atol == 0.0:
        assert float(error.max()) < 1e5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("solver", ALL_SOLVERS.values(), ids=ALL_SOLVERS)
def test_a_guess_that_is_far_away_or_tiny_leads_to_the_solution(solver: solvers.Solver) -> None:
    problem = Contraction(0.7, dtype=torch.float32)
    guess = torch.full((5, 6), 1e30)
    guess[0], guess[1], guess[2] = 1e-30, 0.0, 1e37
    solution = solver(problem, guess, 0.7)
    error = (solution.value.double() - problem.fixed_point).norm(dim=1)
    assert bool((error <= solution.error_bound(0.7)).all())


@pytest.mark.parametrize("solver", ALL_SOLVERS.values(), ids=ALL_SOLVERS)
def test_a_row_of_another_magnitude_does_not_change_what_the_others_get(
    solver: solvers.Solver,
) -> None:
    offset = torch.linspace(-3, 5, 24).reshape(4, 6)
    mixed = torch.cat([offset, torch.full((1, 6), 1e25), torch.full((1, 6), 1e-30)])
    alone = solver(lambda x: offset - 0.5 * x.sin(), offset, 0.5)
    together = solver(lambda x: mixed - 0.5 * x.sin(), mixed, 0.5)
    torch.testing.assert_close(together.value[:4], alone.value, rtol=1e-6, atol=1e-6)
    assert bool(together.converged.all())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 2e19), (torch.float64, 2e154)])
def test_the_inverse_of_a_huge_point_is_verified(dtype: torch.dtype, size: float) -> None:
    """The scale overflowed, so that the tolerance was infinite and any point a solution."""
    torch.manual_seed(0)
    block = transforms.ResidualTransform(nn.LipschitzMLP(2, [32])).to(dtype)
    target = torch.tensor([[size, 0.0]], dtype=dtype)
    with torch.no_grad():
        found, _ = block.inverse(target)
        error = (block(found)[0] - target) / size
    assert float(error.abs().max()) < 8 * torch.finfo(dtype).eps


def test_what_overflows_is_refused() -> None:
    """The norm of the row itself is beyond float32."""
    target = torch.full((3, 64), 1.0)
    target[1] = 3e38
    for solver in ALL_SOLVERS.values():
        with pytest.raises(solvers.FixedPointNotConverged, match=r"1 of 3 rows \(1\).* not finite"):
            solver(lambda x: target - 0.5 * x, target, 0.5)


@pytest.mark.parametrize("solver", ALL_SOLVERS.values(), ids=ALL_SOLVERS)
def test_rows_that_are_not_finite_are_named(solver: solvers.Solver) -> None:
    target = torch.ones(9, 3)
    target[[1, 4], 0] = torch.tensor([math.nan, math.inf])
    with pytest.raises(solvers.FixedPointNotConverged, match=r"2 of 9 rows \(1, 4\).* not finite"):
        solver(lambda x: target + 0.5 * x, target)
    target[:] = math.nan
    with pytest.raises(
        solvers.FixedPointNotConverged, match=r"9 of 9 rows \(0, 1, 2, 3, 4, \.\.\."
    ):
        solver(lambda x: target + 0.5 * x, target)


def test_an_infinite_tolerance_accepts_nothing() -> None:
    one = torch.ones(2)
    solution = solvers.Solution(torch.ones(2, 3), one, torch.tensor([torch.inf, 2.0]), one.long())
    assert solution.converged.tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    kind = torch.finfo(dtype)
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=dtype)
    for scale in (1.0, 2.0 ** -math.floor(-math.log2(kind.tiny) - 4), kind.max / 16):
        torch.testing.assert_close(
            row_norm(rows * scale), scale * torch.tensor([5, 0], dtype=dtype)
        )
    assert row_norm(torch.tensor([[math.nan, 1.0]], dtype=dtype)).isnan().all()
    assert row_norm(torch.tensor([[math.inf, 1.0]], dtype=dtype)).isfinite().logical_not().all()
    assert row_norm(torch.zeros(0, 2, dtype=dtype)).shape == (0,)


def test_the_error_bound_of_images_has_one_number_per_row() -> None:
    target = torch.rand(4, 3, 2, 2)
    solution = solvers.Anderson()(lambda x: target - 0.5 * x, target, 0.5)
    assert solution.error_bound(0.5).shape == (4,)
    error = (solution.value - target / 1.5).flatten(1).norm(dim=1)
    assert bool((error <= solution.error_bound(0.5)).all())


# --- inside transforms of torch.func --------------------------------------------------------------


def _implicit(solver: solvers.Solver) -> Callable[[Tensor], Tensor]:
    return lambda target: solver(lambda x: 0.5 * x.sin() + target, target).value


@pytest.mark.parametrize("solver", ALL_SOLVERS.values(), ids=ALL_SOLVERS)
def test_mapped_solves_equal_a_loop_over_them(solver: solvers.Solver) -> None:
    """Rows of 0.1 to 100: some calls are done long before others."""
    torch.manual_seed(0)
    targets = torch.randn(4, 3, 6).double() * torch.logspace(-1, 2, 4).double()[:, None, None]
    solve = _implicit(solver)
    expected = torch.stack([solve(each) for each in targets])
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    close(torch.func.vmap(solve)(targets), expected)
    rows = torch.func.vmap(torch.func.vmap(lambda row: solve(row[None])[0]))(targets)
    close(rows, expected)
    last = torch.func.vmap(solve, in_dims=2, out_dims=2)(targets.permute(1, 2, 0))
    close(last, expected.permute(1, 2, 0))


@pytest.mark.parametrize("solver", ALL_SOLVERS.values(), ids=ALL_SOLVERS)
def test_a_guess_that_is_not_mapped_may_meet_a_map_that_is(solver: solvers.Solver) -> None:
    torch.manual_seed(0)
    target, weights = torch.randn(3, 6), torch.tensor([0.0, 0.3, 0.9])

    def solve(weight: Tensor) -> Tensor:
        return solver(lambda x: weight * x.sin() + target, target).value

    expected = torch.stack([solve(each) for each in weights])
    found = torch.func.vmap(solve)(weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ALL_SOLVERS.values(), ids=ALL_SOLVERS)
def test_mapped_solves_raise_where_one_fails(solver: solvers.Solver) -> None:
    targets, solve = torch.randn(4, 3, 6), _implicit(solver)
    targets[2, 1, 0] = math.nan
    with pytest.raises(solvers.FixedPointNotConverged, match=r"1 of 12 rows \(7\)") as caught:
        torch.func.vmap(solve)(targets)
    assert caught.value.solution.value.shape == (4, 3, 6)
    with pytest.raises(solvers.FixedPointNotConverged, match=r"3 of 6 rows|not finite"):
        torch.func.vmap(lambda slope: solver(lambda x: 1 + slope * x.abs(), targets[0]).value)(
            torch.tensor([0.5, 2.0])
        )


def test_solves_run_under_every_other_transform() -> None:
    """The solver records no gradient; that it runs is what the implicit derivative needs."""
    target = torch.randn(3, 6)
    for solver in ALL_SOLVERS.values():
        solve = _implicit(solver)
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            assert transform(solve)(target).shape == (3, 6, 3, 6)
            assert torch.func.vmap(transform(solve))(target[None]).shape == (1, 3, 6, 3, 6)


# --- looks at the residual ------------------------------------------------------------------------


@contextmanager
def counted_looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the calls that would make the host wait for a device, by the steps they come after."""
    steps: list[int] = []
    original = Progress.look

    def look(self: Progress, tolerance: Tensor, step: int) -> float:
        steps.append(step)
        return original(self, tolerance, step)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "look", look)
        yield steps


def test_the_next_look_is_where_the_end_is_predicted() -> None:
    assert [steps_to_next_look(10, needed) for needed in (0.0, 1.0, 1.2, 17.5)] == [1, 1, 2, 18]
    assert [steps_to_next_look(10, needed) for needed in (20.0, 1e9, math.inf)] == [20, 20, 20]
    assert [steps_to_next_look(10, needed) for needed in (math.nan, -3.0)] == [20, 20]


@pytest.mark.parametrize("solver", LAZY.values(), ids=LAZY)
def test_rare_looks_verify_what_they_accept(solver: solvers.Solver) -> None:
    for lipschitz in (0.0, 0.5, 0.97):
        problem = Contraction(lipschitz)
        solution = solver(problem, problem.offset, lipschitz)
        residual = (problem(solution.value) - solution.value).norm(dim=1)
        assert bool((residual <= solution.tolerance * (1 + 1e-9)).all())
        error = (solution.value - problem.fixed_point).norm(dim=1)
        assert bool((error <= solution.error_bound(lipschitz)).all())


@dataclass(frozen=True)
class Affine:
    """x -> rate x + offset."""

    rate: float
    offset: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        return self.rate * points + self.offset


def test_a_solve_at_a_steady_rate_is_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.linspace(-3, 5, 24).double().reshape(4, 6)
    for rate in (0.3, 0.5, 0.6):
        with counted_looks(monkeypatch) as steps:
            solver = solvers.FixedPointIteration(first_look=20)
            solution = solver(Affine(rate, target), target)
        every = solvers.FixedPointIteration()(Affine(rate, target), target)
        needed = int(every.num_steps.max())
        assert len(steps) <= 3
        assert needed <= steps[-1] <= max(20, needed + 3)
        assert int(solution.num_steps.max()) == steps[-1]


def test_sampling_six_blocks_looks_at_most_twelve_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many looks as a device waits for; blocks as steep as their certificate allows."""
    torch.manual_seed(0)
    flow = flows.ResidualFlow(4, 32, num_layers=6)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "net" in name:
                parameter.mul_(3)
    solver = solvers.Anderson(first_look=10)
    with (
        torch.no_grad(),
        transforms.using(flow, solver=solver),
        counted_looks(monkeypatch) as steps,
    ):
        flow.eval().sample(500)
    assert 0 < len(steps) <= 12


def test_rare_looks_leave_out_the_rows_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = transforms.ResidualTransform(
        nn.LipschitzMLP(8, [16]), solver=solvers.Anderson(first_look=3)
    )
    inputs = torch.randn(600, 8) * torch.logspace(-3, 1, 600)[:, None]
    with torch.no_grad(), counted_looks(monkeypatch) as steps:
        found, _ = block.inverse(block(inputs)[0])
    torch.testing.assert_close(found, inputs, rtol=1e-4, atol=1e-4)
    assert len(steps) <= 8


class Counted:
    """x -> c - A x row by row, each with its own rate; counts the rows that it was asked for."""

    def __init__(self, rates: Tensor, offset: Tensor, tally: list[int]) -> None:
        self.rates, self.offset, self.tally = rates, offset, tally

    def __call__(self, point: Tensor) -> Tensor:
        self.tally.append(len(point))
        return self.offset - self.rates[:, None] * point.sin()

    def select(self, selected: Tensor) -> Counted:
        return Counted(self.rates[selected], self.offset[selected], self.tally)


@pytest.mark.parametrize(
    "solver", [solvers.Anderson(), solvers.Anderson(history=1), solvers.FixedPointIteration()]
)
def test_rows_that_are_done_are_no_longer_evaluated(solver: solvers.Solver) -> None:
    torch.manual_seed(5)
    rates, offset = torch.linspace(0, 0.97, 1000).double(), torch.randn(1000, 4).double()
    selectable = Counted(rates, offset, [])
    everything = Counted(rates, offset, [])
    fast = solver(selectable, offset, 0.97)
    slow = solver(lambda point: everything(point), offset, 0.97)
    assert sum(selectable.tally) < 0.9 * sum(everything.tally)
    assert len(selectable.tally) == len(everything.tally)
    torch.testing.assert_close(fast.value, slow.value, rtol=0, atol=1e-10)
    torch.testing.assert_close(fast.num_steps, slow.num_steps)
    residual = torch.linalg.vector_norm(everything(fast.value) - fast.value, dim=1)
    torch.testing.assert_close(residual, fast.residual, rtol=1e-3, atol=1e-15)


def test_a_context_follows_its_rows_through_the_inverse() -> None:
    """Contexts of very different rows: a mix-up of rows would not invert."""
    torch.manual_seed(6)
    block = transforms.ResidualTransform(nn.LipschitzMLP(3, [16, 16], 2)).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(3)
    inputs, context = torch.randn(500, 3).double(), 5 * torch.randn(500, 2).double()
    outputs, logabsdet = block(inputs, context)
    found, inverse_logabsdet = block.inverse(outputs, context)
    torch.testing.assert_close(found, inputs, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet, rtol=0, atol=1e-8)


@pytest.mark.usefixtures("values_are_seen")
def test_terms_that_rounding_loses_are_not_computed() -> None:
    """Powers of a tiny Jacobian become subnormal, and products with those are very slow."""
    products: list[Tensor] = []

    class Tiny(torch.nn.Module):
        lipschitz = 0.9

        def bind(self, context: Tensor | None = None) -> TinyFunction:
            return TinyFunction()

    class TinyFunction(MLPFunction):
        def __init__(self) -> None:
            eye = 1e-6 * torch.eye(3)
            super().__init__([eye], [torch.zeros(3)], [], 0.9)

        def linearize(self, inputs: Tensor) -> Linearization:
            at = super().linearize(inputs)
            original = at.vjp

            def counted(cotangent: Tensor) -> Tensor:
                products.append(cotangent)
                return original(cotangent)

            at.vjp = counted  # type: ignore[method-assign]
            return at

    with torch.no_grad():
        _, logabsdet = logdet.PowerSeries(num_terms=100)(Tiny(), torch.zeros(4, 3))
    torch.testing.assert_close(logabsdet, torch.full((4,), 3e-6), rtol=1e-4, atol=0)
    assert len(products) < 20


@dataclass(frozen=True)
class ManyRows:
    """Half of the rows are done early; the others have residuals that do not fall in each step."""

    matrices: Tensor
    shift: Tensor

    def __call__(self, point: Tensor) -> Tensor:
        return (self.matrices @ point[:, :, None])[:, :, 0].sin() + self.shift

    def select(self, rows: Tensor) -> ManyRows:
        return ManyRows(self.matrices[rows], self.shift[rows])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "solver",
    [solvers.Anderson(), solvers.Anderson(history=2), solvers.FixedPointIteration()],
    ids=["anderson-5", "anderson-2", "plain"],
)
def test_rows_that_are_done_are_left_out_whatever_the_others_do(
    solver: solvers.Solver, seed: int
) -> None:
    torch.manual_seed(seed)
    matrices = torch.randn(200, 6, 6, dtype=torch.float64)
    matrices = 0.9 * matrices / torch.linalg.matrix_norm(matrices, ord=2)[:, None, None]
    matrices[:100] = 0.01 * torch.eye(6)
    fn = ManyRows(matrices, torch.randn(200, 6, dtype=torch.float64))
    solution = solver(fn, torch.zeros(200, 6, dtype=torch.float64), 0.9)
    torch.testing.assert_close(fn(solution.value), solution.value, rtol=0, atol=1e-10)
    assert int(solution.num_steps[:100].max()) < int(solution.num_steps[100:].max())


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("lipschitz", [None, 0.9])
def test_a_tolerance_that_is_given_is_never_exceeded(
    solver: solvers.Solver, lipschitz: float | None
) -> None:
    """Not where the iteration has stopped, and the bound would excuse what rounding leaves."""
    problem = Contraction(0.9, dtype=torch.float32)
    unreachable = replace(solver, atol=1e-12, rtol=0.0)
    with pytest.raises(solvers.FixedPointNotConverged) as caught:
        unreachable(problem, problem.offset, lipschitz)
    assert float(caught.value.solution.tolerance.max()) <= 1e-12


def test_a_norm_whose_squares_vanish_is_that_of_its_numbers() -> None:
    for small, dtype in ((1e-25, torch.float32), (1e-200, torch.float64)):
        rows = torch.full((2, 4), small, dtype=dtype)
        expected = torch.full((2,), 2 * small, dtype=dtype)
        torch.testing.assert_close(row_norm(rows), expected, rtol=1e-6, atol=0)


def test_as_many_differences_are_combined_as_were_asked_for() -> None:
    """In the plane two solve a linear map at once, one does not, and more there are none."""
    problem, steps = Contraction(0.97, features=2), {}
    for history in (1, 2, 5):
        found = solvers.Anderson(history=history)(problem, torch.zeros_like(problem.offset))
        steps[history] = int(found.num_steps.max())
    assert steps[1] > 2 * steps[2]
    assert steps[5] == steps[2] <= 6


class Scaled(torch.nn.Module):
    """g(x) = w x."""

    lipschitz = 0.9

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(-0.9, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.weight * inputs


@pytest.mark.parametrize("rtol", [None, 0.0])
@pytest.mark.parametrize("kind", [transforms.ResidualTransform, transforms.MonotoneTransform])
def test_a_tolerance_in_units_of_the_rows_is_none_of_gradients(kind: Any, rtol: Any) -> None:
    block = kind(Scaled(), solver=solvers.Anderson(atol=1.0, rtol=rtol), estimator=logdet.Exact())
    outputs = (1e5 * torch.randn(3, 1, dtype=torch.float64)).requires_grad_()
    inputs, _ = block.inverse(outputs)
    found, of_weight = torch.autograd.grad(inputs.sum(), [outputs, block.net.weight])
    slope = 10.0 if kind is transforms.ResidualTransform else 0.1 / 1.9
    torch.testing.assert_close(found, torch.full_like(found, slope), rtol=1e-3, atol=0)
    middle = 10.0 * outputs if kind is transforms.ResidualTransform else outputs / 1.9
    exact = -10 * middle.sum() if kind is transforms.ResidualTransform else 2 * middle.sum() / 1.9
    assert float(of_weight) == pytest.approx(float(exact.detach()), rel=1e-3)


def test_what_did_not_converge_can_be_copied_and_sent_to_other_processes() -> None:
    with pytest.raises(solvers.FixedPointNotConverged) as caught:
        solvers.FixedPointIteration(max_steps=2)(
            lambda x: 0.9 * x.cos(), torch.zeros(3, 2).double()
        )
    for copy in (deepcopy(caught.value), pickle.loads(pickle.dumps(caught.value))):
        assert str(copy) == str(caught.value)
        assert torch.equal(copy.solution.value, caught.value.solution.value)


def test_a_map_that_changes_the_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"must keep the shape of its inputs, \(4, 3\)"):
        solvers.FixedPointIteration()(lambda x: 0.5 * x[:, :1], torch.ones(4, 3))


@pytest.mark.parametrize("atol", [1e-7, 1e-3, None])
def test_a_tolerance_without_a_relative_part_has_gradients(atol: float | None) -> None:
    torch.manual_seed(0)
    block = transforms.ResidualTransform(
        nn.LipschitzMLP(2, [16]), solver=solvers.Anderson(atol=atol, rtol=0.0)
    )
    targets = (1e-3 * torch.randn(32, 2)).requires_grad_()
    (found,) = torch.autograd.grad(block.inverse(targets)[0].sum(), targets)
    plain = transforms.ResidualTransform(block.net)
    (expected,) = torch.autograd.grad(plain.inverse(targets)[0].sum(), targets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_finer_tolerance_than_the_default_counts_for_gradients_too() -> None:
    solver = solvers.Anderson(atol=1e-14, rtol=0.0).without_units(torch.float64)
    assert solver.atol == 1e-14
    assert solver.rtol is None


def test_rows_whose_loss_overflows_have_no_gradient_and_the_others_theirs() -> None:
    torch.manual_seed(0)
    block = transforms.ResidualTransform(nn.LipschitzMLP(2, [16])).double()
    targets = torch.randn(4, 2).double().requires_grad_()
    outputs = block.inverse(targets)[0]
    weights = torch.ones(4, 2).double()
    (expected,) = torch.autograd.grad(outputs, targets, weights, retain_graph=True)
    for bad in (torch.nan, torch.inf):
        weights[1, 0] = bad
        (found,) = torch.autograd.grad(outputs, targets, weights, retain_graph=True)
        assert bool(found[1].isnan().all())
        torch.testing.assert_close(found[[0, 2, 3]], expected[[0, 2, 3]])


def test_gradients_in_batches_through_a_solver_are_refused_with_the_remedy() -> None:
    block = transforms.ResidualTransform(nn.LipschitzMLP(2, [16]))
    targets = torch.randn(4, 2).requires_grad_()
    values = block.inverse(targets)[0].sum(1)
    with pytest.raises(ValueError, match=r"do not go through a solver: .* torch\.func\.jacrev"):
        torch.autograd.grad(values, targets, torch.eye(4), is_grads_batched=True)
