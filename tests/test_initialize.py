"""The start of a flow from rows: in order, in one pass, for good."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import nflows.flows
import nflows.transforms
import pytest
import torch
from nflows.distributions import StandardNormal
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from nflows_iresnet import ResidualFlow, flows, logdet, transforms
from nflows_iresnet.nn import LipschitzMLP

FEATURES = 3


def table(count: int = 3000, dtype: torch.dtype = torch.float32) -> Tensor:
    """Columns that are skewed, correlated, and far from zero and one."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    mixed = rows @ torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.1, 0.0], [0.0, 0.3, 1.0]]).double()
    scales, shifts = torch.tensor([100.0, 1e-2, 1.0]), torch.tensor([1e3, 0.0, -5.0])
    return ((mixed + 0.3 * mixed.exp()) * scales + shifts).to(dtype)


def block(context_features: int | None = None) -> transforms.ResidualTransform:
    return transforms.ResidualTransform(LipschitzMLP(FEATURES, [8], context_features))


def recipe(context_features: int | None = None) -> list[Any]:
    torch.manual_seed(2)
    return [
        transforms.ActNorm(FEATURES),
        transforms.ElementwiseRationalQuadraticSpline(FEATURES, 16, initialization="quantiles"),
        transforms.LinearTransform(FEATURES, initialization="whitening"),
        block(context_features),
        transforms.LinearTransform(FEATURES),
        transforms.MonotoneTransform(LipschitzMLP(FEATURES, [8], context_features)),
        transforms.ActNorm(FEATURES),
    ]


def flow_of(parts: list[Any]) -> flows.Flow:
    composite = transforms.CompositeTransform(parts)
    return flows.Flow(composite, flows.StandardNormal([FEATURES]))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    now = module.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, now[name])}


def log_likelihood(flow: Any, rows: Tensor) -> float:
    with torch.no_grad():
        return float(flow.eval().log_prob(rows).mean())


def test_each_part_starts_from_what_comes_out_of_those_before() -> None:
    flow = flow_of(recipe())
    flow.initialize(table())
    rows = table()
    for index, part in enumerate(flow._transform._transforms):
        if index in (0, 2, 6):
            rows = part(rows)[0]
            torch.testing.assert_close(rows.mean(0), torch.zeros(3), rtol=0, atol=1e-3)
            torch.testing.assert_close(rows.std(0), torch.ones(3), rtol=0, atol=1e-2)
            continue
        if index == 4:
            assert not bool(part.factors.any())
        rows = part(rows)[0]


def test_it_is_the_first_batch_given_in_advance() -> None:
    by_batch, by_rows = flow_of(recipe()), flow_of(recipe())
    by_batch.log_prob(table())
    by_rows.initialize(table())
    for name, value in by_batch.state_dict().items():
        torch.testing.assert_close(by_rows.state_dict()[name], value, rtol=1e-4, atol=1e-4)


def test_it_is_worth_nats_and_no_worse_than_a_small_batch() -> None:
    none, by_batch, by_rows = flow_of(recipe()), flow_of(recipe()), flow_of(recipe())
    by_batch.log_prob(table()[:64])
    by_rows.initialize(table())
    fresh = table(6000)[3000:]
    assert log_likelihood(by_rows, fresh) > log_likelihood(by_batch, fresh)
    assert log_likelihood(by_rows, fresh) > log_likelihood(none, fresh) + 100


def test_afterwards_no_batch_starts_anything() -> None:
    flow = flow_of(recipe())
    flow.initialize(table())
    before = state(flow)
    flow.train().log_prob(7 * table(500) + 3)
    assert not changed(flow, before)


def test_weights_modes_statistics_and_random_numbers_stay() -> None:
    random_block = transforms.ResidualTransform(
        LipschitzMLP(FEATURES, [8]), estimator=logdet.RussianRoulette()
    )
    flow = flow_of([*recipe(), random_block, nflows.transforms.BatchNorm(FEATURES)])
    flow._transform._transforms[3].eval()
    modes = [each.training for each in flow.modules()]
    before, random = state(flow), torch.get_rng_state()
    estimators = [each.estimator for each in flow.modules() if hasattr(each, "estimator")]
    flow.initialize(table(40))
    assert torch.equal(torch.get_rng_state(), random)
    assert [each.training for each in flow.modules()] == modes
    assert estimators == [each.estimator for each in flow.modules() if hasattr(each, "estimator")]
    starting = tuple(f"_transform._transforms.{index}." for index in (0, 1, 2, 6))
    assert all(name.startswith(starting) for name in changed(flow, before))
    assert all(each.grad is None for each in flow.parameters())


def test_called_again_it_starts_anew() -> None:
    flow, once = flow_of(recipe()), flow_of(recipe())
    flow.log_prob(10 * table(300))
    flow.initialize(-3 * table())
    flow.initialize(table())
    once.initialize(table())
    for name, value in once.state_dict().items():
        torch.testing.assert_close(flow.state_dict()[name], value, rtol=1e-5, atol=1e-5)


def test_the_number_of_rows_at_a_time_does_not_matter() -> None:
    at_once, in_parts = flow_of(recipe()).double(), flow_of(recipe()).double()
    rows = table(333, torch.float64)
    at_once.initialize(rows, batch_size=10_000)
    in_parts.initialize(rows, batch_size=50)
    for name, value in at_once.state_dict().items():
        torch.testing.assert_close(in_parts.state_dict()[name], value, rtol=1e-7, atol=1e-7)


class Counting(nflows.transforms.IdentityTransform):
    """Remembers how many rows it got, and of what context."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert context is None or context.shape[0] in (1, inputs.shape[0])
        self.sizes.append(inputs.shape[0])
        return inputs, inputs.new_zeros(inputs.shape[0])


class Refusing(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises where a value is read by the host, as a capture of a CUDA graph does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits"
        return func(*args, **(kwargs or {}))


def test_once_started_no_part_reads_a_value() -> None:
    parts = [*recipe()[:3], transforms.LinearTransform(FEATURES), transforms.ActNorm(FEATURES)]
    flow = flow_of(parts)
    flow.initialize(table())
    rows = table(50).requires_grad_()  # no first batch in between
    with Refusing():
        for part in parts:
            part(rows)


def test_act_norm_starts_from_rows_that_are_given() -> None:
    norm = transforms.ActNorm(FEATURES)
    norm(torch.randn(7, FEATURES))
    norm.initialize(table())
    torch.testing.assert_close(norm(table())[0].std(0), torch.ones(3), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="at least one row"):
        norm.initialize(table()[:0])
    with pytest.raises(ValueError, match=r"got \(5, 4\)"):
        norm.initialize(torch.zeros(5, 4))


def test_many_rows_go_through_in_parts() -> None:
    counting = Counting()
    inner = transforms.CompositeTransform([counting, transforms.ActNorm(FEATURES)])
    transforms.initialize(inner, torch.randn(50_000, FEATURES))
    assert max(counting.sizes) == 1024
    assert sum(counting.sizes) == 50_000


@pytest.mark.parametrize(
    "kind", [transforms.CompositeTransform, nflows.transforms.CompositeTransform]
)
def test_nested_composites_start_from_inside(kind: Callable[..., Any]) -> None:
    parts = recipe()
    nested = flow_of([kind(parts[:2]), kind([kind(parts[2:4]), *parts[4:]])])
    plain = flow_of(recipe())
    for flow in (nested, plain):
        flow.initialize(table())
    for value, expected in zip(nested.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


class OfAUser(nflows.transforms.Transform):
    """No composition that is known, with parts inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = recipe()[0], recipe()[2]

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, first = self.norm(inputs)
        outputs, second = self.linear(outputs)
        return outputs, first + second


class Scaling(nflows.transforms.Transform):
    """A part of a user, with a start of its own."""

    starts_from_rows = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(FEATURES))

    def initialize(self, rows: Tensor) -> None:
        self.scale.copy_(1 / rows.std(0))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs * self.scale, self.scale.log().sum().expand(inputs.shape[0])


@pytest.mark.parametrize("factory", [OfAUser, Scaling])
def test_parts_of_a_user_start_too(factory: Callable[[], Any]) -> None:
    own, norm = factory(), transforms.ActNorm(FEATURES)
    composite = transforms.CompositeTransform([own, norm]).double()
    transforms.initialize(composite, table(dtype=torch.float64))
    torch.testing.assert_close(norm.log_scale, torch.zeros(3).double(), rtol=0, atol=1e-3)
    assert not any(each._forward_pre_hooks for each in composite.modules())
    before = state(composite)
    composite(5 * table(dtype=torch.float64))
    assert not changed(composite, before)


def test_a_plain_flow_of_nflows_starts_by_the_function() -> None:
    coupling = nflows.transforms.MaskedAffineAutoregressiveTransform(
        FEATURES, 8, context_features=2
    )
    parts = [nflows.transforms.ActNorm(FEATURES), coupling, nflows.transforms.ActNorm(FEATURES)]
    flow = nflows.flows.Flow(
        nflows.transforms.CompositeTransform(parts), StandardNormal([FEATURES])
    )
    context = torch.randn(3000, 2)
    transforms.initialize(flow._transform, table(), context)
    before = state(flow)
    flow.train().log_prob(5 * table(), context)
    assert not changed(flow, before)
    outputs = flow.transform_to_noise(table(), context)
    torch.testing.assert_close(outputs.std(0), torch.ones(3), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("count", "found"), [(1, 1.0), (3000, 0.0)])
def test_nflows_act_norm_starts_where_its_own_start_would_fail(count: int, found: float) -> None:
    norm = nflows.transforms.ActNorm(FEATURES)
    transforms.initialize(norm, torch.full((count, FEATURES), 7.0))
    assert bool(norm.initialized)
    assert all(bool(each.isfinite().all()) for each in norm.parameters())
    outputs = norm(torch.full((1, FEATURES), 7.0))[0]
    torch.testing.assert_close(outputs, torch.full((1, FEATURES), found))


def test_images_start_scale_by_scale() -> None:
    torch.manual_seed(0)
    images = transforms.dequantize(torch.randint(0, 8, (300, 1, 8, 8)))
    flow = flows.ImageResidualFlow((1, 8, 8), 4, 2, levels=8, num_scales=2)
    flow.initialize(images, batch_size=128)
    norms = [each for each in flow.modules() if isinstance(each, transforms.ActNorm)]
    assert all(bool(each.initialized) for each in norms)
    outputs = flow.transform_to_noise(images).detach()
    torch.testing.assert_close(outputs.std(), torch.ones(()), rtol=0, atol=0.01)
    torch.testing.assert_close(outputs.mean(), torch.zeros(()), rtol=0, atol=0.01)
    before = state(flow)
    flow.train().log_prob(images[:10])
    assert not changed(flow, before)


def test_what_follows_scales_gets_their_noise_in_its_order() -> None:
    scales = transforms.multiscale((1, 8, 8), 2, lambda shape: [transforms.ActNorm(shape[0])])
    last = transforms.ActNorm(64)
    composite = transforms.CompositeTransform([scales, last]).double()
    images = torch.randn(200, 1, 8, 8, dtype=torch.float64) * torch.arange(1, 65).reshape(1, 8, 8)
    transforms.initialize(composite, images, batch_size=64)
    outputs = composite(images)[0].detach()
    torch.testing.assert_close(outputs.std(0), torch.ones(64).double())


def test_a_context_is_embedded_and_goes_along() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(2)
    embedding = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5), norm)
    composite = transforms.CompositeTransform(recipe(context_features=2))
    flow = flows.Flow(composite, flows.StandardNormal([FEATURES]), embedding).double()
    context = torch.randn(500, 4, dtype=torch.float64)
    before = state(norm)
    rows = table(500, torch.float64)
    flow.initialize(rows, context, batch_size=64)
    assert not changed(norm, before)
    assert all(each.training for each in embedding)
    outputs = flow.eval().transform_to_noise(rows, context).detach()
    torch.testing.assert_close(outputs.std(0), torch.ones(3).double())
    with pytest.raises(ValueError, match="one row for each row"):
        flow.initialize(rows, context[:-1])
    with pytest.raises(ValueError, match="context"):
        ResidualFlow(FEATURES, 8, 1, context_features=2).initialize(table())


WRONG: dict[str, tuple[Any, str]] = {
    "another size": (torch.zeros(5, FEATURES + 1), r"\(batch, 3\), got \(5, 4\)"),
    "one row": (torch.zeros(FEATURES), r"\(batch, 3\), got \(3,\)"),
    "no rows": (torch.zeros(0, FEATURES), "at least one row"),
    "no tensor": ([[1.0, 2.0, 3.0]], "must be a tensor, got list"),
    "another precision": (torch.zeros(5, FEATURES, dtype=torch.float64), r"\.to\(torch.float32\)"),
    "NaN": (torch.tensor([[1.0, 2.0, 3.0], [1.0, math.nan, 3.0]]), "1 of 2 rows .* first row 1"),
    "infinity": (torch.tensor([[math.inf, 2.0, 3.0]]), "1 of 1 rows"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_started_from_is_named_and_starts_nothing(name: str) -> None:
    rows, message = WRONG[name]
    flow = ResidualFlow(FEATURES, 8, 2)
    before = state(flow)
    with pytest.raises(ValueError, match=message):
        flow.initialize(rows)
    assert not changed(flow, before)
    assert flow.training


@pytest.mark.parametrize(
    ("scale", "offset"), [(1.0, 0.0), (1.0, 1000.0), (1000.0, 0.0), (0.01, 0.0)]
)
def test_a_context_far_from_unit_scale_is_said(scale: float, offset: float) -> None:
    flow = ResidualFlow(2, 8, num_layers=2, context_features=2)
    context = torch.randn(100, 2)
    context[:, 1] = scale * context[:, 1] + offset
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        flow.initialize(torch.randn(100, 2) * 1000, context)
    said = [str(each.message) for each in caught if "of the context has mean" in str(each.message)]
    assert [each[:7] for each in said] == ([] if (scale, offset) == (1.0, 0.0) else ["value 1"])


def test_contexts_that_need_no_scale_are_not_said() -> None:
    embedded = flows.Flow(
        ResidualFlow(2, 8, num_layers=2, context_features=1)._transform,
        StandardNormal([2]),
        embedding_net=nn.Linear(3, 1),
    )
    rare = torch.nn.functional.one_hot(torch.arange(400) % 200, 200).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedded.initialize(torch.randn(400, 2), 0.001 * torch.randn(400, 3))
        ResidualFlow(2, 8, num_layers=2, context_features=200).initialize(torch.randn(400, 2), rare)


def test_a_batch_size_and_a_context_must_fit() -> None:
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="batch_size"):
            ResidualFlow(FEATURES, 8, 2).initialize(table(), batch_size=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one row for each of the 3000 rows"):
        transforms.initialize(transforms.ActNorm(FEATURES), table(), torch.zeros(7, 2))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_rows_start_it_too(count: int) -> None:
    flow = flow_of(recipe())
    flow.initialize(table(count))
    assert math.isfinite(log_likelihood(flow, table()))
    assert log_likelihood(flow, table(count)) > -50


def test_double_precision_stays_and_the_inverse_is_one() -> None:
    flow = flow_of(recipe()).double()
    rows = table(dtype=torch.float64)
    flow.initialize(rows)
    assert {each.dtype for each in flow.parameters()} == {torch.float64}
    noise = flow.transform_to_noise(rows[:50])
    back = flow._transform.inverse(noise)[0]
    torch.testing.assert_close(back, rows[:50], rtol=1e-9, atol=1e-9)


# --- where a start cannot be stored ---------------------------------------------------------------

STARTING: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "norm": (lambda: transforms.ActNorm(FEATURES), ("log_scale", "shift")),
    "spline": (
        lambda: transforms.ElementwiseRationalQuadraticSpline(
            FEATURES, 4, initialization="quantiles"
        ),
        ("sizes", "log_slopes"),
    ),
    "linear": (
        lambda: transforms.LinearTransform(FEATURES, initialization="whitening"),
        ("factors", "bias"),
    ),
}
every_start = pytest.mark.parametrize("name", STARTING)
every_parameter = pytest.mark.parametrize(
    ("name", "parameter"), [(name, each) for name, case in STARTING.items() for each in case[1]]
)


def skewed(count: int = 500) -> Tensor:
    """Rows of about unit scale from which each part has something to learn."""
    return table(count) / table(count).std(0) - table(count).mean(0) / table(count).std(0) + 0.5


def copies(part: nn.Module, **changes: Tensor) -> dict[str, Tensor]:
    lent = {name: each.detach().clone() for name, each in part.named_parameters()}
    return {**lent, **changes}


@every_start
@pytest.mark.parametrize("with_buffers", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_what_is_lent_starts_where_it_is_lent_and_the_module_waits_on(
    name: str, with_buffers: bool, requires_grad: bool
) -> None:
    """The module was marked as started, and never was."""
    part, started = STARTING[name][0](), STARTING[name][0]()
    expected = started(skewed())[0].detach()
    lent = {key: each.requires_grad_(requires_grad) for key, each in copies(part).items()}
    if with_buffers:
        lent |= {key: each.clone() for key, each in part.named_buffers()}
    for _ in range(2):
        outputs = torch.func.functional_call(part, lent, (skewed(),))[0]
        torch.testing.assert_close(outputs.detach(), expected)
    assert not bool(part.initialized | part.has_learned())
    torch.testing.assert_close(part(skewed())[0].detach(), expected)
    assert bool(part.initialized)


def test_a_flow_waits_on_when_its_parameters_were_lent() -> None:
    torch.manual_seed(0)
    flow = ResidualFlow(2, 8, 1)
    rows, transform = table()[:, :2], flow._transform
    outputs, _ = torch.func.functional_call(transform, copies(transform), (rows,))
    parts = [each for each in transform.modules() if hasattr(each, "initialized")]
    assert not any(bool(each.initialized) for each in parts)
    assert not transform._transforms[2].takes_weight
    torch.testing.assert_close(transform(rows)[0], outputs)
    assert all(bool(each.initialized) for each in parts)


FUNCTIONAL: dict[str, Callable[[Any, Tensor], Any]] = {
    "vmap": lambda part, rows: torch.func.vmap(lambda row: part(row[None])[0])(rows),
    "grad": lambda part, rows: torch.func.grad(lambda each: part(each)[1].sum())(rows),
    "jacrev": lambda part, rows: torch.func.jacrev(lambda each: part(each)[0])(rows),
    "jvp": lambda part, rows: torch.func.jvp(lambda each: part(each)[0], (rows,), (rows,)),
    "grad in what is lent": lambda part, rows: torch.func.grad(
        lambda lent: torch.func.functional_call(part, lent, (rows,))[1].sum()
    )(copies(part)),
}


@every_start
@pytest.mark.parametrize("way", FUNCTIONAL)
def test_inside_torch_func_nothing_starts_and_the_remedy_is_named(name: str, way: str) -> None:
    part, rows = STARTING[name][0](), skewed(10)
    before = state(part)
    with pytest.raises(ValueError, match=r"inside a transform of torch.func.*initialize\(rows\)"):
        FUNCTIONAL[way](part, rows)
    assert not changed(part, before)
    FUNCTIONAL[way](part.eval(), rows)
    part.train().initialize(skewed())
    FUNCTIONAL[way](part, rows)


@every_start
def test_inside_torch_func_what_was_restored_without_its_flag_is_used(name: str) -> None:
    part, started = STARTING[name][0](), STARTING[name][0]()
    started.initialize(skewed())
    part.load_state_dict(copies(started), strict=False)
    outputs = torch.func.vmap(lambda row: part(row[None])[0][0])(skewed())
    torch.testing.assert_close(outputs, started(skewed())[0])


@every_start
@pytest.mark.parametrize("number_started", [0, 1, 2])
def test_an_ensemble_starts_before_it_is_stacked(name: str, number_started: int) -> None:
    parts = [STARTING[name][0]() for _ in range(2)]
    for part in parts[:number_started]:
        part.initialize(skewed())
    base, rows = STARTING[name][0](), skewed()
    stacked = torch.func.stack_module_state(parts)

    def call(*lent: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = torch.func.functional_call(base, lent, (rows,))[0]
        return outputs

    if number_started < 2:
        with pytest.raises(ValueError, match=r"initialize\(rows\) before"):
            torch.func.vmap(call)(*stacked)
    else:
        expected = torch.stack([part(rows)[0] for part in parts])
        torch.testing.assert_close(torch.func.vmap(call)(*stacked), expected)
    assert not bool(base.initialized)


class Kept(nn.Module):
    """A parametrisation under which zeros stay zeros."""

    def forward(self, values: Tensor) -> Tensor:
        return values.clamp(-50, 50)


COMPUTED: dict[str, Callable[[nn.Module, str], object]] = {
    "parametrised": lambda part, name: parametrize.register_parametrization(part, name, Kept()),
    "pruned": lambda part, name: prune.random_unstructured(part, name, 1),
}


@every_parameter
@pytest.mark.parametrize("way", COMPUTED)
def test_a_start_that_would_be_lost_is_refused(name: str, parameter: str, way: str) -> None:
    """It was written to values that are computed anew at each call."""
    part = STARTING[name][0]()
    COMPUTED[way](part, parameter)
    before = state(part)
    message = rf"its {parameter} is no parameter.*initialize\(rows\)"
    for start in (part, part.initialize):
        with pytest.raises(ValueError, match=message):
            start(skewed())
    assert not changed(part, before)
    part.initialized.fill_(True)
    torch.testing.assert_close(part(skewed())[0], skewed(), rtol=1e-5, atol=1e-5)


@every_parameter
@pytest.mark.parametrize("way", COMPUTED)
def test_what_is_computed_from_others_after_its_start_is_used(
    name: str, parameter: str, way: str
) -> None:
    part = STARTING[name][0]()
    part.initialize(skewed())
    COMPUTED[way](part, parameter)
    values = getattr(part, parameter).detach().clone()
    for _ in range(2):
        outputs = part(skewed())[0]
    assert torch.equal(getattr(part, parameter), values)
    torch.testing.assert_close(part.inverse(outputs)[0], skewed(), rtol=1e-4, atol=1e-4)
