"""What a careful reader found: numbers that nobody asked for, in places that nobody looks at."""

from __future__ import annotations

import math

import pytest
import torch
from nflows.transforms import CompositeTransform, InverseTransform, Transform
from torch import Tensor

from nflows_iresnet import ResidualFlow, flows, logdet, nn, transforms
from nflows_iresnet.linearization import bind

Spline = transforms.ElementwiseRationalQuadraticSpline


class Importance(flows.StandardNormal):
    """A base that resamples by the density of another flow."""

    def __init__(self, proposal: flows.Flow) -> None:
        super().__init__([2])
        self.proposal = proposal

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        candidates = torch.randn(20 * num_samples, 2)
        weights = self.proposal.log_prob(candidates)
        assert bool(weights.isfinite().all())
        return candidates[weights.topk(num_samples).indices]


class Checking(Transform):
    """A transform that looks at the log-determinant of its part."""

    def __init__(self, part: Transform) -> None:
        super().__init__()
        self.part = part

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, logabsdet = self.part.inverse(inputs, context)
        assert bool(logabsdet.isfinite().all())
        return outputs, logabsdet


def block() -> transforms.ResidualTransform:
    return transforms.ResidualTransform(nn.LipschitzMLP(2, [8]))


def test_samples_leave_the_densities_of_other_flows_alone() -> None:
    inner = flows.Flow(InverseTransform(block()), flows.StandardNormal([2]))
    assert flows.Flow(block(), Importance(inner)).sample(5).shape == (5, 2)


def test_transforms_of_others_get_the_log_determinants_they_may_look_at() -> None:
    parts = CompositeTransform([Checking(block()), block()])
    assert flows.Flow(parts, flows.StandardNormal([2])).sample(5).shape == (5, 2)


def spline(dtype: torch.dtype, width: float, log_slope: float) -> Spline:
    torch.manual_seed(0)
    module = Spline(6)
    torch.nn.init.normal_(module.sizes, std=width)
    torch.nn.init.normal_(module.log_slopes, std=log_slope)
    return module.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_splines_in_half_precision_are_finite(dtype: torch.dtype) -> None:
    module, inputs = spline(dtype, 3.0, 1.0), torch.randn(200, 6).to(dtype)
    for method in (module.forward, module.inverse):
        outputs, logabsdet = method(inputs)
        assert outputs.dtype == logabsdet.dtype == dtype
        assert bool(outputs.isfinite().all() and logabsdet.isfinite().all())


@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_splines_in_float32_are_those_in_float64(method: str) -> None:
    module = spline(torch.float32, 10.0, 3.0)
    inputs = 2 * torch.randn(500, 6)
    found = getattr(module, method)(inputs)
    exact = getattr(module.double(), method)(inputs.double())
    for value, reference in zip(found, exact, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-6, atol=1e-6)


def test_traces_have_batched_gradients() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 4, requires_grad=True)
    trace = bind(nn.LipschitzMLP(4, [16, 16])).linearize(inputs).trace()
    (batched,) = torch.autograd.grad(
        trace, inputs, torch.eye(3), is_grads_batched=True, retain_graph=True
    )
    (together,) = torch.autograd.grad(trace.sum(), inputs)
    torch.testing.assert_close(batched.sum(0), together)


@pytest.mark.parametrize("squarings", [1, 7])
def test_norms_do_not_feel_autocast(squarings: int) -> None:
    torch.manual_seed(0)
    norm, weight = nn.SchattenNorm(squarings), torch.randn(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm(weight)
    torch.testing.assert_close(found, norm(weight))
    assert found >= torch.linalg.matrix_norm(weight.double(), 2)


def test_subnormal_weights_have_a_norm() -> None:
    weight = torch.rand(30, 20, dtype=torch.float64) * 1e-320
    assert nn.SchattenNorm()(weight) >= torch.linalg.matrix_norm(weight, 2) > 0


@pytest.mark.parametrize("rows", [3072, 1024])
def test_a_context_of_another_length_is_refused_without_a_graph_too(rows: int) -> None:
    net = nn.LipschitzMLP(2, [64], 3, activation=nn.MaxMin())
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        net(torch.randn(2048, 2), torch.randn(rows, 3))


@pytest.mark.parametrize("kind", [nn.SmoothAbs, nn.Sine])
def test_hooks_of_activations_run_without_a_graph(kind: type[nn.Activation]) -> None:
    net = nn.LipschitzMLP(2, [8], activation=kind())
    net.activations[0].register_forward_hook(lambda module, given, outputs: 0.5 * outputs)
    inputs = torch.randn(5, 2)
    with torch.no_grad():
        found = net(inputs)
    torch.testing.assert_close(found, net(inputs))


def test_halves_of_mixed_activations_keep_their_inputs() -> None:
    class Keeping(nn.Activation):
        def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            self.seen = inputs
            return inputs.tanh(), 1 - inputs.tanh().square()

    keeping = Keeping()
    activation, units = nn.Mixed(keeping, nn.Sine()), torch.randn(4, 6)
    before = units[:, :3].clone()
    activation(units)
    torch.testing.assert_close(keeping.seen, before)


def test_the_bound_of_the_variance_bounds_the_whole_sum() -> None:
    """Against the double sum with as many terms as matter, for a slowly falling law."""
    bound, terms = 0.9, 600
    estimator = logdet.RussianRoulette(num_exact_terms=2)
    sizes = [bound**k / k for k in range(1, terms)]
    exact = sum(
        a * b / estimator.survival(min(j, k), bound)
        for j, a in enumerate(sizes, 1)
        for k, b in enumerate(sizes, 1)
    )
    found = estimator.variance_bound(bound, features=1)
    assert exact <= found == pytest.approx(exact, rel=1e-6)


def test_a_law_that_never_continues_has_no_bound() -> None:
    estimator = logdet.RussianRoulette(truncation=logdet.LipschitzTruncation(300.0))
    assert estimator.variance_bound(0.9, features=2) == math.inf


def test_models_in_half_precision_are_finite() -> None:
    flow = ResidualFlow(6, 16, 2).eval()
    for module in flow.modules():
        if isinstance(module, Spline):
            torch.nn.init.normal_(module.sizes, std=3.0)
    assert bool(flow.bfloat16().log_prob(torch.randn(50, 6).bfloat16()).isfinite().all())
