"""Claims that are wrong, modules changed from outside, precisions that nobody asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import nn as torch_nn

from nflows_iresnet import ResidualFlow, flows, linearization, logdet, nn, transforms
from nflows_iresnet.flows.lipschitz import lipschitz_constants
from nflows_iresnet.linearization import OpaqueFunction, ResidualFunction
from nflows_iresnet.solvers import (
    Accelerator,
    Anderson,
    FixedPointIteration,
    FixedPointNotConverged,
    Progress,
    Solver,
)


@pytest.mark.parametrize("solver", [Anderson(), FixedPointIteration()])
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: 2 * x + 1,
        lambda x: x.square() + 1,
        lambda x: x.exp(),
        lambda x: torch.where(x < 1.5, x + 1, x * torch.inf),
    ],
    ids=["expanding", "square", "exp", "overflowing"],
)
def test_a_false_bound_does_not_make_a_solution(
    solver: Solver, fn: Callable[[Tensor], Tensor]
) -> None:
    """The rounding that is allowed is that of the point returned, not of where it escaped to."""
    try:
        solution = solver(fn, torch.ones(1, 1), 0.97)
    except FixedPointNotConverged:
        return
    torch.testing.assert_close(fn(solution.value), solution.value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_recomputing_uses_the_estimator_of_the_forward_pass(recompute: bool, inside: bool) -> None:
    short = logdet.PowerSeries(num_terms=1, exact_trace=False)
    long = logdet.PowerSeries(num_terms=20, exact_trace=False)
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    flow = ResidualFlow(4, 16, 2, recompute=recompute, estimator=short)
    expected = ResidualFlow(4, 16, 2, estimator=long)
    flow.log_prob(inputs)
    expected.load_state_dict(flow.state_dict())
    torch.manual_seed(2)
    with transforms.using(flow, estimator=long):
        loss = flow.log_prob(inputs).mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    torch.manual_seed(2)
    expected.log_prob(inputs).mean().backward()
    for left, right in zip(flow.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad)


def test_recomputing_leaves_stateful_norms_alone() -> None:
    """Power iteration advances once per step, wherever its block is."""
    inputs, results = torch.randn(8, 4), []
    for recompute in (False, True):
        torch.manual_seed(1)
        norm = nn.PowerIteration(num_initial_steps=1)
        blocks = [transforms.ResidualTransform(nn.LipschitzMLP(4, [16], norm=norm)) for _ in "ab"]
        blocks[0].register_forward_hook(lambda *_: None)
        nested = transforms.CompositeTransform(blocks)
        composite = transforms.CompositeTransform([nested, *blocks], recompute=recompute)
        composite(inputs)[0].square().sum().backward()
        buffers = list(composite.buffers())
        results.append([*buffers, *[each.grad for each in composite.parameters()]])
    torch.testing.assert_close(results[0], results[1])


def test_the_certificate_holds_inside_autocast() -> None:
    """bfloat16 products would make a norm of rank-one weights too small."""
    torch.manual_seed(0)
    for _ in range(20):
        net = nn.LipschitzMLP(17, [17])
        with torch.no_grad():
            for layer in net.layers:
                rank_one = torch.outer(torch.randn(17), torch.randn(17))
                layer.weight.copy_(5 * rank_one)  # type: ignore[operator]
        with torch.autocast("cpu", torch.bfloat16):
            assert net.lipschitz_bound() <= 0.97


class FastSine(nn.Sine):
    """Another slope, and the curvature of the sine that it inherits."""

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return (2 * inputs).sin() / 2, (2 * inputs).cos()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.value_and_slope(inputs)[0]


class Doubled:
    """Values and slopes of twice the inputs, for whatever activation comes after it."""

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = super().value_and_slope(2 * inputs)  # type: ignore[misc]
        return value / 2, slope


class DoubledSine(Doubled, nn.Sine):
    """What it inherits from the sine alone would be that of another function."""


class LearnedSine(nn.Sine):
    """A parameter, which no hand-written derivative knows of."""

    phase: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.phase = torch.nn.Parameter(torch.zeros(()))

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return (inputs + self.phase).sin(), (inputs + self.phase).cos()

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        return -value

    def forward(self, inputs: Tensor) -> Tensor:
        return self.value_and_slope(inputs)[0]


@pytest.mark.parametrize(
    "activation",
    [
        FastSine(),
        LearnedSine(),
        DoubledSine(),
        nn.Mixed(FastSine(), nn.SmoothAbs()),
        nn.Mixed(nn.SmoothAbs(), DoubledSine()),
    ],
)
def test_activations_of_ones_own_have_their_own_derivatives(activation: nn.Activation) -> None:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(2, [6, 6], activation=activation).double()
    block = transforms.ResidualTransform(net, estimator=logdet.Exact())
    inputs = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (inputs,))
    block(inputs)[1].sum().backward()
    phases = [value for name, value in net.named_parameters() if "phase" in name]
    assert all(phase.grad is not None and phase.grad != 0 for phase in phases)


def test_one_context_for_all_rows() -> None:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(2, [6, 5], 3).double()
    block = transforms.ResidualTransform(net)
    inputs = torch.randn(400, 2).double() * torch.logspace(-6, 6, 400).double()[:, None]
    context = torch.randn(1, 3).double()
    outputs, _ = block(inputs, context)
    torch.testing.assert_close(block.inverse(outputs, context)[0], inputs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("features", [2, 8])
def test_batched_gradients(features: int) -> None:
    torch.manual_seed(0)
    flow = ResidualFlow(features, 8, 2, estimator=logdet.Exact()).double()
    inputs = torch.randn(4, features).double()
    flow.log_prob(inputs)
    both = [
        torch.autograd.functional.jacobian(flow.log_prob, inputs, vectorize=vectorize)
        for vectorize in (True, False)
    ]
    torch.testing.assert_close(both[0], both[1])


class Halved(transforms.ResidualTransform):
    """Overrides what it is bound to."""

    def bind(self, context: Tensor | None = None) -> ResidualFunction:
        function = super().bind(context)
        halved = OpaqueFunction(lambda inputs: 0.5 * function(inputs))
        halved.lipschitz = 0.5
        return halved


def test_a_composite_respects_overrides_of_classes_and_of_instances() -> None:
    torch.manual_seed(0)
    halved = Halved(nn.LipschitzMLP(2, [8]))
    inputs = torch.randn(4, 2)
    composite = transforms.CompositeTransform([halved])
    torch.testing.assert_close(composite(inputs)[0], halved(inputs)[0])
    wrapped = transforms.ResidualTransform(nn.LipschitzMLP(2, [8]))
    setattr(wrapped, "forward", lambda inputs, context=None: (inputs, inputs.sum(1)))  # noqa: B010
    torch.testing.assert_close(transforms.CompositeTransform([wrapped])(inputs)[0], inputs)


@dataclass
class Remembering(Accelerator):
    """Keeps a tensor per row, and does not know that rows can be left out."""

    before: list[Tensor] = field(default_factory=list)

    def propose(self, point: Tensor, image: Tensor, best: Progress) -> Tensor:
        self.before.append(image)
        return image + 0 * self.before[0]


@dataclass(frozen=True)
class RememberingSolver(Solver):
    """A solver of a user."""

    def start(self, init: Tensor) -> Accelerator:
        return Remembering()


def test_accelerators_that_cannot_select_keep_all_rows() -> None:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(2, [8]).double()
    block = transforms.ResidualTransform(net, solver=RememberingSolver())
    inputs = torch.randn(1000, 2).double() * torch.logspace(-3, 4, 1000).double()[:, None]
    outputs, _ = block(inputs)
    torch.testing.assert_close(block.inverse(outputs)[0], inputs, rtol=1e-9, atol=1e-9)


def test_weights_that_are_not_finite_are_named() -> None:
    net = nn.LipschitzMLP(2, [8])
    with torch.no_grad():
        net.layers[0].weight.fill_(torch.nan)  # type: ignore[operator]
    with pytest.raises(ValueError, match="training has diverged"):
        net(torch.zeros(3, 2))


def test_act_norm_starts_right_far_from_zero() -> None:
    """Time stamps in seconds: squares of 1e9 leave nothing of a variance of one."""
    torch.manual_seed(0)
    inputs = 1.6e9 + torch.randn(2000, 2, dtype=torch.float64)
    outputs, _ = transforms.ActNorm(2).double()(inputs)
    torch.testing.assert_close(outputs.std(0), torch.ones(2).double(), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_false_bound_near_what_rounding_excuses_does_not_make_a_solution(
    dtype: torch.dtype,
) -> None:
    class Untrue(torch.nn.Module):
        lipschitz = 1 - 1e-6 if dtype == torch.float32 else 0.97

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2.5 * torch.sin(3 * inputs)

    torch.manual_seed(0)
    block = transforms.ResidualTransform(Untrue(), estimator=logdet.Exact())
    with pytest.raises(FixedPointNotConverged):
        block.inverse(torch.randn(64, 2).to(dtype))


class LentSine(LearnedSine):
    """The same with a buffer, through which a gradient may go to what made it."""

    def __init__(self) -> None:
        super().__init__()
        del self.phase
        self.register_buffer("phase", torch.zeros(()))


class Wrapped(nn.Sine):
    """What it is made of is in a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = LentSine()

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.value_and_slope(inputs)

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        return -value


@pytest.mark.parametrize(
    "activation", [LentSine(), Wrapped(), nn.Mixed(LentSine(), nn.SmoothAbs())]
)
def test_buffers_of_activations_get_their_gradients(activation: nn.Activation) -> None:
    """What differences of the log-determinant say of the same change of all phases."""
    torch.manual_seed(0)
    net = nn.LipschitzMLP(2, [6, 6], activation=activation).double()
    block = transforms.ResidualTransform(net, estimator=logdet.Exact())
    inputs = torch.randn(3, 2, dtype=torch.float64)
    holders = [each for each in net.modules() if isinstance(each, LentSine)]

    def total(phase: Tensor) -> Tensor:
        for each in holders:
            each.phase = phase
        return block(inputs)[1].sum()

    with torch.no_grad():
        step = torch.tensor(1e-5, dtype=torch.float64)
        slope = (total(step) - total(-step)) / (2 * step)
    phase = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(total(phase), phase, allow_unused=True)
    assert float(slope.abs()) > 1e-3
    torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-8)


class ShiftedMixture(nn.Mixed):
    """Two halves that have curvatures, and a function that has others."""

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (inputs + 1).tensor_split(2, dim=-1)
        pairs = self.first.value_and_slope(first), self.second.value_and_slope(second)
        values, slopes = (torch.cat(parts, dim=-1) for parts in zip(*pairs, strict=True))
        return values, slopes


def test_a_mixture_of_ones_own_has_no_curvature_of_others() -> None:
    torch.manual_seed(0)
    activation = ShiftedMixture(nn.Sine(), nn.SmoothAbs())
    block = transforms.ResidualTransform(
        nn.LipschitzMLP(2, [6, 6], activation=activation).double(), estimator=logdet.Exact()
    )
    inputs = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (inputs,))


class Tempered(nn.Activation):
    """tanh(b x) / b for a number b that is no parameter, with a curvature that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steepness", torch.ones(()))

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        values = (self.steepness * inputs).tanh()  # type: ignore[operator]
        return values / self.steepness, 1 - values.square()  # type: ignore[operator]

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        return -2 * self.steepness.square() * value * slope  # type: ignore[operator]


def test_gradients_are_those_of_the_buffers_of_the_forward_pass() -> None:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(2, [6, 6], activation=Tempered()).double()
    block = transforms.ResidualTransform(net, estimator=logdet.Exact())
    inputs = torch.randn(3, 2).double()
    own = {name: each for name, each in block.named_parameters() if name != "net.layers.2.bias"}
    lent = {name: 3 * each for name, each in block.named_buffers() if "steepness" in name}
    found = torch.autograd.grad(
        torch.func.functional_call(block, lent, (inputs,))[1].sum(), list(own.values())
    )
    for name in lent:
        block.get_buffer(name).fill_(3.0)
    expected = torch.autograd.grad(block(inputs)[1].sum(), list(own.values()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


class Mixin:
    """A part of a class whose forward is another function."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)  # type: ignore[misc]


def test_a_forward_that_is_mixed_in_is_refused_or_counts() -> None:
    with pytest.raises(TypeError, match="Mixed replaces forward alone"):
        type("Mixed", (Mixin, nn.Sine), {})

    class Halved:
        def bind(self, context: Tensor | None = None) -> Any:
            function = super().bind(context)  # type: ignore[misc]
            return linearization.bind(lambda inputs: function(inputs) / 2)

    kind: Any = type("Block", (Halved, transforms.ResidualTransform), {})
    block, inputs = kind(nn.LipschitzMLP(2, [8])), torch.randn(3, 2)
    outputs, _ = transforms.CompositeTransform([block])(inputs)
    torch.testing.assert_close(outputs, inputs + block.net(inputs) / 2)

    class Other:
        def log_diagonal(self) -> Tensor:
            return torch.zeros(2)

    with pytest.raises(TypeError, match="Linear replaces log_diagonal"):
        type("Linear", (Other, transforms.LinearTransform), {})


@pytest.mark.parametrize("constant", [math.nan, math.inf, -1.0])
def test_a_constant_that_is_none_certifies_nothing(constant: float) -> None:
    activation = nn.Sine()
    activation.lipschitz = constant
    net = nn.LipschitzMLP(2, [8], activation=activation)
    with pytest.raises(ValueError, match="Lipschitz constant of Sine must be a number of at least"):
        net.lipschitz_bound()


def test_the_certificate_is_of_the_weights_that_are_used() -> None:
    class Smaller(nn.LipschitzMLP):
        def effective_weights(self) -> list[Tensor]:
            return [0.01 * each for each in super().effective_weights()]

    torch.manual_seed(0)
    net = Smaller(2, [8], coeff=0.9)
    with torch.no_grad():
        net.normed_layers[0].weight.mul_(100)
    inputs = torch.randn(64, 2)
    jacobians = linearization.linearize(net, inputs).jacobian()
    assert float(torch.linalg.matrix_norm(jacobians, 2).max()) <= net.lipschitz_bound() <= 0.9


def test_a_subclass_with_another_map_has_no_constants_of_the_old_one() -> None:
    class Tenfold(transforms.ActNorm):
        def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            outputs, logabsdet = super().forward(inputs, context)
            return 10 * outputs, logabsdet + 2 * math.log(10)

    class Stated(Tenfold):
        def lipschitz_constants(self) -> tuple[float, float]:
            return 10.0, 0.1

    for kind, expected in ((Tenfold, math.inf), (Stated, 10.0), (transforms.ActNorm, 1.0)):
        flow = flows.Flow(kind(2), flows.StandardNormal([2]))
        assert flow.lipschitz_bound().forward == pytest.approx(expected)


def test_a_network_may_state_its_constant() -> None:
    class Gated(torch_nn.Module):
        lipschitz = 0.9

        def forward(self, inputs: Tensor) -> Tensor:
            return 0.9 * inputs.sin()

    assert transforms.ResidualTransform(Gated()).lipschitz_bound() == 0.9


def test_estimators_compute_in_full_precision_inside_autocast() -> None:
    torch.manual_seed(0)
    net, inputs = nn.LipschitzMLP(3, [16]), torch.randn(5, 3)
    series = logdet.PowerSeries(num_terms=3)
    for estimator in (logdet.Auto(), logdet.Exact(), logdet.Exact(chunk_size=2), series):
        torch.manual_seed(1)
        expected = estimator(net, inputs)[1]
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            found = estimator(net, inputs)[1]
        assert torch.equal(found, expected)
        found.sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            for each in (net, net.bind(), lambda values: 0.5 * values.sin()):
                short = estimator(each, inputs.bfloat16())
                assert short[1].dtype == torch.float32


@pytest.mark.parametrize("probe", [logdet.Rademacher(), logdet.Gaussian()])
def test_probes_do_not_follow_the_layout_of_memory(probe: Any) -> None:
    images = torch.zeros(2, 3, 4, 4)
    drawn = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        drawn.append(probe.sample_like(images.to(memory_format=layout)))
    assert torch.equal(*drawn)


def test_gradients_in_batches_are_those_one_by_one() -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 3).double()
    for flow in (ResidualFlow(3, 8, 2), flows.HybridFlow(3, 8, 2)):
        flow.double().initialize(torch.randn(99, 3).double())
        values, parameters = flow.log_prob(rows), list(flow.parameters())
        identity = torch.eye(5).double()
        together = torch.autograd.grad(
            values, parameters, identity, is_grads_batched=True, retain_graph=True
        )
        for index, value in enumerate(values):
            alone = torch.autograd.grad(value, parameters, retain_graph=True)
            for one, other in zip(together, alone, strict=True):
                torch.testing.assert_close(one[index], other)


def test_gradients_in_batches_go_over_convolutions() -> None:
    torch.manual_seed(0)
    block = transforms.ResidualTransform(nn.LipschitzCNN(2, [4])).double()
    outputs, logabsdet = block(torch.randn(3, 2, 4, 4).double())
    values, parameters = outputs.sum((1, 2, 3)) + logabsdet, list(block.parameters())
    together = torch.autograd.grad(
        values, parameters, torch.eye(3).double(), is_grads_batched=True, retain_graph=True
    )
    for one, other in zip(together, torch.autograd.grad(values[1], parameters), strict=True):
        torch.testing.assert_close(one[1], other)


def test_a_context_of_other_rows_is_named_by_compositions_too() -> None:
    block = transforms.ResidualTransform(nn.LipschitzMLP(2, [8], context_features=1))
    composite = transforms.CompositeTransform([block])
    for call in (composite.forward, composite.inverse):
        with pytest.raises(
            ValueError, match=r"one row for each of the 1 rows .* got shape \(5, 1\)"
        ):
            call(torch.zeros(1, 2), torch.zeros(5, 1))


def test_contexts_of_what_is_no_block_are_its_own() -> None:
    class Tempered(transforms.LinearTransform):
        def forward(self, inputs: Tensor, context: Any = None) -> Any:  # type: ignore[override]
            return context.sum() * inputs, inputs.new_zeros(len(inputs))

    composite = transforms.CompositeTransform([Tempered(2)])
    for context in (torch.tensor(2.0), torch.ones(3), torch.ones(4, 3)):
        outputs, _ = composite(torch.ones(5, 2), context)
        assert torch.equal(outputs, context.sum() * torch.ones(5, 2))


def test_a_forward_of_an_instance_keeps_the_constants_that_are_stated() -> None:
    norm = transforms.ActNorm(2)
    norm.forward = norm.forward  # type: ignore[method-assign]
    assert lipschitz_constants(norm) == norm.lipschitz_constants()


def test_settings_are_numbers_of_python() -> None:
    saved = transforms.LogitTransform(256, np.float64(0.05)).state_dict()
    transforms.LogitTransform(256, 0.05).load_state_dict(saved)
