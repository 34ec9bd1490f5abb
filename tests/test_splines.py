"""The spline of each feature: against nflows' own, at its limits, and what it is for."""

from __future__ import annotations

import math
import os
from copy import deepcopy
from pathlib import Path
from typing import get_args

import pytest
import torch
from nflows.transforms.splines import rational_quadratic_spline
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.utils import prune

from nflows_iresnet import flows, transforms
from nflows_iresnet.experiments.bench.steps import counted_operations
from nflows_iresnet.transforms import splines as marginal
from nflows_iresnet.transforms.rational_quadratic import MAX_LOG_SLOPE, MIN_SIZE, differentiable
from nflows_iresnet.transforms.splines import Initialization

Spline = transforms.ElementwiseRationalQuadraticSpline

BOUND = 3.0


def random_spline(dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Spline:
    torch.manual_seed(7)
    spline = Spline(4, num_bins=5, bound=BOUND).to(dtype)
    for parameter in spline.parameters():
        nn.init.normal_(parameter, std=spread)
    return spline


def spline_of_nflows(spline: Spline, inputs: Tensor) -> tuple[Tensor, Tensor]:
    smallest = MIN_SIZE / 5
    slopes = MAX_LOG_SLOPE * (spline.log_slopes / MAX_LOG_SLOPE).tanh()
    slopes = nn.functional.pad(slopes.exp(), (1, 1), value=1.0)
    rows = [each.expand(len(inputs), *each.shape) for each in (*spline.sizes, slopes.expm1().log())]
    outputs, logabsdet = rational_quadratic_spline(
        inputs,
        *rows,
        left=-BOUND,
        right=BOUND,
        bottom=-BOUND,
        top=BOUND,
        min_bin_width=smallest,
        min_bin_height=smallest,
        min_derivative=0.0,
    )
    return outputs, logabsdet.sum(1)


def test_it_is_the_spline_of_nflows_between_the_bounds() -> None:
    spline = random_spline()
    inputs = BOUND * (2 * torch.rand(500, 4, dtype=torch.float64) - 1)
    for ours, theirs in zip(spline(inputs), spline_of_nflows(spline, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_beyond_the_bounds_it_is_the_identity() -> None:
    spline = random_spline()
    inputs = torch.tensor([[BOUND, -BOUND, 50.0, -1e6]], dtype=torch.float64)
    for direction in (spline, spline.inverse):
        outputs, logabsdet = direction(inputs)
        torch.testing.assert_close(outputs, inputs)
        assert logabsdet.item() == pytest.approx(0, abs=1e-12)


def test_its_density_has_no_jump_at_knots_and_bounds() -> None:
    spline = random_spline()
    knots = spline._knots()[0].T.detach()
    below, above = (spline(knots + step)[1] for step in (-1e-11, 1e-11))
    torch.testing.assert_close(below, above, rtol=0, atol=1e-6)


def of_loss(spline: Spline, inputs: Tensor, *, by_twin: bool) -> list[Tensor]:
    """Return the outputs, and the gradients of every input of a nonlinear function of them."""
    moving = [inputs.clone().requires_grad_(), *spline.parameters()]
    inputs, sizes, log_slopes = moving
    values = differentiable(inputs, sizes, log_slopes, spline.bound) if by_twin else spline(inputs)
    loss = values[0].sin().sum() + values[1].pow(2).sum()
    return [*values, *torch.autograd.grad(loss, moving)]


@pytest.mark.parametrize("num_bins", [1, 2, 8])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_its_node_is_its_slow_twin(num_bins: int, spread: float) -> None:
    torch.manual_seed(3)
    spline = Spline(4, num_bins, bound=BOUND).double()
    for parameter in spline.parameters():
        nn.init.normal_(parameter, std=spread)
    ends = torch.tensor([[BOUND, -BOUND, BOUND + 1, -9.0]], dtype=torch.float64)
    inputs = torch.cat([BOUND * torch.randn(200, 4, dtype=torch.float64), ends])
    for found, wanted in zip(
        of_loss(spline, inputs, by_twin=False), of_loss(spline, inputs, by_twin=True), strict=True
    ):
        size = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * size)


def test_its_derivatives_are_right_to_the_second_and_inside_transforms() -> None:
    spline = random_spline()
    inputs = torch.tensor([[0.3, -1.2, 2.1, -4.0]], dtype=torch.float64)

    def outputs(values: Tensor, sizes: Tensor, log_slopes: Tensor) -> tuple[Tensor, Tensor]:
        moved = {"sizes": sizes, "log_slopes": log_slopes}
        found = torch.func.functional_call(spline, moved, (values,))
        return found[0], found[1]

    moving = [each.detach().requires_grad_() for each in (inputs, *spline.parameters())]
    assert torch.autograd.gradcheck(outputs, moving)
    assert torch.autograd.gradgradcheck(outputs, moving)
    rows = BOUND * torch.rand(5, 4, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda row: spline(row[None])[0][0])
    slopes = torch.func.vmap(jacobian)(rows).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(slopes.log().sum(1), spline(rows)[1])
    forward = torch.func.vmap(torch.func.jacfwd(lambda row: spline(row[None])[0][0]))(rows)
    torch.testing.assert_close(forward, torch.func.vmap(jacobian)(rows))


def test_only_what_is_wanted_is_differentiated_twice() -> None:
    spline = random_spline().requires_grad_(False)
    inputs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(spline(inputs)[0].sum(), inputs, create_graph=True)
    torch.testing.assert_close(slopes.log().sum(1), spline(inputs)[1])
    assert slopes.requires_grad


def test_a_step_asks_for_hardly_more_than_a_hundred_operations() -> None:
    spline = random_spline(torch.float32)

    def step() -> None:
        inputs = torch.ones(8, 4, requires_grad=True)
        outputs, logabsdet = spline(inputs)
        (outputs.sum() - logabsdet.sum()).backward()

    assert counted_operations(step) < 125


@pytest.mark.parametrize("num_bins", [1, 8])
def test_it_starts_as_the_identity(num_bins: int) -> None:
    inputs = 3 * torch.randn(100, 2)
    for values in (
        Spline(2, num_bins),
        Spline(2).inverse,
    ):
        outputs, logabsdet = values(inputs)
        torch.testing.assert_close(outputs, inputs, rtol=0, atol=1e-5)
        torch.testing.assert_close(logabsdet, torch.zeros(100), rtol=0, atol=1e-5)


def test_the_float32_inverse_errs_no_more_than_rounding_explains() -> None:
    """Steep and flat bins: a change of y by its rounding moves x by that over the slope."""
    spline = random_spline(torch.float32, spread=2.0)
    inputs = BOUND * (2 * torch.rand(2000, 4) - 1)
    outputs, _ = spline(inputs)
    recovered, _ = spline.inverse(outputs)
    precise = random_spline(spread=2.0)
    precise.load_state_dict(spline.state_dict())
    slopes = precise(inputs.double().requires_grad_())[0]
    again = precise(recovered.double())[0]
    explained = 30 * torch.finfo(torch.float32).eps * BOUND
    is_near_in_x = (recovered - inputs).abs() < explained
    is_near_in_y = (again - slopes).abs() < explained
    assert bool((is_near_in_x | is_near_in_y).all())


def negative_log_likelihood(spline: Spline, rows: Tensor) -> Tensor:
    outputs, logabsdet = spline(rows)
    normal = 0.5 * outputs.square().sum(1) + 0.5 * math.log(2 * math.pi)
    return (normal - logabsdet).mean()


def learn(spline: Spline, rows: Tensor, steps: int) -> float:
    """With a learning rate that falls to zero: at a constant one the loss oscillates."""
    optimizer = torch.optim.Adam(spline.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        negative_log_likelihood(spline, rows).backward()
        optimizer.step()
        schedule.step()
    return negative_log_likelihood(spline, rows).item()


def test_it_learns_a_marginal_that_is_far_from_normal() -> None:
    """Seven tenths in [-1, -0.9], the others in [0, 2]; 2.2 nats above the optimum at first."""
    rows = torch.cat([torch.linspace(-1, -0.9, 1400), torch.linspace(0, 2, 600)])[:, None]
    optimal = -0.7 * math.log(0.7 / 0.1) - 0.3 * math.log(0.3 / 2)
    loss = learn(Spline(1, num_bins=16), rows, steps=300)
    assert optimal - 0.05 < loss < optimal + 0.35


def test_it_learns_its_slopes() -> None:
    """Rows from a spline of two equal bins that is steep between them; 0.8 nats above at first."""
    teacher = Spline(1, num_bins=2, bound=BOUND).double()
    nn.init.constant_(teacher.log_slopes, 2.0)
    quantiles = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    rows = teacher.inverse(torch.special.ndtri(quantiles))[0].detach()
    optimal = negative_log_likelihood(teacher, rows).item()
    loss = learn(
        Spline(1, num_bins=2, bound=BOUND).double(),
        rows,
        steps=150,
    )
    assert abs(loss - optimal) < 0.02


def splines(flow: nn.Module) -> list[Spline]:
    return [each for each in flow.modules() if isinstance(each, Spline)]


def test_the_preset_has_one_after_its_first_act_norm() -> None:
    flow = flows.ResidualFlow(2, 8, 2, context_features=1, marginal_bins=3)
    assert isinstance(flow._transform._transforms[1], Spline)
    assert [each.sizes.shape for each in splines(flow)] == [(2, 2, 3)]
    assert len(splines(flows.ResidualFlow(2, 8, 2))) == 1
    assert not splines(flows.ResidualFlow(2, 8, 2, marginal_bins=0))
    assert not splines(flows.InvertibleResNet(2, 8, 2))


@pytest.mark.parametrize(
    "arguments", [{"features": 0}, {"num_bins": 0}, {"bound": 0.0}, {"bound": math.inf}]
)
def test_impossible_sizes_are_named(arguments: dict[str, float]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be"):
        Spline(**{"features": 2, **arguments})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="marginal_bins"):
        flows.ResidualFlow(2, 8, 1, marginal_bins=-1)


def test_rows_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(batch, 2\), got \(5, 3\)"):
        Spline(2)(torch.zeros(5, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int32, torch.bool])
def test_values_of_another_precision_are_named_with_the_remedy(dtype: torch.dtype) -> None:
    spline = Spline(1)
    for direction in (spline, spline.inverse):
        with pytest.raises(ValueError, match=r"the inputs are .*\.to\(torch\.float32\)"):
            direction(torch.ones(1, 1, dtype=dtype))


def test_half_precision_is_computed_in_that_of_the_parameters() -> None:
    outputs, logabsdet = Spline(1)(torch.ones(1, 1, dtype=torch.bfloat16))
    assert outputs.dtype == logabsdet.dtype == torch.float32


def test_parameters_of_another_bound_are_refused() -> None:
    state = random_spline().state_dict()
    other = Spline(4, num_bins=5, bound=BOUND + 1).double()
    with pytest.raises(RuntimeError, match=rf"bound={BOUND}, but has bound={BOUND + 1}"):
        other.load_state_dict(state)
    assert float(other.sizes.detach().abs().max()) == 0
    old = {name: value for name, value in state.items() if name in dict(other.named_parameters())}
    other.load_state_dict(old)
    same = Spline(4, num_bins=5, bound=BOUND).double()
    same.load_state_dict(state)
    inputs = torch.randn(5, 4, dtype=torch.float64)
    assert torch.equal(same(inputs)[0], random_spline()(inputs)[0])


def test_the_inverse_amplifies_by_less_than_it_says() -> None:
    spline = random_spline(spread=3.0)
    outputs = (BOUND * (2 * torch.rand(2000, 4) - 1)).double()
    change = 1e-9
    moved = (spline.inverse(outputs + change)[0] - spline.inverse(outputs)[0]).abs().max() / change
    assert 100 < float(moved.detach()) < 1.01 * spline.lipschitz_constants()[1]


def marginals(count: int) -> dict[str, Tensor]:
    """Rows of one feature, (count, 1): what tables hold."""

    def uniform() -> Tensor:
        return torch.rand(count, 1, dtype=torch.float64)

    def normal() -> Tensor:
        return torch.randn(count, 1, dtype=torch.float64)

    outliers = normal()
    outliers[::200] = 1e6
    return {
        "normal": normal(),
        "far from zero": 1e4 + 3 * normal(),
        "uniform": uniform(),
        "exponential": -uniform().log(),
        "log-normal": (1.5 * normal()).exp(),
        "two peaks": 0.1 * normal() + 2 * (uniform() < 0.5),
        "Cauchy": torch.tan(math.pi * (uniform() - 0.5)),
        "outliers": outliers,
        "binary": (uniform() < 0.3).double(),
        "whole numbers": (17 * uniform()).floor(),
        "mostly zero": normal() * (uniform() < 0.05),
        "constant": torch.full((count, 1), 7.0, dtype=torch.float64),
        "rounded": (2 * normal()).round() / 2,
    }


def standardised(initialization: Initialization, rows: Tensor) -> transforms.CompositeTransform:
    features = rows.shape[1]
    spline = Spline(features, num_bins=16, initialization=initialization)
    chain = transforms.CompositeTransform([transforms.ActNorm(features), spline]).double()
    chain(rows)
    return chain.eval()


def log_likelihood(transform: nn.Module, rows: Tensor) -> float:
    outputs, logabsdet = transform(rows)
    normal = -0.5 * outputs.square().sum(1) - 0.5 * rows.shape[1] * math.log(2 * math.pi)
    return float((normal + logabsdet).mean().detach())


@pytest.mark.parametrize("name", marginals(1))
@pytest.mark.parametrize("count", [1, 2, 5, 50, 1000])
def test_quantiles_are_never_a_worse_start_than_none(name: str, count: int) -> None:
    torch.manual_seed(0)
    rows, fresh = marginals(count)[name], marginals(4000)[name]
    spline, none = standardised("quantiles", rows), standardised("identity", rows)
    assert log_likelihood(spline, rows) >= log_likelihood(none, rows) - 1e-9
    if count == 1000:
        assert log_likelihood(spline, fresh) >= log_likelihood(none, fresh) - 1e-9
    outputs = spline(fresh)[0]
    assert bool(outputs.isfinite().all())
    error = (spline.inverse(outputs)[0] - fresh).abs() / (1 + fresh.abs())
    assert float(error.max().detach()) < 1e-9


@pytest.mark.parametrize("name", ["uniform", "Cauchy", "whole numbers", "rounded"])
def test_few_rows_do_not_mislead_it(name: str) -> None:
    """The quantiles of 20 rows, taken at their word, lose a nat on fresh rows where it goes ill."""
    for seed in range(30):
        torch.manual_seed(seed)
        rows, fresh = marginals(20)[name], marginals(2000)[name]
        spline, none = standardised("quantiles", rows), standardised("identity", rows)
        assert log_likelihood(spline, fresh) > log_likelihood(none, fresh) - 0.01


GAINS = {"uniform": 0.1, "exponential": 0.2, "two peaks": 1.0, "Cauchy": 0.8, "outliers": 2.0}


@pytest.mark.parametrize("name", GAINS)
def test_quantiles_are_worth_their_nats(name: str) -> None:
    torch.manual_seed(0)
    rows, fresh = marginals(1000)[name], marginals(4000)[name]
    spline, none = standardised("quantiles", rows), standardised("identity", rows)
    assert log_likelihood(spline, fresh) > log_likelihood(none, fresh) + GAINS[name]


@pytest.mark.parametrize("name", ["normal", "constant"])
def test_a_feature_that_has_nothing_to_gain_keeps_the_identity(name: str) -> None:
    torch.manual_seed(0)
    both = torch.cat([marginals(1000)[name], marginals(1000)["exponential"]], dim=1)
    spline = Spline(2, num_bins=16, initialization="quantiles").double()
    spline((both - both.mean(0)) / both.std(0).clamp_min(1e-3))
    assert not bool(spline.sizes[:, 0].any() | spline.log_slopes[0].any())
    assert bool(spline.sizes[:, 1].any() & spline.log_slopes[1].any())


@pytest.mark.parametrize("num_bins", [1, 2, 3, 8, 16, 64])
@pytest.mark.parametrize("bound", [0.5, 3.0, 4.0, 20.0])
def test_knots_are_the_quantiles_of_their_images(num_bins: int, bound: float) -> None:
    rows = torch.linspace(-1, 1, 4001, dtype=torch.float64)[:, None] * 0.4
    spline = Spline(1, num_bins, bound).double()
    spline.initialize(rows)
    if num_bins == 1:
        assert not bool(spline.sizes.any())
        return
    knots, images = spline._knots()[:, 0, 1:-1].detach()
    reach = min(bound, 4) * 2.6 / 3.5
    steps = torch.arange(1, num_bins, dtype=torch.float64)
    expected = reach * (2 * steps / num_bins - 1)
    if bool(spline.sizes.any()):
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-9)
    if bound == 3.0 and num_bins == 16:
        quantiles = 0.4 * (2 * torch.special.ndtr(expected) - 1)
        torch.testing.assert_close(knots, quantiles, rtol=0, atol=0.02)
    assert float(spline._knots()[0].detach().diff().min()) > 0.039 * 2 * bound / num_bins


def test_sixteen_bins_to_four_reach_from_minus_to_plus_2_6() -> None:
    spline = Spline(1, num_bins=16, initialization="quantiles").double()
    spline(torch.linspace(-1.7, 1.7, 5000, dtype=torch.float64)[:, None])
    images = spline._knots()[1, 0, 1:-1].detach()
    expected = torch.linspace(-2.6, 2.6, 15, dtype=torch.float64)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-9)
    widths, heights = spline._knots()[:, 0].diff(dim=1).detach()
    secants = (heights / widths).log()
    slopes = 5 * (spline.log_slopes[0].detach() / 5).tanh()
    torch.testing.assert_close(slopes, (secants[1:] + secants[:-1]) / 2)


def test_isotonic_regression_is_the_closest_increasing_sequence() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    expected = torch.tensor([[2.0, 2.0, 2.0, 4.5, 4.5], [1.0, 2.0, 3.0, 4.0, 5.0]])
    torch.testing.assert_close(marginal._isotonic(values), expected)


def skewed_rows(count: int = 500) -> Tensor:
    torch.manual_seed(5)
    return torch.rand(count, 2) ** 2 * 3 - 1


def test_it_starts_from_the_first_batch_in_training_alone() -> None:
    spline = Spline(2, initialization="quantiles")
    spline.eval()
    spline(skewed_rows())
    spline.train()
    spline.inverse(skewed_rows())
    spline(skewed_rows(0))
    assert not bool(spline.initialized)
    spline(skewed_rows())
    first = {name: value.clone() for name, value in spline.state_dict().items()}
    assert bool(spline.initialized)
    assert bool(spline.sizes.any())
    spline(2 * skewed_rows())
    assert all(torch.equal(value, first[name]) for name, value in spline.state_dict().items())


def test_given_rows_start_it_again_whatever_its_kind() -> None:
    for initialization in get_args(Initialization):
        spline = Spline(2, initialization=initialization)
        spline(skewed_rows().flip(0) * 0.5)
        spline.initialize(skewed_rows().double())
        expected = Spline(2)
        expected.initialize(skewed_rows())
        torch.testing.assert_close(spline.sizes, expected.sizes, rtol=1e-4, atol=1e-4)
        spline(torch.randn(100, 2))
        torch.testing.assert_close(spline.sizes, expected.sizes, rtol=1e-4, atol=1e-4)


def test_samples_of_its_own_and_what_was_learned_start_nothing() -> None:
    spline = Spline(2, initialization="quantiles")
    spline(spline.inverse(skewed_rows())[0])
    assert not bool(spline.initialized)
    nn.init.constant_(spline.log_slopes, 0.5)
    spline(skewed_rows())
    assert bool(spline.initialized)
    assert not bool(spline.sizes.any())


def test_its_start_is_saved_loaded_and_copied() -> None:
    spline = Spline(2, initialization="quantiles")
    spline(skewed_rows())
    restored = Spline(2, initialization="quantiles")
    restored.load_state_dict(spline.state_dict())
    for copy in (restored, deepcopy(spline)):
        copy(torch.randn(50, 2))
        assert torch.equal(copy.sizes, spline.sizes)
    fresh = deepcopy(Spline(2, initialization="quantiles"))
    fresh(skewed_rows())
    assert torch.equal(fresh.sizes, spline.sizes)


def test_a_state_without_the_flag_loads_and_is_kept() -> None:
    spline = Spline(2)
    nn.init.constant_(spline.sizes, 0.0)
    nn.init.normal_(spline.log_slopes)
    state = {name: value for name, value in spline.state_dict().items() if name != "initialized"}
    for initialization in get_args(Initialization):
        restored = Spline(2, initialization=initialization)
        restored.load_state_dict(state)
        restored(skewed_rows())
        assert torch.equal(restored.log_slopes, spline.log_slopes)
        assert not bool(restored.sizes.any())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_start_nothing(value: float) -> None:
    rows = skewed_rows()
    rows[3, 1] = value
    spline = Spline(2, initialization="quantiles")
    for start in (spline, spline.initialize):
        with pytest.raises(ValueError, match=r"features \[1\], in 1 of 500 rows"):
            start(rows)
    assert not bool(spline.initialized | spline.sizes.any())
    with pytest.raises(ValueError, match="at least one row"):
        spline.initialize(rows[:0])
    with pytest.raises(ValueError, match=r"\(batch, 2\), got \(5, 3\)"):
        spline.initialize(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="'identity' or 'quantiles', got 'data'"):
        Spline(2, initialization="data")  # type: ignore[arg-type]


def _start_of_a_process(rank: int, folder: str) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    spline = Spline(2, initialization="quantiles")
    spline(skewed_rows()[:300] if rank == 0 else skewed_rows()[300:])
    torch.save(spline.state_dict(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_start_from_their_joined_rows(tmp_path: Path) -> None:
    start_processes(_start_of_a_process, (str(tmp_path),), nprocs=2, start_method="spawn")
    expected = Spline(2, initialization="quantiles")
    expected(skewed_rows())
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_a_pruned_spline_inverts_and_certifies_its_present_slopes() -> None:
    spline = random_spline()
    prune.l1_unstructured(spline, "log_slopes", 0.3)
    spline(torch.zeros(1, 4, dtype=torch.float64))
    with torch.no_grad():
        spline.get_parameter("log_slopes_orig").mul_(2)
    constants, rows = spline.lipschitz_constants(), torch.randn(500, 4, dtype=torch.float64)
    back = spline.inverse(rows)[0]
    torch.testing.assert_close(spline(back)[0], rows)
    assert constants == spline.lipschitz_constants()
