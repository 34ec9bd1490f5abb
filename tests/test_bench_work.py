"""What `nflows-iresnet bench` measures: contestants, problems with a known solution, scatter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nflows_iresnet.compare.bench import accuracy, imagesteps, implicit, problems, quality, steps
from nflows_iresnet.compare.bench.contestants import (
    CONTESTANTS,
    Model,
    PlainNet,
    Size,
    contestants_for,
)
from nflows_iresnet.compare.bench.functions import Counted, FrozenNet, SlowestMap
from nflows_iresnet.compare.bench.items import (
    BASELINE,
    FLOOR,
    OURS,
    Settings,
)
from nflows_iresnet.nn import LipschitzMLP
from nflows_iresnet.solvers import FixedPointIteration

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

TINY = Settings(quick=True, repeats=2)


# --- contestants and problems ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if CONTESTANTS[name].is_available])
def test_every_contestant_takes_steps(name: str) -> None:
    assert_takes_steps(CONTESTANTS[name].build(Size(3, 8)), torch.randn(16, 3))


def assert_takes_steps(model: Model, rows: torch.Tensor) -> None:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = steps.training_step(model, iter([rows, rows]), learning_rate=0.1)
    step()
    step()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert any(changed)
    assert model.log_prob(rows).shape == (len(rows),)


def test_floor_has_the_widths_of_ours() -> None:
    def shapes(module: Any) -> list[torch.Size]:
        return sorted(p.shape for p in module.parameters() if p.dim() == 2)

    ours, plain = (CONTESTANTS[name].build(Size(5, 16)) for name in (OURS, FLOOR))
    assert isinstance(plain, PlainNet)
    assert shapes(plain) == shapes(ours)


def test_exact_jacobians_that_nobody_can_afford_are_left_out() -> None:
    assert "ours-exact" in contestants_for(Size(2, 64), 8192)
    assert "ours-exact" not in contestants_for(Size(512, 512), 128)
    assert list(contestants_for(Size(2, 8), 1, (FLOOR, OURS))) == [OURS, FLOOR]


def frozen_problem(dtype: torch.dtype = torch.float64) -> problems.Problem:
    torch.manual_seed(0)
    net = LipschitzMLP(3, [16, 16]).to(dtype)
    return problems.make_problem(net, FrozenNet(net), torch.randn(20, 3))


def test_frozen_net_is_the_same_function() -> None:
    problem = frozen_problem()
    assert isinstance(problem.plain, FrozenNet)
    inputs = torch.randn(7, 3, dtype=torch.float64)
    expected = problem.net(inputs)
    assert torch.allclose(problem.plain(inputs), expected, atol=1e-12)
    assert torch.allclose(problem.plain.bind()(inputs), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_problem_knows_its_solution(dtype: torch.dtype) -> None:
    problem = frozen_problem(dtype)
    exact = copy.deepcopy(problem.plain).double()
    images = problem.solution + exact(problem.solution)
    assert torch.allclose(images, problem.targets.double(), rtol=0, atol=1e-13)
    assert problem.error(problem.solution + 1e-3) == pytest.approx(1e-3 * math.sqrt(3))


@pytest.mark.parametrize(
    ("inverse_at", "tolerances"),
    [
        (problems.our_inverse(problems.our_solver()), problems.our_tolerances),
        (problems.our_inverse(FixedPointIteration()), problems.our_tolerances),
        (problems.normflows_inverse, problems.normflows_tolerances),
    ],
    ids=["ours", "picard", "normflows"],
)
def test_reach_finds_the_loosest_tolerance(
    inverse_at: problems.InverseAt, tolerances: Callable[[], Any]
) -> None:
    net = SlowestMap(6, 0.8).double()
    problem = problems.make_problem(net, net, torch.randn(10, 6))
    found = problems.reach(problem, net, inverse_at, tolerances(), to=1e-5)
    assert found is not None
    assert found.is_reached
    assert problem.error(found.inverse(problem.targets)) == found.error <= 1e-5
    looser = [value for value in tolerances() if value > found.tolerance]
    errors = [problem.error(inverse_at(net, value)(problem.targets)) for value in looser]
    assert all(error > 1e-5 for error in errors)
    assert found.evaluations >= 2


def test_what_cannot_be_reached_is_said() -> None:
    net = SlowestMap(6, 0.9)
    problem = problems.make_problem(net, net, torch.randn(10, 6))
    found = problems.reach(problem, net, problems.normflows_inverse, iter([1e-5, 1e-6]), to=1e-30)
    assert found is not None
    assert not found.is_reached


def test_counted_counts_rows() -> None:
    counted = Counted(SlowestMap(2, 0.5))
    counted(torch.zeros(3, 2))
    counted.bind()(torch.zeros(4, 2))
    counted.bind().select(slice(0, 1))(torch.zeros(1, 2))
    assert counted.rows == 8


def test_dense_gradient_is_that_of_the_implicit_function() -> None:
    problem = frozen_problem()
    cotangent = torch.randn(20, 3, dtype=torch.float64)
    inverse = problems.normflows_inverse(problem.plain, 1e-14)
    found, gradient = implicit.pull_back(inverse, problem.plain, problem.targets, cotangent)
    assert problem.error(found) < 1e-6
    truth = implicit.dense_gradient(problem, cotangent)
    assert torch.allclose(gradient, truth, rtol=1e-4, atol=1e-5)


def test_scatter_tells_bias_from_variance() -> None:
    values, gradient = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    truth = accuracy.Draw(values, gradient)
    draws = [
        accuracy.Draw(values + 0.5 + sign * 2, gradient * (1 + sign * 0.1)) for sign in (-1, 1)
    ]
    figures = accuracy.scatter(draws, truth)
    assert figures["value_std"] == pytest.approx(math.sqrt(8))
    assert figures["value_bias"] == pytest.approx(0.5)
    assert figures["gradient_mse"] == pytest.approx(0.01)
    assert "gradient_mse" not in accuracy.scatter([accuracy.Draw(values, None)] * 2, truth)


def test_estimates_agree_on_the_mean() -> None:
    """Every estimate, normflows' with its sign and direction, is of the same log-determinant."""
    net = LipschitzMLP(2, [8, 8], coeff=0.5)
    inputs = torch.randn(4000, 2)
    exact = accuracy.estimates(TINY)["ours-exact"](net, inputs).mean().detach()
    for name, estimate in accuracy.estimates(TINY).items():
        if name != BASELINE:  # whose default value is not that of the log-determinant
            values = estimate(net, inputs).detach()
            error = float(values.std()) / math.sqrt(len(values)) + 1e-6
            assert float(values.mean()) == pytest.approx(float(exact), abs=5 * error), name


def test_checkpoints_end_at_the_budget() -> None:
    times = quality.checkpoints(256.0)
    assert times[0] == pytest.approx(1.0)
    assert times[-1] == 256.0


def test_seconds_to_a_likelihood() -> None:
    curve = [(1.0, 5.0), (2.0, 3.0), (4.0, 3.5)]
    trainee = quality.Trainee("x", torch.nn.Module(), lambda: None, curve=curve)  # type: ignore[arg-type]
    assert trainee.best == 3.0
    assert trainee.seconds_to(4.0) == 2.0
    assert trainee.seconds_to(2.0) is None
    trainee.curve.insert(0, (0.5, math.nan))
    assert trainee.best == 3.0


@pytest.mark.parametrize("name", imagesteps.BUILDERS)
def test_every_contestant_takes_steps_on_images(name: str) -> None:
    size = imagesteps.ImageSize(channels=2, pixels=4, hidden=4)
    assert_takes_steps(imagesteps.BUILDERS[name](size), torch.randn(3, *size.shape))


def test_kernels_of_all_image_contestants_have_the_same_shapes() -> None:
    size = imagesteps.ImageSize(channels=2, pixels=4, hidden=4)
    shapes = {
        name: sorted(p.shape for p in build(size).parameters() if p.dim() == 4)
        for name, build in imagesteps.BUILDERS.items()
    }
    assert shapes[OURS] == shapes[BASELINE] == shapes[FLOOR]
    assert len(shapes[OURS]) == 6
