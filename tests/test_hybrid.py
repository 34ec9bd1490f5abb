"""HybridFlow: residual blocks alternating with couplings and autoregressive transforms."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    IdentityTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
    PiecewiseRationalQuadraticCouplingTransform,
    Transform,
)
from torch import Tensor, nn

from nflows_iresnet import flows, logdet, transforms
from nflows_iresnet.flows.partners import SplineAutoregressive, SplineCoupling
from nflows_iresnet.graphs import GraphedStep, NotCapturedWarning
from nflows_iresnet.transforms.conditional_splines import Family
from tests.emulated_graph import EmulatedRecorder, recorder

__all__ = ["recorder"]

PARTNERS = {
    "spline-coupling": flows.spline_coupling,
    "affine-coupling": flows.affine_coupling,
    "autoregressive": flows.masked_autoregressive,
    "spline-autoregressive": flows.spline_autoregressive,
}
every_partner = pytest.mark.parametrize("partner", PARTNERS.values(), ids=PARTNERS)


def table(count: int = 2000, features: int = 3) -> Tensor:
    """Columns that are skewed, correlated, and far from zero and one."""
    torch.manual_seed(1)
    rows = torch.randn(count, features) @ torch.randn(features, features)
    return (rows + 0.3 * rows.exp()) * torch.logspace(-2, 2, features) + 10


def train(flow: flows.Flow, rows: Tensor, context: Tensor | None = None, steps: int = 5) -> None:
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (-flow.log_prob(rows, context).mean()).backward()
        optimizer.step()


def log_prob_by_slogdet(flow: flows.Flow, rows: Tensor) -> Tensor:
    def noise(row: Tensor) -> Tensor:
        return flow.transform_to_noise(row[None])[0]

    jacobians = torch.stack([torch.autograd.functional.jacobian(noise, row) for row in rows])
    base = torch.distributions.Normal(0.0, 1.0).log_prob(flow.transform_to_noise(rows)).sum(1)
    return base + torch.linalg.slogdet(jacobians).logabsdet


def wild(transform: Any) -> Any:
    torch.manual_seed(4)
    for parameter in transform.parameters():
        nn.init.normal_(parameter, std=0.5)
    return transform.double()


def spline_coupling(parity: int = 0, features: int = 3, **options: Any) -> Any:
    return flows.spline_coupling(parity, features, 8, 1, **options)


def spline_autoregressive(features: int = 3, **options: Any) -> Any:
    """Return it without the reversal in front."""
    transform: Any = flows.spline_autoregressive(0, features, 8, 1, **options)
    return transform._transforms[1]


SPLINES: dict[str, Callable[..., Any]] = {
    "coupling": spline_coupling,
    "coupling-odd": partial(spline_coupling, 1),
    "autoregressive": spline_autoregressive,
}
by_splines = pytest.mark.parametrize("make", SPLINES.values(), ids=SPLINES)


def nflows_twin(transform: Any) -> Any:
    options = {
        "num_bins": transform.num_bins,
        "tails": "linear",
        "tail_bound": transform.tail_bound,
    }
    if isinstance(transform, SplineAutoregressive):
        network: Any = transform.autoregressive_net
        features = network.initial_layer.in_features
        twin = MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            features, 8, num_blocks=1, **options
        )
    else:
        mask = torch.zeros(transform.features)
        mask[transform.transform_features] = 1
        twin = PiecewiseRationalQuadraticCouplingTransform(
            mask, lambda inputs, outputs: ResidualNet(inputs, outputs, 8, num_blocks=1), **options
        )
    state = transform.state_dict()
    del state["_extra_state"]
    twin.load_state_dict(state)
    return twin.double()


# --- the flow -------------------------------------------------------------------------------------


@every_partner
def test_the_density_is_the_determinant_of_the_whole_jacobian(partner: flows.Partner) -> None:
    torch.manual_seed(0)
    flow = flows.HybridFlow(3, 8, 4, 1, partner=partner, estimator=logdet.Exact()).double()
    rows = table().double()
    flow.initialize(rows)
    train(flow, rows[:64])
    few = rows[:6]
    expected = log_prob_by_slogdet(flow, few)
    torch.testing.assert_close(flow.log_prob(few), expected, rtol=1e-7, atol=1e-7)


@every_partner
def test_samples_are_scored_as_they_were_drawn(partner: flows.Partner) -> None:
    torch.manual_seed(0)
    flow = flows.HybridFlow(3, 8, 4, 1, partner=partner).double()
    flow.initialize(table().double())
    train(flow, table(64).double())
    with torch.no_grad(), transforms.using(flow, estimator=logdet.Exact()):
        samples, log_prob = flow.sample_and_log_prob(50)
        torch.testing.assert_close(flow.log_prob(samples), log_prob, rtol=1e-4, atol=1e-4)


@every_partner
def test_every_feature_is_transformed_by_the_partners_alone(partner: flows.Partner) -> None:
    rows = torch.randn(1, 5).double()
    for features in (2, 5):
        pair = [wild(partner(index, features, 8, 1, None)) for index in (0, 1)]
        row = rows[:, :features]

        def outputs(inputs: Tensor, pair: list[nn.Module] = pair, row: Tensor = row) -> Tensor:
            for each in pair:
                inputs = each(inputs)[0]
            return inputs[0]

        jacobian = torch.autograd.functional.jacobian(outputs, row)[:, 0]
        moved = outputs(row) - row[0]
        assert bool((moved != 0).all())
        assert bool((jacobian - torch.diag(jacobian.diagonal())).abs().sum() > 0)


@every_partner
def test_a_context_is_used_and_cannot_be_forgotten(partner: flows.Partner) -> None:
    flow = flows.HybridFlow(2, 8, 2, 1, context_features=3, partner=partner)
    rows, context = table(64, 2), torch.randn(64, 3)
    flow.initialize(rows, context)
    train(flow, rows, context)
    difference = flow.log_prob(rows, context) - flow.log_prob(rows, context + 1)
    assert bool((difference.abs() > 0).all())
    assert flow.sample(4, context[:5]).shape == (5, 4, 2)
    with pytest.raises(ValueError, match="no context was given"):
        flow.log_prob(rows)
    with pytest.raises(ValueError, match="to a model without"):
        flows.HybridFlow(2, 8, 2, partner=partner).log_prob(rows, context)


@every_partner
def test_training_goes_on_from_a_state_dict_as_if_it_had_not_stopped(
    partner: flows.Partner,
) -> None:
    def build() -> flows.HybridFlow:
        return flows.HybridFlow(3, 8, 3, 1, partner=partner)

    torch.manual_seed(0)
    flow, rows = build(), table(128)
    flow.initialize(rows)
    train(flow, rows)
    stored = io.BytesIO()
    torch.save(flow.state_dict(), stored)
    stored.seek(0)
    other = build()
    other.load_state_dict(torch.load(stored, weights_only=True))
    for each in (flow, other):
        torch.manual_seed(5)
        train(each, 3 * rows - 1)
    for mine, its in zip(flow.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)


def test_the_start_is_worth_nats_and_no_later_batch_repeats_it() -> None:
    torch.manual_seed(0)
    rows, none, started = table(), flows.HybridFlow(3, 8, 2), flows.HybridFlow(3, 8, 2)
    started.initialize(rows[:1000])
    with torch.no_grad():
        before, after = (each.eval().log_prob(rows[1000:]).mean() for each in (none, started))
    assert after > before + 100
    state = {name: value.clone() for name, value in started.state_dict().items()}
    started.train().log_prob(7 * rows + 3)
    for name, value in started.state_dict().items():
        assert torch.equal(value, state[name]), name


@every_partner
def test_autocast_changes_no_density(partner: flows.Partner) -> None:
    rows = table()
    flow = flows.HybridFlow(3, 16, num_layers=4, partner=partner)
    train(flow, rows)
    flow.eval()
    with torch.no_grad():
        expected = flow.log_prob(rows[:50])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(flow.log_prob(rows[:50]), expected)


def test_layers_are_counted_together_and_begin_with_a_residual_block() -> None:
    for num_layers in (1, 2, 5):
        flow = flows.HybridFlow(4, 8, num_layers)
        kinds = [type(each) for each in flow._transform._transforms]
        assert kinds.count(transforms.ResidualTransform) == (num_layers + 1) // 2
        assert kinds.count(SplineCoupling) == num_layers // 2
        assert kinds.count(transforms.LinearTransform) == num_layers
        assert len(flow.lipschitz_bound().blocks) == (num_layers + 1) // 2


def test_a_partner_of_ones_own_is_told_its_index_and_the_sizes() -> None:
    seen = []

    def partner(*sizes: int | None) -> Transform:
        seen.append(sizes)
        return IdentityTransform()

    flows.HybridFlow(3, 8, 5, 1, context_features=2, partner=partner)
    assert seen == [(0, 3, 8, 1, 2), (1, 3, 8, 1, 2)]


def test_one_feature_works_with_what_need_not_split_it_and_is_refused_by_what_must() -> None:
    for partner in (flows.spline_coupling, flows.affine_coupling):
        with pytest.raises(ValueError, match=r"features is 1: use partner=spline_autoregressive"):
            flows.HybridFlow(1, 8, 2, partner=partner)
    flow = flows.HybridFlow(1, 8, 2, partner=flows.masked_autoregressive)
    flow.initialize(table(100, 1))
    assert flow.log_prob(flow.sample(5)).isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            partial(flows.HybridFlow, partner="spline-coupling"),  # type: ignore[arg-type]
            "partner must make a transform",
        ),
        (partial(flows.HybridFlow, partner=IdentityTransform()), "partner must make a transform"),
        (partial(flows.HybridFlow, net=nn.Identity()), "net must make a network"),
        (partial(flows.HybridFlow, partner=lambda *sizes: None), "partner returned None"),
        (partial(flows.HybridFlow, marginal_bins=-1), "marginal_bins must be at least 1, got -1"),
        (
            partial(flows.HybridFlow, partner=partial(flows.spline_coupling, bound=-1.0)),
            "bound must be positive and finite, got -1.0",
        ),
        (
            partial(flows.HybridFlow, partner=partial(flows.spline_coupling, num_bins=0)),
            "num_bins must be at least 1, got 0",
        ),
        (
            partial(flows.HybridFlow, partner=partial(flows.spline_autoregressive, num_bins=1000)),
            "num_bins must be less than 1000",
        ),
        (partial(flows.HybridFlow, block_bins=-1), "block_bins must be at least 1, got -1"),
        (partial(flows.HybridFlow, block_bins=True), "block_bins must be a whole number"),
    ],
)
def test_mistakes_are_named(build: Callable[..., flows.Flow], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(3, 8, 2)


# --- its step as one graph ------------------------------------------------------------------------


@every_partner
def test_a_training_step_is_captured(recorder: EmulatedRecorder, partner: flows.Partner) -> None:
    torch.manual_seed(0)
    flow = flows.HybridFlow(3, 8, 2, 1, partner=partner).double()
    batches = table(64).double().split(16)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3, capturable=True, foreach=True)
    step = GraphedStep(flow, optimizer, batches[0])
    for batch in batches:
        step(batch)
    assert step.is_captured, step.reason


@by_splines
def test_the_splines_of_nflows_are_not(
    recorder: EmulatedRecorder, make: Callable[..., Any]
) -> None:
    torch.manual_seed(0)

    def partner(*sizes: int | None) -> Transform:
        return nflows_twin(make())

    flow = flows.HybridFlow(3, 8, 2, 1, partner=partner).double()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3, capturable=True, foreach=True)
    with pytest.warns(NotCapturedWarning):
        assert not GraphedStep(flow, optimizer, table(16).double()).is_captured


# --- splines of each value ------------------------------------------------------------------------


@by_splines
def test_the_splines_are_those_of_nflows(make: Callable[..., Any]) -> None:
    transform = wild(make(features=5, num_bins=6, bound=2.0))
    twin = nflows_twin(transform)
    rows = 2 * torch.randn(400, 5).double()
    for mine, its in ((transform, twin), (transform.inverse, twin.inverse)):
        for found, expected in zip(mine(rows), its(rows), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@by_splines
def test_gradients_of_the_splines_are_right_within_and_beyond_the_bound(
    make: Callable[..., Any],
) -> None:
    transform = wild(make(num_bins=4, bound=1.0))
    rows = torch.tensor([[0.3, -0.2, 0.8], [-4.0, 0.5, 3.0]]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda inputs: transform(inputs), (rows,))
    outputs = transform(rows)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda inputs: transform.inverse(inputs), (outputs,))


@pytest.mark.parametrize("bins", [1, 2, 5])
def test_the_node_is_its_slow_twin_with_both_derivatives(bins: int) -> None:
    family = Family(bins, 2.0, 0.7, 2e-3, 3e-3)
    torch.manual_seed(bins)
    inputs = (1.5 * torch.randn(6, 4)).double().requires_grad_()
    numbers = torch.randn(6, 4 * (3 * bins - 1)).double().requires_grad_()
    assert torch.autograd.gradcheck(family.forward, (inputs, numbers))
    assert torch.autograd.gradgradcheck(family.forward, (inputs, numbers))
    slow = family.differentiable(inputs, family.numbers_first(numbers, inputs))
    for mine, its in zip(family.forward(inputs, numbers), slow, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)


def steep(count: int, scale: float) -> Tensor:
    """Return numbers of `count` splines of eight bins, with widths and slopes of all sizes."""
    torch.manual_seed(0)
    return scale * torch.randn(count, 3 * 8 - 1)


@pytest.mark.parametrize("scale", [2.0, 6.0])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_values_at_knots_and_beside_them_have_finite_slopes(direction: str, scale: float) -> None:
    """Rounding leaves no value outside of its bin, where the formula may have no logarithm."""
    count, family = 20_000, Family(8, 5.0, 1.0, 1e-3, 1e-3)
    numbers = steep(count, scale)
    chosen = family.choose(
        torch.empty(count, 1).uniform_(-5, 5),
        family.numbers_first(numbers, torch.empty(count, 1)),
        by_height=direction == "inverse",
    )
    knots = chosen.starts[int(direction == "inverse")]
    for beside in (-torch.inf, None, torch.inf):
        values = knots if beside is None else torch.nextafter(knots, torch.full_like(knots, beside))
        for found in getattr(family, direction)(values, numbers):
            assert found.isfinite().all()


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_at_the_bound_a_spline_is_the_identity(direction: str) -> None:
    family, numbers = Family(8, 5.0, 1.0, 1e-3, 1e-3), steep(5_000, 6.0)
    for place in (-5.0, 5.0):
        values = torch.full((5_000, 1), place)
        found, log_slopes = getattr(family, direction)(values, numbers)
        torch.testing.assert_close(found, values, rtol=0, atol=2e-6)
        torch.testing.assert_close(log_slopes, torch.zeros(5_000), rtol=0, atol=0)


def test_the_inverse_has_its_own_derivative_just_below_knots() -> None:
    family, numbers = Family(8, 5.0, 1.0, 1e-3, 1e-3), steep(2_000, 3.0).double()
    places = family.numbers_first(numbers, numbers[:, :1])
    knots = family.choose(torch.empty(2_000, 1).uniform_(-5, 5).double(), places, by_height=True)
    below = torch.nextafter(knots.starts[1], torch.full((2_000, 1), -9.0).double())
    below.requires_grad_()
    inputs, log_slopes = family.inverse(below, numbers)
    (slopes,) = torch.autograd.grad(inputs.sum(), below)
    torch.testing.assert_close(slopes[:, 0], log_slopes.exp(), rtol=1e-8, atol=0)


def test_values_beyond_the_bound_ask_nothing_of_the_network() -> None:
    numbers = steep(4, 2.0).requires_grad_()
    inputs = torch.tensor([[6.0], [-1e3], [1e8], [torch.inf]]).requires_grad_()
    outputs, log_slopes = Family(8, 5.0, 1.0, 1e-3, 1e-3).forward(inputs, numbers)
    cotangent = torch.tensor([[1.0], [1e6], [1e20], [torch.inf]])
    torch.autograd.backward([outputs, log_slopes], [cotangent, torch.ones(4)])
    assert inputs.grad is not None
    assert numbers.grad is not None
    assert torch.equal(inputs.grad, cotangent)
    assert torch.equal(numbers.grad, torch.zeros_like(numbers))


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_gradients_of_the_node_in_float32_are_those_in_float64(scale: float) -> None:
    family, numbers = Family(8, 5.0, 1.0, 1e-3, 1e-3), steep(2_000, scale)
    inputs = torch.empty(2_000, 1).uniform_(-5, 5)
    found = []
    for dtype in (torch.float32, torch.float64):
        given = [each.to(dtype).requires_grad_() for each in (inputs, numbers)]
        outputs, log_slopes = family.forward(*given)
        found.append(torch.autograd.grad(outputs.square().sum() - log_slopes.sum(), given))
    for single, double in zip(*found, strict=True):
        errors = (single - double).norm(dim=1) / double.norm(dim=1)
        assert float(errors.median()) < 2e-5


def test_shares_that_are_certain_learn_nothing() -> None:
    """Their gradient is smaller than any number: noise would be taken for a direction by Adam."""
    numbers = torch.zeros(50, 23)
    numbers[:, [2, 10]] = 120.0
    numbers.requires_grad_()
    family, inputs = Family(8, 5.0, 1.0, 1e-3, 1e-3), torch.linspace(-4, 4, 50)[:, None]
    outputs, log_slopes = family.forward(inputs, numbers)
    (outputs.square().sum() - log_slopes.sum()).backward()
    assert numbers.grad is not None
    assert torch.equal(numbers.grad[:, :16], torch.zeros(50, 16))


def test_many_cotangents_at_once_come_back_as_one_by_one() -> None:
    family, inputs = Family(3, 2.0, 1.0, 1e-3, 1e-3), torch.randn(2, 3)
    numbers = torch.randn(2, 3 * 8, requires_grad=True)
    outputs, _ = family.forward(inputs, numbers)
    each = torch.eye(6).reshape(6, 2, 3)
    (together,) = torch.autograd.grad(
        outputs, numbers, each, is_grads_batched=True, retain_graph=True
    )
    apart = [torch.autograd.grad(outputs, numbers, one, retain_graph=True)[0] for one in each]
    torch.testing.assert_close(together, torch.stack(apart))


def test_a_spline_has_the_widths_heights_and_slopes_that_its_numbers_say() -> None:
    """Two bins of known sizes: 1/4 and 3/4 of the widths, half of the heights, slope 3."""
    family = Family(2, 1.0, 1.0, 0.0, 0.0)
    quarter = torch.tensor([0.25, 0.75]).double().log()
    slope = torch.tensor([3.0]).double().expm1().log()
    numbers = torch.cat([quarter, torch.zeros(2).double(), slope])[None]
    values, log_slope = family.forward(torch.tensor([[-0.5]]).double(), numbers)
    torch.testing.assert_close(values, torch.zeros(1, 1).double())
    torch.testing.assert_close(log_slope.exp(), torch.tensor([3.0]).double())


@by_splines
def test_the_inverse_of_the_splines_survives_rounding(make: Callable[..., Any]) -> None:
    """In float32 the discriminant of nflows can be negative, which is an AssertionError there."""
    transform = wild(make(features=4)).float()
    for parameter in transform.parameters():
        parameter.data.mul_(6)
    rows = 3 * torch.randn(20_000, 4)
    with torch.no_grad():
        outputs, logabsdet = transform.inverse(rows)
    assert outputs.isfinite().all()
    assert logabsdet.isfinite().all()
    assert bool((outputs.abs() <= torch.maximum(rows.abs(), torch.tensor(5.0)) + 1e-4).all())


@by_splines
def test_values_at_the_bound_and_at_knots_are_finite_with_finite_gradients(
    make: Callable[..., Any],
) -> None:
    transform = make(features=2, num_bins=4, bound=2.0)
    places = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 2.0 + 1e-6, 1e20])
    rows = torch.stack([places, torch.zeros(7)], dim=1).requires_grad_()
    for direction in (transform, transform.inverse):
        outputs, logabsdet = direction(rows)
        (gradient,) = torch.autograd.grad(outputs.sum() + logabsdet.sum(), rows)
        for each in (outputs, logabsdet, gradient):
            assert each.isfinite().all()


@by_splines
def test_an_empty_batch_stays_empty(make: Callable[..., Any]) -> None:
    transform = make(features=4)
    for direction in (transform, transform.inverse):
        outputs, logabsdet = direction(torch.empty(0, 4))
        assert (outputs.shape, logabsdet.shape) == ((0, 4), (0,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_splines_of_half_precision_have_no_empty_bins(dtype: torch.dtype) -> None:
    """The smallest bins are narrower than what half precision tells apart."""
    torch.manual_seed(0)
    transform = SplineAutoregressive(4, 16, 2, None, num_bins=8, bound=5.0)
    for parameter in transform.parameters():
        parameter.data.mul_(6)
    inputs = (2 * torch.randn(2000, 4)).to(dtype)
    outputs, logabsdet = transform.to(dtype)(inputs)
    back, of_inverse = transform.inverse(outputs)
    for values in (outputs, logabsdet, back, of_inverse):
        assert values.dtype == dtype
        assert bool(values.isfinite().all())


def test_a_bound_that_is_set_later_counts() -> None:
    coupling = SplineCoupling(4, 16, 2, None, parity=0, num_bins=8, bound=5.0)
    inputs = torch.full((3, 4), 2.0)
    assert not torch.equal(coupling(inputs)[0], inputs)
    coupling.tail_bound = 1.5
    assert torch.equal(coupling(inputs)[0], inputs)


@pytest.mark.parametrize("spline", [flows.spline_coupling, flows.spline_autoregressive])
def test_weights_of_splines_to_another_bound_are_refused(spline: Any) -> None:
    saved = flows.HybridFlow(3, 8, 2, partner=partial(spline, bound=2.0)).state_dict()
    with pytest.raises(RuntimeError, match=r"was saved with bound=2\.0, but has bound=[35]\.0"):
        flows.HybridFlow(3, 8, 2, partner=spline).load_state_dict(saved)
    flows.HybridFlow(3, 8, 2, partner=partial(spline, bound=2)).load_state_dict(saved)
