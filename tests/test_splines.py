"""The spline of each feature: against nflows' own, at its limits, and what it is for."""

from __future__ import annotations

import math

import pytest
import torch
from nflows.transforms.splines import rational_quadratic_spline
from torch import Tensor, nn

from nflows_iresnet import flows, transforms
from nflows_iresnet.transforms import splines as marginal

Spline = transforms.ElementwiseRationalQuadraticSpline

BOUND = 3.0


def random_spline(dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Spline:
    torch.manual_seed(7)
    spline = Spline(4, num_bins=5, bound=BOUND).to(dtype)
    for parameter in spline.parameters():
        nn.init.normal_(parameter, std=spread)
    return spline


def spline_of_nflows(spline: Spline, inputs: Tensor) -> tuple[Tensor, Tensor]:
    smallest = marginal._MIN_SIZE / 5
    slopes = marginal._MAX_LOG_SLOPE * (spline.log_slopes / marginal._MAX_LOG_SLOPE).tanh()
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
