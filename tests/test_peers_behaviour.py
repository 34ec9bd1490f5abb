"""What crashes or loses precision in normflows: the same calls on our blocks and on theirs."""

from __future__ import annotations

from collections.abc import Callable

import normflows
import pytest
import torch

from nflows_iresnet import flows, logdet
from nflows_iresnet.nn import LipschitzMLP
from nflows_iresnet.transforms import ResidualTransform
from tests.peers import FEATURES, Block, Normflows, Wave, normflows_mlp, rows, seed

Requirement = Callable[[Block], None]


def frozen_parameters(block: Block) -> None:
    """Inputs get a gradient through frozen weights, as variational inference needs."""
    inputs = rows(4).requires_grad_()
    outputs, logabsdet = block.requires_grad_(False)(inputs)
    (outputs.sum() + logabsdet.sum()).backward()
    assert inputs.grad is not None


def context(block: Block) -> None:
    """A context is accepted and used."""
    inputs = rows(4)
    outputs = [block(inputs, torch.full((4, 2), value))[0] for value in (0.0, 1.0)]
    assert not torch.equal(*outputs)


def inference_mode(block: Block) -> None:
    """Serving under inference_mode gives numbers in both directions."""
    with torch.inference_mode():
        outputs, logabsdet = block(rows(4))
        block.inverse(outputs)
    assert bool(logabsdet.isfinite().all())


def empty_batch(block: Block) -> None:
    """No rows in, no rows out."""
    outputs, logabsdet = block(rows(0))
    assert outputs.shape == (0, FEATURES)
    assert logabsdet.shape == (0,)


def every_parameter_gets_a_gradient(block: Block) -> None:
    """Otherwise DistributedDataParallel stops: "parameters that were not used"."""
    outputs, logabsdet = block(rows(4))
    (outputs.square().sum() - logabsdet.sum()).backward()
    unused = [name for name, parameter in block.named_parameters() if parameter.grad is None]
    assert not unused


def vmap_of_jacrev(block: Block) -> None:
    """The Jacobian of the network by torch.func."""
    net = block.net
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: net(row[None])[0]))(rows(4))
    assert jacobian.shape == (4, FEATURES, FEATURES)


def double_backward(block: Block) -> None:
    """A gradient penalty: the gradient of the score of the log-determinant."""
    inputs = rows(4).requires_grad_()
    (score,) = torch.autograd.grad(block(inputs)[1].sum(), inputs, create_graph=True)
    if isinstance(getattr(block, "estimator", logdet.Exact()), logdet.Exact):
        score.square().sum().backward()
    else:
        with pytest.raises(logdet.SecondDerivativeError):
            score.square().sum().backward()


def inputs_stay_as_they_are(block: Block) -> None:
    """Evaluation does not turn the caller's data into something that records gradients."""
    inputs = rows(4)
    block.eval()(inputs)
    assert not inputs.requires_grad


def bfloat16_weights(block: Block) -> None:
    """A model in half precision gives finite numbers."""
    outputs, logabsdet = block.bfloat16()(rows(4).bfloat16())
    assert outputs.dtype == torch.bfloat16
    assert bool(logabsdet.isfinite().all())


REQUIREMENTS: list[Requirement] = [
    frozen_parameters,
    context,
    inference_mode,
    empty_batch,
    every_parameter_gets_a_gradient,
    vmap_of_jacrev,
    double_backward,
    inputs_stay_as_they_are,
    bfloat16_weights,
]
ESTIMATORS = [logdet.Exact(), logdet.RussianRoulette(), logdet.PowerSeries()]
every_requirement = pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.__name__)


@every_requirement
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda each: type(each).__name__)
def test_ours_works(
    requirement: Requirement,
    estimator: logdet.LogDetEstimator,
) -> None:
    """Nine things that users do, with each estimator."""
    seed(0)
    context_features = 2 if requirement is context else None
    net = LipschitzMLP(FEATURES, [16, 16], context_features)
    requirement(ResidualTransform(net, estimator=estimator))


def test_ours_second_derivative() -> None:
    """Right with the exact log-determinant; the series say that they have first ones only."""
    net, inputs = Wave(0.7), rows(4).requires_grad_()
    seconds = []
    for logabsdet in (
        ResidualTransform(net, estimator=logdet.Exact())(inputs)[1],
        net.logabsdet(inputs),
    ):
        (score,) = torch.autograd.grad(logabsdet.sum(), inputs, create_graph=True)
        seconds.append(torch.autograd.grad(score.sum(), inputs)[0])
    torch.testing.assert_close(*seconds, atol=1e-4, rtol=1e-4)


@pytest.mark.peer
@every_requirement
def test_normflows_crashes(requirement: Requirement) -> None:
    """The same nine things raise, or leave a trace that they should not."""
    seed(0)
    block = Normflows(normflows_mlp(FEATURES, 16, 16, FEATURES))
    with pytest.raises((RuntimeError, TypeError, AssertionError)):
        requirement(block)


@pytest.mark.slow
def test_ours_compiles_to_one_graph() -> None:
    """torch.compile(fullgraph=True), with the numbers of eager mode."""
    seed(0)
    block = ResidualTransform(LipschitzMLP(FEATURES, [16, 16]))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(rows(4)), block(rows(4)), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.peer
@pytest.mark.slow
def test_normflows_breaks_the_graph() -> None:
    """numpy draws the truncation, and the compiler cannot see through it."""
    block = Normflows(normflows_mlp(FEATURES, 16, FEATURES))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(block, fullgraph=True, backend="aot_eager")(rows(4))


def test_ours_variational_loss_through_the_inverse() -> None:
    """A reverse KL with the path gradient: sample, freeze the flow, evaluate at the sample."""
    seed(0)
    block = ResidualTransform(LipschitzMLP(2, [16]))
    samples, _ = block.inverse(rows(8, 2))
    block.requires_grad_(False)
    outputs, logabsdet = block(samples)
    block.requires_grad_(True)
    (logabsdet - outputs.square().sum(dim=1) / 2 + samples.square().sum(dim=1)).mean().backward()
    gradients = [parameter.grad for parameter in block.parameters()]
    assert any(each is not None and bool(each.abs().max() > 0) for each in gradients)


@pytest.mark.peer
def test_normflows_variational_loss_raises() -> None:
    """`reverse_kld(score_fn=False)` freezes the parameters, and a residual block cannot bear it."""
    flow = normflows.flows.Residual(normflows_mlp(2, 16, 2))
    base, target = (normflows.distributions.DiagGaussian(2) for _ in range(2))
    model = normflows.NormalizingFlow(base, [flow], target)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model.reverse_kld(8, score_fn=False)


def test_ours_loss_keeps_double_precision() -> None:
    """A flow in float64 has a loss in float64, and samples in float64."""
    flow = flows.ResidualFlow(2, 8, 2).double()
    assert flow.log_prob(rows(4, 2).double()).dtype == torch.float64
    assert flow.sample(3).dtype == torch.float64


@pytest.mark.peer
def test_normflows_loss_is_single_precision() -> None:
    """The loss of a flow in float64 is accumulated in float32."""
    flow = normflows.flows.Residual(normflows_mlp(2, 8, 2))
    base = normflows.distributions.DiagGaussian(2)
    model = normflows.NormalizingFlow(base, [flow]).double()
    assert model.forward_kld(rows(4, 2).double()).dtype == torch.float32
