"""Toy densities integrate to one, sample what they say, and name what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nflows_iresnet import datasets
from nflows_iresnet.datasets import curves

NAMES = list(datasets.TOYS)
HALF_WIDTHS = {"moons": 5, "8-gaussians": 6, "checkerboard": 4, "pinwheel": 6, "two-spirals": 4}
CELLS_PER_UNIT, POINTS_PER_CELL = 2, 10


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=NAMES)
def mass(request: pytest.FixtureRequest) -> tuple[str, Tensor, Tensor]:
    """Probability [cells, cells] and expected surprise of each cell, by the midpoint rule."""
    name = request.param
    width, step = HALF_WIDTHS.get(name, 5), 1 / (CELLS_PER_UNIT * POINTS_PER_CELL)
    axis = torch.arange(-width + step / 2, width, step, dtype=torch.float64)
    nats = -datasets.TOYS[name].log_prob(torch.cartesian_prod(axis, axis))
    probability = (-nats).exp() * step**2
    surprise = torch.where(probability > 0, probability * nats, 0.0)
    return name, _per_cell(probability), _per_cell(surprise)


def _per_cell(values: Tensor) -> Tensor:
    side = math.isqrt(len(values)) // POINTS_PER_CELL
    return values.reshape(side, POINTS_PER_CELL, side, POINTS_PER_CELL).sum(dim=(1, 3))


def _counts(points: Tensor, side: int) -> Tensor:
    cells = ((points.double() * CELLS_PER_UNIT).floor() + side / 2).long().clamp(0, side - 1)
    return torch.bincount(cells[:, 0] * side + cells[:, 1], minlength=side**2).double()


def test_density_integrates_to_one(mass: tuple[str, Tensor, Tensor]) -> None:
    name, probability, _ = mass
    assert probability.sum().item() == pytest.approx(1, abs=1e-9), name


def test_sampler_draws_from_the_density(mass: tuple[str, Tensor, Tensor]) -> None:
    name, probability, _ = mass
    num_samples = 40_000
    counts = _counts(datasets.TOYS[name].sample(num_samples), len(probability))
    expected = num_samples * probability.flatten()
    common = expected >= 5
    deviations = (counts - expected)[common].square() / expected[common]
    degrees = int(common.sum())
    assert abs(deviations.sum().item() - degrees) < 7 * math.sqrt(2 * degrees)
    rare = expected[~common].sum().item()
    assert abs(counts[~common].sum().item() - rare) <= 6 * math.sqrt(rare) + 12


def test_entropy_is_within_its_standard_error(mass: tuple[str, Tensor, Tensor]) -> None:
    name, _, surprise = mass
    value, standard_error = datasets.TOYS[name].entropy(10_000)
    assert abs(value - surprise.sum().item()) <= 6 * standard_error + 1e-9
    assert standard_error < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_global_seed_and_generator_reproduce_samples(name: str) -> None:
    density = datasets.TOYS[name]
    draws = [density.sample(9, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    state = torch.manual_seed(1).get_state()
    first = density.sample(9)
    torch.set_rng_state(state)
    assert torch.equal(first, density.sample(9))
    assert not torch.equal(first, density.sample(9))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_samples", [0, 1, 5])
def test_shapes_and_dtypes(name: str, num_samples: int) -> None:
    density = datasets.TOYS[name]
    points = density.sample(num_samples)
    assert (points.shape, points.dtype) == ((num_samples, 2), torch.float32)
    for dtype in (torch.float32, torch.float64):
        nats = density.log_prob(points.to(dtype))
        assert (nats.shape, nats.dtype) == ((num_samples,), dtype)
        assert nats.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "checkerboard"])
def test_score_is_the_gradient(name: str) -> None:
    with torch.inference_mode():
        datasets.TOYS[name].log_prob(torch.zeros(1, 2))
    points = datasets.TOYS[name].sample(3).double().requires_grad_()
    assert torch.autograd.gradcheck(datasets.TOYS[name].log_prob, points)


@pytest.mark.parametrize("density", [datasets.Moons(), datasets.TwoSpirals()])
def test_quadrature_has_converged(
    density: curves.MirroredCurve, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = torch.rand(500, 2, dtype=torch.float64) * 10 - 5
    values = density.log_prob(near)
    monkeypatch.setattr(curves, "_NODES_PER_PANEL", 64)
    curves._rule.cache_clear()
    torch.testing.assert_close(values, density.log_prob(near), rtol=0, atol=1e-10)
    curves._rule.cache_clear()


def test_circles_agree_with_a_sum_over_points_of_the_circle() -> None:
    points = torch.rand(50, 2, dtype=torch.float64) * 8 - 4
    angle = torch.arange(2000, dtype=torch.float64) * (2 * math.pi / 2000)
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    centres = torch.cat([1.5 * circle, 3.0 * circle])
    exponents = -torch.cdist(points, centres).square() / (2 * 0.24**2)
    expected = exponents.logsumexp(dim=1) - math.log(4000 * 2 * math.pi * 0.24**2)
    torch.testing.assert_close(datasets.Circles().log_prob(points), expected)


def test_moons_lie_where_scikit_learn_puts_them() -> None:
    sklearn = pytest.importorskip("sklearn.datasets", reason="compares with scikit-learn")
    ridge = 2 * torch.from_numpy(sklearn.make_moons(50)[0]) - torch.tensor([1.0, 0.5])
    typical = -math.log(4 * math.pi) - math.log(0.2 * math.sqrt(2 * math.pi))
    assert (datasets.Moons().log_prob(ridge) - typical).abs().max() < math.log(2) + 0.1


def test_checkerboard_is_uniform_on_half_of_its_square() -> None:
    board = datasets.Checkerboard()
    points = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-3.0, 1.0], [5.0, 1.0]], dtype=torch.float64)
    inside = -math.log(32)
    assert board.log_prob(points).tolist() == [inside, -math.inf, inside, -math.inf]
    assert board.log_prob(board.sample(100_000)).isfinite().all()
    assert board.log_prob(board.sample(10_000).bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: datasets.Moons(noise=0.0), "noise must be positive and finite, got 0.0"),
        (lambda: datasets.TwoSpirals(noise=math.nan), "noise .* got nan"),
        (lambda: datasets.Circles(inner=-1.0), "inner .* got -1.0"),
        (lambda: datasets.EightGaussians(radius=math.inf), "radius .* got inf"),
        (lambda: datasets.Pinwheel(num_arms=0), "num_arms must be a positive integer, got 0"),
        (lambda: datasets.Moons().sample(-1), "num_samples must be at least 0, got -1"),
        (lambda: datasets.Moons().entropy(1), "num_samples must be at least 2, got 1"),
        (lambda: datasets.Moons().log_prob(torch.zeros(2)), r"shape \(N, 2\), got \(2,\)"),
        (lambda: datasets.Moons().log_prob(torch.zeros(2, 3)), r"got \(2, 3\)"),
        (lambda: datasets.Moons().log_prob(torch.zeros(2, 2).int()), "floating-point"),
        (lambda: datasets.make("mooons"), "did you mean 'moons'"),
        (lambda: datasets.make("moons", num_test=0), "num_test must be at least 1"),
        (lambda: datasets.load("pin-wheel"), "did you mean 'pinwheel'.* Known: moons, .*magic"),
        (lambda: datasets.load("absent.csv"), r"no file absent\.csv \(looked for /"),
        (lambda: datasets.load("moons", num_samples=9), "moons has 9 rows: give at least 10"),
        (lambda: datasets.load("digits", num_samples=1798), "can give 10 to 1797 rows"),
        (lambda: datasets.load("digits", num_samples=-5), "num_samples=-5"),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", NAMES)
def test_toys_load_with_their_density(name: str) -> None:
    dataset = datasets.load(name, num_samples=100, seed=3)
    again = datasets.load(name, num_samples=100, seed=3)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [80, 10, 10]
    assert torch.equal(dataset.train, again.train)
    assert not torch.equal(dataset.train[:10], dataset.test)
    assert not torch.equal(dataset.train, datasets.load(name, num_samples=100, seed=4).train)
    assert dataset.density is datasets.TOYS[name]
    assert torch.equal(dataset.to_original(dataset.test), dataset.test.double())
    assert (dataset.seed, dataset.log_scale, dataset.features) == (3, 0.0, 2)


def test_every_name_is_described() -> None:
    assert list(datasets.available()) == [*NAMES, "digits", "casp", "magic"]
