"""Transforms and flows in `torch.distributions`: what torch asks of its own, zuko's and Pyro's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from nflows import distributions as nflows_distributions
from nflows import flows as nflows_flows
from nflows import transforms as nflows_transforms
from torch import Tensor, nn
from torch.distributions import (
    ComposeTransform,
    Distribution,
    ExpTransform,
    Independent,
    Normal,
    TransformedDistribution,
)

from nflows_iresnet import ResidualFlow, ResidualTransform, logdet, transforms
from nflows_iresnet.flows import ImageResidualFlow
from nflows_iresnet.interop.distributions import ToTorchDistribution, ToTorchTransform
from nflows_iresnet.nn import LipschitzMLP
from tests.cases import CASES, Case

NAMES = [name for name, case in CASES.items() if not case.is_variant]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _adapted(case: Case, **options: Any) -> ToTorchTransform:
    """Return a case in float64 and evaluation, started from its inputs, for a batch of (2, 2)."""
    transform: Any = case.factory().double()
    transform(case.inputs(), case.context())
    context = case.context()
    return ToTorchTransform(
        transform.eval(),
        None if context is None else context.reshape(2, 2, -1),
        event_dim=case.inputs().dim() - 1,
        **options,
    )


def _values(case: Case) -> Tensor:
    return case.inputs().unflatten(0, (2, 2))


def _exactly(t: ToTorchTransform) -> AbstractContextManager[None]:
    is_block = any(isinstance(each, ResidualTransform) for each in t.modules())
    return transforms.using(t, estimator=logdet.Exact()) if is_block else nullcontext()


def _dense_logabsdet(function: Callable[[Tensor], Tensor], values: Tensor, rank: int) -> Tensor:
    """Return log|det| of each row from the Jacobian of the whole batch, shape (*batch,)."""
    batch = values.shape[: values.dim() - rank]
    count, size = batch.numel(), values.shape[values.dim() - rank :].numel()
    whole = torch.autograd.functional.jacobian(function, values)
    blocks = torch.as_tensor(whole).reshape(count, size, count, size)
    rows = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    assert blocks.abs().sum() == pytest.approx(float(rows.abs().sum()), abs=1e-9)
    return torch.linalg.slogdet(rows).logabsdet.reshape(batch)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_inverse_and_jacobian(name: str) -> None:
    case = CASES[name]
    t, x = _adapted(case), _values(case)
    with _exactly(t):
        y = t(x)
        ladj, back = t.log_abs_det_jacobian(x, y), t.inv.log_abs_det_jacobian(y, x)
    assert y.shape == t.forward_shape(x.shape) == t.inv.inverse_shape(x.shape)
    assert x.shape == t.inverse_shape(y.shape) == t.inv.forward_shape(y.shape)
    assert ladj.shape == back.shape == (2, 2)
    assert t.domain.event_dim == t.codomain.event_dim == t.event_dim == x.dim() - 2
    assert t.domain.check(x).shape == (2, 2)
    torch.testing.assert_close(t.inv(y), x, atol=1e-8, rtol=0)
    torch.testing.assert_close(t(t.inv(y)), y, atol=1e-8, rtol=0)
    torch.testing.assert_close(ladj, _dense_logabsdet(t, x, t.event_dim), atol=1e-8, rtol=0)
    torch.testing.assert_close(back, _dense_logabsdet(t.inv, y, t.event_dim), atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_inverse_of_the_inverse_is_the_transform_itself(name: str) -> None:
    t = _adapted(CASES[name])
    assert t.inv.inv is t
    assert t.inv is t.inv
    assert t.inv.inv.inv == t.inv
    assert t.bijective
    assert t.inv.bijective
    for cached in (t.with_cache(), t.inv.with_cache()):
        assert cached.inv.inv is cached
        assert cached.with_cache(1) is cached
        assert cached.with_cache(0).with_cache(0)._cache_size == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_any_rank_gives_the_numbers_of_its_rows(name: str) -> None:
    case = CASES[name]
    t, inputs, context = _adapted(case), case.inputs(), case.context()
    torch.manual_seed(1)
    expected, logabsdet = t.transform(inputs, context)
    for batch in ((4,), (4, 1), (1, 2, 2), (2, 1, 2)):
        shape = None if context is None else context.reshape(*batch, -1)
        ranked = ToTorchTransform(t.transform, shape, event_dim=t.event_dim)
        torch.manual_seed(1)
        y, ladj = ranked.call_and_ladj(inputs.reshape(*batch, *inputs.shape[1:]))
        assert ladj.shape == batch
        torch.testing.assert_close(y.reshape(expected.shape), expected)
        torch.testing.assert_close(ladj.flatten(), logabsdet)
    alone = None if context is None else context[0]
    y, ladj = ToTorchTransform(t.transform, alone, event_dim=t.event_dim).call_and_ladj(inputs[0])
    assert ladj.shape == ()
    torch.testing.assert_close(y, expected[0])


@pytest.mark.parametrize("name", ["mlp-2", "mlp-context", "linear", "cnn-3-1-3"])
@pytest.mark.parametrize("shape", [(0,), (0, 2, 2), (3, 0, 2, 2)])
def test_an_empty_batch_is_mapped_to_one(name: str, shape: tuple[int, ...]) -> None:
    case = CASES[name]
    t = _adapted(case)
    if len(shape) == 1:
        t = ToTorchTransform(t.transform, None if t.context is None else t.context[0, 0])
        t = ToTorchTransform(t.transform, t.context, event_dim=case.inputs().dim() - 1)
    x = torch.zeros(*shape, *case.inputs().shape[1:], dtype=torch.float64)
    assert t(x).shape == t.inv(x).shape == x.shape
    assert t.log_abs_det_jacobian(x, t(x)).shape == shape


class Counted(nflows_transforms.Transform):
    """y = 2 x with a learned shift, that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))
        self.calls: list[str] = []

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        self.calls.append("forward")
        return 2 * inputs + self.shift, inputs.new_full(inputs.shape[:1], 2.0794415)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        self.calls.append("inverse")
        return (inputs - self.shift) / 2, inputs.new_full(inputs.shape[:1], -2.0794415)


def test_a_log_determinant_after_a_call_costs_nothing_with_a_cache() -> None:
    counted, x = Counted(), torch.randn(4, 3)
    t = ToTorchTransform(counted).with_cache()
    y = t(x)
    assert t(x) is y
    assert t.inv(y) is x
    t.log_abs_det_jacobian(x, y)
    t.inv.log_abs_det_jacobian(y, x)
    assert counted.calls == ["forward"]
    back = t.inv(y.clone())
    assert counted.calls == ["forward", "inverse"]
    assert t.log_abs_det_jacobian(back, y).shape == (4,)
    assert counted.calls == ["forward", "inverse", "forward"]


def test_a_log_determinant_never_costs_an_inverse() -> None:
    counted, x = Counted(), torch.randn(4, 3)
    t = ToTorchTransform(counted)
    base = Independent(Normal(torch.zeros(3), 1.0), 1)
    TransformedDistribution(base, [t.inv]).log_prob(x)
    ComposeTransform([t, ExpTransform()]).log_abs_det_jacobian(x, t(x))
    assert "inverse" not in counted.calls


def test_values_and_log_determinant_of_a_cache_are_of_one_draw() -> None:
    block = ResidualTransform(LipschitzMLP(3, [8]), estimator=logdet.RussianRoulette())
    t, x = ToTorchTransform(block, cache_size=1), torch.randn(4, 3)
    y, ladj = t.call_and_ladj(x)
    assert t.log_abs_det_jacobian(x, y) is ladj
    torch.testing.assert_close(t.inv.log_abs_det_jacobian(y, x), -ladj)
    assert not torch.equal(ToTorchTransform(block).log_abs_det_jacobian(x, y), ladj)


CHANGES: dict[str, Callable[[ToTorchTransform, Tensor], object]] = {
    "a step": lambda t, x: torch.optim.SGD(t.parameters(), 0.1).step(),
    "loaded weights": lambda t, x: t.load_state_dict(
        {name: value + 1 for name, value in t.state_dict().items() if "extra" not in name},
        strict=False,
    ),
    "another precision": lambda t, x: t.double(),
    "mode": lambda t, x: t.train(not t.transform.training),
    "estimator": lambda t, x: setattr(t.transform, "estimator", logdet.PowerSeries(num_terms=3)),
    "inputs in place": lambda t, x: x.add_(1),
    "clear_cache": lambda t, x: t.clear_cache(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_does_not_survive(change: str) -> None:
    t = ToTorchTransform(ResidualTransform(LipschitzMLP(3, [8])), cache_size=1)
    x = torch.randn(4, 3)
    y = t(x)
    y.square().sum().backward()
    CHANGES[change](t, x)
    again = t(x.double() if change == "another precision" else x)
    assert again is not y
    plain = ToTorchTransform(t.transform)(x.to(again))
    torch.testing.assert_close(again, plain)


def test_samples_without_a_graph_are_scored_with_one() -> None:
    """Torch's own caches return the noise of `sample`, cut off from the weights."""
    t = ToTorchTransform(ResidualTransform(LipschitzMLP(3, [8])), cache_size=1)
    distribution = TransformedDistribution(Independent(Normal(torch.zeros(3), 1.0), 1), [t.inv])
    samples = distribution.sample((4,))
    distribution.log_prob(samples).sum().backward()
    cached = [each.grad.clone() for each in t.parameters() if each.grad is not None]
    t.zero_grad()
    plain = TransformedDistribution(distribution.base_dist, [t.with_cache(0).inv])
    plain.log_prob(samples).sum().backward()
    expected = [each.grad for each in t.parameters() if each.grad is not None]
    torch.testing.assert_close(cached, expected)
    assert len(cached) == len(list(t.parameters()))


def test_a_reversed_graph_is_an_error_never_another_gradient() -> None:
    t = ToTorchTransform(ResidualTransform(LipschitzMLP(3, [8])), cache_size=1)
    noise = torch.randn(4, 3)
    data = t.inv(noise)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(t(data).sum(), data)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(t.log_abs_det_jacobian(data, noise).sum(), data)


def _flow(**options: Any) -> ResidualFlow:
    flow = ResidualFlow(3, 8, 2, **options)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    flow.log_prob(torch.randn(8, 3), *([torch.randn(8, 2)] if options else []))
    return flow.eval()


def test_a_distribution_has_the_numbers_of_its_flow() -> None:
    flow = _flow()
    distribution = ToTorchDistribution(flow)
    torch.manual_seed(3)
    expected = flow.sample(6)
    torch.manual_seed(3)
    samples = distribution.rsample((2, 3))
    assert torch.equal(samples.flatten(0, 1), expected)
    assert torch.equal(distribution.log_prob(samples).flatten(), flow.log_prob(expected))
    assert distribution.batch_shape == ()
    assert distribution.event_shape == (3,)
    assert distribution.rsample().shape == (3,)
    assert distribution.log_prob(samples[0, 0]).shape == ()
    assert not distribution.sample((2,)).requires_grad


def test_a_distribution_is_the_transformed_distribution_that_it_says() -> None:
    flow, context = _flow(context_features=2), torch.randn(4, 2)
    distribution = ToTorchDistribution(flow, context)
    plain = TransformedDistribution(distribution.base_dist, distribution.transforms)
    values = distribution.sample((5,))
    torch.testing.assert_close(plain.log_prob(values), distribution.log_prob(values))
    assert plain.batch_shape == distribution.batch_shape == (4,)
    assert plain.event_shape == distribution.event_shape == (3,)
    assert plain.rsample((2, 3)).shape == distribution.rsample((2, 3)).shape == (2, 3, 4, 3)
    assert distribution.support.check(values).all()
    base = Independent(Normal(torch.zeros(3), 1.0), 1)
    broadcast = TransformedDistribution(base, [ToTorchTransform(flow, context).inv])
    assert broadcast.batch_shape == (4,)
    torch.testing.assert_close(broadcast.log_prob(values), distribution.log_prob(values))


def test_each_sample_belongs_to_its_own_context() -> None:
    flow = ResidualFlow(1, 8, 1, context_features=1).eval()
    affine = next(each for each in flow.modules() if isinstance(each, transforms.ConditionalAffine))
    final = [each for each in affine.net.modules() if isinstance(each, nn.Linear)][-1]
    with torch.no_grad():
        final.weight.normal_()
    distribution = ToTorchDistribution(flow, torch.tensor([[[-30.0], [30.0]], [[-10.0], [10.0]]]))
    samples = distribution.sample((50,))
    assert samples.shape == (50, 2, 2, 1)
    own = distribution.log_prob(samples)
    others = distribution.log_prob(samples.flip(1, 2))
    # of both of a pair, whose entropies then cancel: what is left are divergences
    gained = (own - others).mean(0)
    assert bool((gained + gained.flip(0, 1) > 1).all())


@pytest.mark.parametrize("batch", [(), (1,), (2, 4), (5, 1, 4)])
def test_an_expanded_distribution_repeats_its_context(batch: tuple[int, ...]) -> None:
    flow, context = _flow(context_features=2), torch.randn(4, 2)
    one = ToTorchDistribution(flow, context[0])
    expanded = one.expand(batch)
    assert isinstance(expanded, ToTorchDistribution)
    assert expanded.batch_shape == batch
    assert expanded.base_dist.batch_shape == batch
    values = expanded.rsample((3,))
    assert values.shape == (3, *batch, 3)
    assert expanded.log_prob(values).shape == (3, *batch)
    torch.testing.assert_close(expanded.log_prob(values), one.log_prob(values))
    if batch[-1:] == (4,):
        whole = ToTorchDistribution(flow, context)
        four = whole.expand(batch)
        values = four.sample((3,))
        torch.testing.assert_close(four.log_prob(values), whole.log_prob(values))
    free = ToTorchDistribution(_flow()).expand(batch)
    assert free.sample((3,)).shape == (3, *batch, 3)
    assert free.log_prob(torch.zeros(3)).shape == batch


def test_gradients_are_those_of_the_flow() -> None:
    flow, context = _flow(context_features=2), torch.randn(4, 2, requires_grad=True)
    values = torch.randn(4, 3)
    targets = [context, *flow.parameters()]

    def gradients(log_prob: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(log_prob.sum(), targets, materialize_grads=True)

    expected = gradients(flow.log_prob(values, context))
    distribution = ToTorchDistribution(flow, context)
    torch.testing.assert_close(gradients(distribution.log_prob(values)), expected)
    plain = TransformedDistribution(distribution.base_dist, distribution.transforms)
    torch.testing.assert_close(gradients(plain.log_prob(values)), expected)
    moved = gradients(distribution.rsample((2,)))
    assert all(bool(each.isfinite().all()) for each in moved)
    assert bool(moved[0].any())


def test_the_density_integrates_to_one() -> None:
    torch.manual_seed(5)
    flow = ResidualFlow(1, 16, 2).double()
    flow.log_prob(torch.randn(64, 1, dtype=torch.float64))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    grid = torch.linspace(-60, 60, 20001, dtype=torch.float64)[:, None]
    distribution = ToTorchDistribution(flow.eval())
    assert torch.trapezoid(distribution.log_prob(grid).exp(), grid[:, 0]).item() == pytest.approx(
        1, abs=1e-3
    )
    positive = TransformedDistribution(distribution, [ExpTransform()])
    values = grid[9000:11000:400].exp()
    expected = distribution.log_prob(values.log()) - values.log()[:, 0]
    torch.testing.assert_close(positive.log_prob(values), expected)


def test_rows_may_change_their_shape() -> None:
    images = torch.randn(3, 2, 1, 4, 4)
    squeeze = ToTorchTransform(
        transforms.SqueezeTransform(), shapes=((1, 4, 4), (4, 2, 2)), cache_size=1
    )
    y = squeeze(images)
    assert y.shape == squeeze.forward_shape(images.shape) == (3, 2, 4, 2, 2)
    assert squeeze.inverse_shape(y.shape) == images.shape
    assert torch.equal(squeeze.with_cache(0).inv(y), images)
    flow = ImageResidualFlow((1, 4, 4), 4, 1, num_scales=1, levels=17).eval()
    t = ToTorchTransform(flow)
    assert (t.domain.event_dim, t.codomain.event_dim) == (3, 1)
    with pytest.raises(ValueError, match="event_dim"):
        _ = t.event_dim
    assert t.forward_shape((5, 1, 4, 4)) == (5, 16)
    distribution = ToTorchDistribution(flow)
    samples = distribution.sample((2, 3))
    assert samples.shape == (2, 3, 1, 4, 4)
    assert 0 <= float(samples.min()) <= float(samples.max()) < 17
    plain = TransformedDistribution(distribution.base_dist, [t.inv])
    assert plain.event_shape == (1, 4, 4)
    with transforms.using(flow, estimator=logdet.Exact()):
        torch.testing.assert_close(plain.log_prob(samples), distribution.log_prob(samples))


def test_flows_of_nflows_are_taken_too() -> None:
    maf = nflows_flows.MaskedAutoregressiveFlow(3, 8, 2, 1).eval()
    distribution = ToTorchDistribution(maf)
    values = distribution.sample((4, 2))
    assert torch.equal(distribution.log_prob(values).flatten(), maf.log_prob(values.flatten(0, 1)))
    base = nflows_distributions.ConditionalDiagonalNormal([3], nn.Linear(2, 6))
    flow = nflows_flows.Flow(ResidualTransform(LipschitzMLP(3, [8], 2)), base, nn.Linear(5, 2))
    conditional = ToTorchDistribution(flow, torch.randn(4, 5))
    values = conditional.rsample((6,))
    plain = TransformedDistribution(conditional.base_dist, conditional.transforms)
    assert plain.rsample((6,)).shape == values.shape == (6, 4, 3)
    torch.testing.assert_close(plain.log_prob(values), conditional.log_prob(values))


def test_samples_without_derivatives_say_so() -> None:
    base = nflows_distributions.MADEMoG(3, 8, None, num_mixture_components=2)
    base._shape = torch.Size([3])
    flow = nflows_flows.Flow(ResidualTransform(LipschitzMLP(3, [8])), base)
    distribution = ToTorchDistribution(flow)
    assert not distribution.has_rsample
    with pytest.raises(NotImplementedError, match=r"MADEMoG.*sample\(\)"):
        distribution.rsample()


def test_precision_and_place_are_those_of_the_flow_at_any_time() -> None:
    flow = _flow(context_features=2)
    t = ToTorchTransform(flow, torch.randn(2))
    free = ToTorchDistribution(_flow())
    t.double()
    free.flow.double()
    assert t.context is not None
    assert t.context.dtype == torch.float64
    assert t(torch.zeros(4, 3, dtype=torch.float64)).dtype == torch.float64
    assert free.sample().dtype == free.base_dist.sample().dtype == torch.float64
    assert set(dict(t.named_parameters())) == {f"transform.{n}" for n, _ in flow.named_parameters()}
    assert "context" not in t.state_dict()


def test_copies_and_pickles_are_whole() -> None:
    flow, context = _flow(context_features=2), torch.randn(4, 2)
    distribution = ToTorchDistribution(flow, context)
    plain = TransformedDistribution(
        Independent(Normal(torch.zeros(3), 1.0), 1),
        [ToTorchTransform(flow, context, cache_size=1).inv],
    )
    values = distribution.rsample()
    expected = plain.log_prob(values)
    for original in (distribution, plain):
        for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            torch.testing.assert_close(copied.log_prob(values), expected)
            inverse: Any = copied.transforms[0]
            assert inverse.inv.inv is inverse
            assert inverse.inv.transform is not flow


class Wrong:
    def __repr__(self) -> str:
        return "something else"


ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "class": (lambda: ToTorchTransform(ResidualTransform), "got ResidualTransform"),
    "no transform": (lambda: ToTorchTransform(Wrong()), "got something else"),
    "no flow": (lambda: ToTorchDistribution(Counted()), r"got Counted\(\).*ToTorchTransform"),
    "event_dim": (lambda: ToTorchTransform(Counted(), event_dim=0), "event_dim.*got 0"),
    "cache_size": (lambda: ToTorchTransform(Counted(), cache_size=2), "cache_size"),
    "context": (lambda: ToTorchTransform(Counted(), torch.tensor(1.0)), r"got shape \(\)"),
    "context type": (lambda: ToTorchTransform(Counted(), Wrong()), "got something else"),  # type: ignore[arg-type]
    "a number": (lambda: ToTorchTransform(Counted())(torch.tensor(1.0)), r"got \(\)"),
    "a list": (lambda: ToTorchTransform(Counted())([1.0]), "got list"),  # type: ignore[arg-type]
    "row": (
        lambda: ToTorchDistribution(_flow(), validate_args=False).log_prob(torch.zeros(4, 2)),
        r"shape \(3,\).*got \(4, 2\)",
    ),
    "not a number": (
        lambda: ToTorchDistribution(_flow(), validate_args=True).log_prob(
            torch.full((3,), torch.nan)
        ),
        "within the support",
    ),
    "batch": (
        lambda: ToTorchTransform(Counted(), torch.zeros(5, 2))(torch.zeros(4, 3)),
        r"\(4,\) do not broadcast.*\(5,\)",
    ),
    "batch of a distribution": (
        lambda: ToTorchDistribution(
            _flow(context_features=2), torch.zeros(5, 2), validate_args=False
        ).log_prob(torch.zeros(4, 3)),
        r"\(4,\) do not broadcast.*\(5,\)",
    ),
    "context forgotten": (
        lambda: ToTorchDistribution(_flow(context_features=2)).sample(),
        "context",
    ),
    "precision": (
        lambda: ToTorchTransform(_flow())(torch.zeros(4, 3, dtype=torch.float64)),
        "float64",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_name_the_value(error: str) -> None:
    call, message = ERRORS[error]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


def test_the_sign_is_not_known() -> None:
    with pytest.raises(NotImplementedError, match="Counted is not known"):
        _ = ToTorchTransform(Counted()).inv.sign


def test_transforms_of_zuko_and_ours_compose() -> None:
    zuko = pytest.importorskip("zuko")
    block = ResidualTransform(LipschitzMLP(3, [16, 16])).double()
    t = ToTorchTransform(block, cache_size=1)
    base = zuko.distributions.DiagNormal(*torch.tensor([[0.0] * 3, [1.0] * 3]).double())
    rotation = zuko.transforms.RotationTransform(torch.randn(3, 3).double())
    composed = zuko.transforms.ComposedTransform(rotation, t)
    flow = zuko.distributions.NormalizingFlow(composed, base)
    samples, log_prob = flow.rsample_and_log_prob((5, 2))
    torch.testing.assert_close(flow.log_prob(samples), log_prob, atol=1e-9, rtol=0)
    noise, logabsdet = block(rotation(samples).flatten(0, 1))
    expected = (base.log_prob(noise) + logabsdet).unflatten(0, (5, 2))
    torch.testing.assert_close(log_prob, expected, atol=1e-9, rtol=0)
    dense = _dense_logabsdet(composed, samples.detach(), 1)
    torch.testing.assert_close(composed.call_and_ladj(samples)[1], dense, atol=1e-9, rtol=0)
    assert flow.expand((4,)).sample((2,)).shape == (2, 4, 3)


def test_a_lazy_flow_of_zuko_trains_our_blocks() -> None:
    zuko = pytest.importorskip("zuko")
    lazy = zuko.lazy
    blocks = [ToTorchTransform(ResidualTransform(LipschitzMLP(2, [16]))) for _ in range(2)]
    flow = zuko.flows.Flow(
        [lazy.UnconditionalTransform(lambda t=each: t) for each in blocks],
        lazy.UnconditionalDistribution(
            zuko.distributions.DiagNormal, torch.zeros(2), torch.ones(2), buffer=True
        ),
    )
    data = 0.3 * torch.randn(256, 2)
    optimizer = torch.optim.Adam([p for each in blocks for p in each.parameters()], 1e-2)
    losses = []
    for _ in range(30):
        loss = -flow().log_prob(data).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2
    assert flow().sample((3,)).shape == (3, 2)


def test_pyro_trains_a_flow_as_model_and_as_guide() -> None:
    pyro = pytest.importorskip("pyro")
    dist, infer = pyro.distributions, pytest.importorskip("pyro.infer")
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    t = ToTorchTransform(ResidualTransform(LipschitzMLP(2, [16])), cache_size=1)
    centre = torch.tensor([0.7, -0.4])

    def model() -> None:
        pyro.sample("z", dist.Normal(centre, 0.5).to_event(1))

    def guide() -> None:
        pyro.module("block", t)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [t.inv]))

    bound = infer.Trace_ELBO(num_particles=8)
    training = infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), bound)
    losses = [training.step() for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 1
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [t.inv])
    flow.clear_cache()
    assert flow.log_prob(flow.sample((3, 4))).shape == (3, 4)


def test_a_distribution_is_a_prior_of_sbi() -> None:
    checks = pytest.importorskip("sbi.utils.user_input_checks")
    prior, size, is_numpy = checks.process_prior(ToTorchDistribution(_flow()))
    assert size == 3
    assert not is_numpy
    assert isinstance(prior, Distribution)
    checks.check_prior_batch_behavior(prior)


def test_the_cache_forgets_what_begins_to_be_trained() -> None:
    block = ResidualTransform(LipschitzMLP(2, [8]))
    transform, x = ToTorchTransform(block, cache_size=1), torch.randn(4, 2)
    parameter = next(transform.parameters())
    parameter.requires_grad_(False)
    transform(x)
    parameter.requires_grad_(True)
    transform(x).square().sum().backward()
    assert parameter.grad is not None
