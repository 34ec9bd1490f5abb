"""The default flow: its parts, and a start from data that is never worse than none."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from nflows_iresnet import ResidualFlow, flows, logdet, nn, transforms
from nflows_iresnet.transforms.linear import _scores_left_out, _trusted

FEATURES = 6
MIXING = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(7)).double()


def parts(flow: Any) -> list[Any]:
    return list(flow._transform._transforms)


def kinds(flow: Any) -> list[str]:
    names = {
        "ActNorm": "norm",
        "ElementwiseRationalQuadraticSpline": "spline",
        "LinearTransform": "linear",
        "ConditionalAffine": "context",
        "ResidualTransform": "block",
    }
    return [names[type(each).__name__] for each in parts(flow)]


def test_the_default_is_spline_whitening_and_a_linear_map_before_each_block() -> None:
    flow = ResidualFlow(2, 8, 3)
    expected = ["norm", "spline", "linear", "block", "linear", "block", "linear", "block", "norm"]
    assert kinds(flow) == expected
    assert [parts(flow)[index].starts_from_rows for index in (1, 2, 4, 6)] == [True, True, 0, 0]
    assert parts(flow)[1].sizes.shape == (2, 2, 16)


@pytest.mark.parametrize(("features", "has_them"), [(1, 0), (2, 0), (3, 1), (64, 1)])
def test_splines_stand_before_blocks_from_three_features(features: int, has_them: bool) -> None:
    flow, between = ResidualFlow(features, 8, 2), ["spline"] if has_them else []
    start = ["norm", "spline", "linear", "block"]
    assert kinds(flow) == [*start, "linear", *between, "block", "norm"]
    if has_them:
        assert parts(flow)[5].sizes.shape == (2, features, 8)
    explicit = ResidualFlow(features, 8, 2, block_bins=0)
    assert kinds(explicit) == [*start, "linear", "block", "norm"]


def test_each_part_can_be_left_out_or_added() -> None:
    assert kinds(ResidualFlow(3, 8, 2, marginal_bins=0)) == [
        *["norm", "linear", "block", "linear", "block", "norm"]
    ]
    assert kinds(ResidualFlow(3, 8, 2, linear=False)) == [
        *["norm", "spline", "block", "norm", "block", "norm"]
    ]
    flow = ResidualFlow(3, 8, 2, block_bins=5)
    assert kinds(flow) == ["norm", "spline", "linear", "block", "linear", "spline", "block", "norm"]
    assert parts(flow)[5].sizes.shape == (2, 3, 5)
    with pytest.raises(ValueError, match="block_bins"):
        ResidualFlow(3, 8, 2, block_bins=-1)


def test_the_context_acts_on_features_that_were_standardised_without_it_and_last() -> None:
    assert kinds(ResidualFlow(3, 8, 2, context_features=2)) == [
        *["norm", "spline", "linear", "context", "block"],
        *["linear", "spline", "context", "block", "norm", "context"],
    ]


@pytest.mark.parametrize("context", [None, 2])
def test_without_spline_and_linear_maps_it_is_the_flow_of_the_papers(context: int | None) -> None:
    torch.manual_seed(0)
    plain = ResidualFlow(3, 8, 2, context_features=context, marginal_bins=0, linear=False)
    torch.manual_seed(0)
    layers: list[Any] = []
    for _ in range(2):
        block = transforms.ResidualTransform(nn.LipschitzMLP(3, [8, 8], context))
        layers += [*normalisation(context), block]
    layers += normalisation(context)
    expected = flows.Flow(transforms.CompositeTransform(layers), flows.StandardNormal([3]))
    given = [torch.randn(64, 3)] + ([] if context is None else [torch.randn(64, context)])
    for flow in (plain, expected):
        flow.double().log_prob(*[each.double() for each in given])
    assert kinds(plain) == kinds(expected)
    assert list(plain.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name


def normalisation(context: int | None) -> list[Any]:
    norm = transforms.ActNorm(3)
    return [norm] if context is None else [norm, transforms.ConditionalAffine(3, context)]


# --- the start ------------------------------------------------------------------------------------


def normal(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)


def mixed(count: int, generator: torch.Generator) -> Tensor:
    return normal(count, generator) @ MIXING


def with_constants(count: int, generator: torch.Generator) -> Tensor:
    rows = mixed(count, generator)
    rows[:, 1], rows[:, 2] = 7, 0
    return rows


def with_two_values(count: int, generator: torch.Generator) -> Tensor:
    rows = mixed(count, generator)
    rows[:, :2] = (rows[:, :2] > 0).double()
    return rows


def with_copies(count: int, generator: torch.Generator) -> Tensor:
    rows = mixed(count, generator)
    rows[:, 1], rows[:, 2] = rows[:, 0], 2 * rows[:, 3] - rows[:, 4]
    return rows


def with_heavy_tails(count: int, generator: torch.Generator) -> Tensor:
    chi = normal(count, generator)[:, :4].square().mean(1, keepdim=True)
    return mixed(count, generator) / chi.sqrt()


def uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, FEATURES, generator=generator, dtype=torch.float64)


TABLES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "standard": normal,
    "mixed": mixed,
    "far": lambda count, generator: mixed(count, generator) + 1e4,
    "farther": lambda count, generator: normal(count, generator) + 1e6,
    "tiny": lambda count, generator: mixed(count, generator) * 1e-20,
    "huge": lambda count, generator: mixed(count, generator) * 1e18,
    "constants": with_constants,
    "two values": with_two_values,
    "copies": with_copies,
    "integers": lambda count, generator: (2 * mixed(count, generator)).round(),
    "heavy tails": with_heavy_tails,
    "uniform": uniform,
}


def small(dtype: torch.dtype = torch.float32, **options: Any) -> ResidualFlow:
    torch.manual_seed(0)
    return ResidualFlow(FEATURES, 8, 2, estimator=logdet.Exact(), **options).to(dtype)


def log_likelihood(flow: ResidualFlow, rows: Tensor) -> float:
    with torch.no_grad():
        return float(deepcopy(flow).eval().log_prob(rows).double().mean())


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 64, 512])
@pytest.mark.parametrize("name", TABLES)
def test_a_start_is_no_worse_for_unseen_rows_than_none(name: str, count: int) -> None:
    """But for what two estimated numbers cost a feature: 1 / n nats, three times that at most."""
    generator = torch.Generator().manual_seed(3)
    rows, unseen = (TABLES[name](size, generator).float() for size in (count, 2000))
    flow, none = small(), small()
    loss = -flow.log_prob(rows).mean()
    found, least = log_likelihood(flow, unseen), log_likelihood(none, unseen)
    assert math.isfinite(found)
    assert found > least - 3 * FEATURES / count - 0.05
    loss.backward()
    assert all(
        bool(each.grad.isfinite().all()) for each in flow.parameters() if each.grad is not None
    )


@pytest.mark.parametrize("count", [8, 16, 64, 512])
@pytest.mark.parametrize("name", TABLES)
def test_splines_and_whitening_are_no_worse_than_scales_alone(name: str, count: int) -> None:
    """In the median of tables, for few rows may be unlike the others."""
    assert median(_lost_to_scales_alone(name, count, seed) for seed in range(5)) < 0.3


def _lost_to_scales_alone(name: str, count: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    rows, unseen = (TABLES[name](size, generator).double() for size in (count, 2000))
    flow, scaled = small(torch.float64), small(torch.float64)
    flow.log_prob(rows)
    for part in parts(scaled):
        if isinstance(part, transforms.ActNorm):
            part.initialize(rows)
            rows = part(rows)[0]
    parts(scaled)[-1].initialize(rows)
    return log_likelihood(scaled.eval(), unseen) - log_likelihood(flow, unseen)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("count", [1, 3, 100])
def test_a_started_flow_is_inverted(name: str, count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = TABLES[name](count, generator)
    flow = small(torch.float64)
    flow.log_prob(rows)
    with torch.no_grad():
        recovered = flow._transform.inverse(flow.eval().transform_to_noise(rows))[0]
    size = rows.abs().amax(0)
    size = torch.where(size > 0, size, 1)
    torch.testing.assert_close(recovered / size, rows / size, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_first_rows_of_a_standardised_table_leave_it_as_it_is(count: int) -> None:
    generator = torch.Generator().manual_seed(6)
    norm = transforms.ActNorm(200)
    norm(torch.randn(count, 200, generator=generator))
    assert (norm.log_scale != 0).double().mean() < 0.05
    assert (norm.shift != 0).double().mean() < 0.05


@pytest.mark.parametrize("count", [2, 4, 7])
def test_few_rows_that_are_far_from_zero_are_centred(count: int) -> None:
    generator = torch.Generator().manual_seed(7)
    rows = 1e6 + torch.randn(count, 50, generator=generator, dtype=torch.float64)
    for part in (
        transforms.ActNorm(50),
        transforms.LinearTransform(50, initialization="whitening"),
    ):
        outputs = part.double()(rows)[0]
        torch.testing.assert_close(outputs.mean(0), torch.zeros(50).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("trust", [0.0, 0.4, 1.0])
def test_rows_that_are_left_out_are_scored_by_the_normal_of_all_others(trust: float) -> None:
    rows = mixed(30, torch.Generator().manual_seed(8))
    rows = (rows - rows.mean(0)) / rows.std(0)
    eigenvalues, vectors = torch.linalg.eigh(rows.T.cov())
    share = torch.tensor([[trust]], dtype=torch.float64)
    found = _scores_left_out((rows @ vectors).square(), eigenvalues, share, len(rows))[:, 0]
    for index in range(len(rows)):
        others = torch.cat([rows[:index], rows[index + 1 :]])
        identity = torch.eye(FEATURES, dtype=torch.float64)
        covariance = trust * others.T.cov() + (1 - trust) * identity
        density = torch.distributions.MultivariateNormal(others.mean(0), covariance)
        expected = density.log_prob(rows[index]) + FEATURES / 2 * math.log(2 * math.pi)
        torch.testing.assert_close(found[index], expected, rtol=1e-9, atol=1e-9)
    assert _trusted(eigenvalues, share).shape == (1, FEATURES)


def test_correlations_of_an_outlier_are_not_believed() -> None:
    rows = normal(500, torch.Generator().manual_seed(9))
    rows[17] = 1e6
    linear = transforms.LinearTransform(FEATURES, initialization="whitening").double()
    linear(rows)
    assert float(linear.factors.detach().tril(-1).abs().max()) < 1e-12


@pytest.mark.parametrize("build", [ResidualFlow, flows.HybridFlow])
@pytest.mark.parametrize("count", [500, 5000])
def test_samples_of_a_start_from_a_long_tail_do_not_pile_up(build: Any, count: int) -> None:
    """As they do at the bound of the splines where that cuts the tail."""
    torch.manual_seed(0)
    normal = torch.randn(20_000, 2)
    rows = torch.stack([normal[:, 0], normal[:, 0].square() + 0.2 * normal[:, 1]], dim=1)
    rows = (rows - rows.mean(0)) / rows.std(0)
    flow = build(2, 8, 2)
    flow.initialize(rows[:count])
    with torch.no_grad():
        samples = flow.eval().sample(20_000)
    of_rows, of_samples = (
        float(torch.histc(each[:, 1], bins=100, min=2.5, max=10.0).max() / len(each))
        for each in (rows, samples)
    )
    assert of_rows < 0.0035
    assert of_samples < 0.007


def test_a_copy_and_a_loaded_flow_never_start_anew() -> None:
    generator = torch.Generator().manual_seed(10)
    flow, fresh = small(block_bins=4), small(block_bins=4)
    flow.log_prob(mixed(300, generator).float())
    fresh.load_state_dict(flow.state_dict())
    for other in (fresh, deepcopy(flow)):
        other.train().log_prob(10 * mixed(300, generator).float() + 3)
        for name, value in flow.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


def test_nothing_starts_in_evaluation_and_all_starts_in_training_though_frozen() -> None:
    rows = mixed(300, torch.Generator().manual_seed(11)).float()
    flow = small().eval()
    flow.log_prob(rows)
    flow.sample(5)
    flags = [each.initialized for each in flow.modules() if hasattr(each, "initialized")]
    assert not any(flags[:3])
    flow.train().requires_grad_(False).log_prob(rows)
    assert all(each.initialized for each in flow.modules() if hasattr(each, "initialized"))


@pytest.mark.parametrize("count", [1, 5, 200])
def test_a_conditional_flow_starts_from_any_number_of_rows(count: int) -> None:
    generator = torch.Generator().manual_seed(12)
    rows, context = mixed(count, generator).float() + 100, torch.randn(count, 2)
    for start in ("log_prob", "initialize"):
        flow = small(context_features=2)
        getattr(flow, start)(rows, context)
        unseen = mixed(500, generator).float() + 100
        with torch.no_grad():
            scores = flow.eval().log_prob(unseen, torch.randn(500, 2))
        assert bool(scores.isfinite().all())
        assert float(scores.mean()) > -100


def test_rows_that_are_given_are_better_than_a_batch() -> None:
    generator = torch.Generator().manual_seed(13)
    rows, unseen = uniform(5000, generator) ** 3, uniform(2000, generator) ** 3
    batch, given = small(torch.float64), small(torch.float64)
    batch.log_prob(rows[:64])
    given.initialize(rows)
    assert log_likelihood(given, unseen) > log_likelihood(batch, unseen) + 0.5
