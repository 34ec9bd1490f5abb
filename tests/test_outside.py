"""Checks that others wrote for their own models, run from their packages on ours."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import normflows as nf
import pytest
import torch
from nflows.flows import Flow as NflowsFlow
from normflows import core_test
from normflows.distributions.distribution_test import DistributionTest
from normflows.flows.flow_test import FlowTest
from torch import Tensor

from nflows_iresnet import ResidualFlow, ResidualTransform, logdet
from nflows_iresnet import nn as lipschitz_nn
from nflows_iresnet.interop.distributions import ToTorchDistribution
from nflows_iresnet.interop.normflows import ToNormflows
from tests.cases import CASES


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("name", CASES)
def test_of_flows_by_normflows(name: str, dtype: torch.dtype) -> None:
    """`FlowTest`, as their test of residual flows runs it, and with tolerances a tenth of theirs.

    Forward and inverse each draw anew, so that random log-determinants are compared as `Exact`.
    """
    case, judge = CASES[name], FlowTest()
    flow = ToNormflows(case.factory().to(dtype))
    noise, context = case.inputs().to(dtype), case.context()
    given = [noise] if context is None else [noise, context.to(dtype)]
    if len(given) > 1 and "context" not in inspect.signature(judge.checkForward).parameters:
        pytest.skip("FlowTest of this normflows knows no context")
    flow.inverse(*given)
    blocks = [each for each in flow.modules() if isinstance(each, ResidualTransform)]
    for training in (True, False):
        flow.train(training)
        data, _ = judge.checkForward(flow, *given)
        back, _ = judge.checkInverse(flow, data, *given[1:])
        judge.assertClose(back, noise, atol=1e-5, rtol=1e-5)
        for block in blocks:
            block.estimator = logdet.Exact()
        judge.checkForwardInverse(flow, *given, atol=1e-5, rtol=1e-5)


class Sampled:
    """A flow of nflows, or a model of normflows, as distributions of normflows are called."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, num_samples: int, **context: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(self.model, NflowsFlow):
            pair: tuple[Tensor, Tensor] = self.model.sample(num_samples, **context)
            return pair
        samples, log_prob = self.model.sample_and_log_prob(1 if context else num_samples, **context)
        return (samples[:, 0], log_prob[:, 0]) if context else (samples, log_prob)

    def log_prob(self, values: Tensor, **context: Tensor) -> Tensor:
        log_prob: Tensor = self.model.log_prob(values, **context)
        return log_prob

    def sample(self, num_samples: int, **context: Tensor) -> Tensor:
        return self(num_samples, **context)[0]


def _conditional() -> ResidualFlow:
    return ResidualFlow(3, 16, 3, context_features=2)


MODELS: dict[str, Callable[[], Any]] = {
    "flow": lambda: ResidualFlow(3, 16, 3),
    "conditional flow": _conditional,
    "model of normflows": lambda: nf.NormalizingFlow(
        nf.distributions.DiagGaussian(3), [ToNormflows(ResidualFlow(3, 16, 3)._transform)]
    ),
    "conditional model of normflows": lambda: nf.ConditionalNormalizingFlow(
        nf.distributions.DiagGaussian(3), [ToNormflows(_conditional()._transform)]
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_samples", [1, 7])
def test_of_distributions_by_normflows(name: str, num_samples: int) -> None:
    judge, distribution = DistributionTest(), Sampled(MODELS[name]())
    context = {"context": torch.randn(num_samples, 2)} if "conditional" in name else {}
    judge.checkForwardLogProb(distribution, num_samples, atol=1e-4, rtol=1e-4, **context)
    samples = judge.checkSample(distribution, num_samples, **context)
    judge.checkLogProb(distribution, samples, **context)


def _mlp_layer(features: int, context_features: int | None = None) -> ToNormflows:
    net = lipschitz_nn.LipschitzMLP(features, [16, 16], context_features)
    return ToNormflows(ResidualTransform(net))


def _as_coupling(mask: Tensor, *nets: Any) -> ToNormflows:
    return _mlp_layer(mask.shape[0])


def _as_maf(features: int, hidden_features: int, context_features: int, **_: Any) -> ToNormflows:
    return _mlp_layer(features, context_features)


def _as_spline(num_input_channels: int, num_context_channels: int, **_: Any) -> ToNormflows:
    return _mlp_layer(num_input_channels, num_context_channels)


def _as_glow(channels: int, hidden_channels: int, **_: Any) -> ToNormflows:
    net = lipschitz_nn.LipschitzCNN(channels, [8])
    return ToNormflows(ResidualTransform(net, estimator=logdet.PowerSeries(num_terms=3)))


CORE = (
    "test_normalizing_flow",
    "test_conditional_normalizing_flow",
    "test_cc_normalizing_flow",
    "test_normalizing_flow_vae",
)


@pytest.mark.parametrize("name", CORE)
def test_of_models_by_normflows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their `CoreTest`, with our blocks wherever it builds a layer of its own."""
    monkeypatch.setattr(core_test, "MaskedAffineFlow", _as_coupling)
    monkeypatch.setattr(core_test, "MaskedAffineAutoregressive", _as_maf)
    monkeypatch.setattr(core_test, "AutoregressiveRationalQuadraticSpline", _as_spline)
    getattr(core_test.CoreTest(name), name)()


def test_a_network_that_changes_itself_is_refused() -> None:
    """Power iteration of normflows, in training: torch's own error says nothing of a network."""
    block = ResidualTransform(nf.nets.LipschitzMLP([3, 16, 3]))
    with pytest.raises(ValueError, match=r"(?s)power iteration.*nflows_iresnet\.nn"):
        block(torch.randn(4, 3))


@pytest.mark.parametrize("features", [1, 2])
def test_goodness_of_fit_by_pyro(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples against densities, by a test that knows neither the flow nor its base."""
    stats = pytest.importorskip("scipy.stats")
    gof = pytest.importorskip("pyro.distributions.testing.gof")
    monkeypatch.setattr(gof, "chi2sf", lambda x, dof: stats.chi2.sf(x, dof))  # theirs grows
    distribution = ToTorchDistribution(_violent(ResidualFlow(features, 16, 2)))
    samples = distribution.sample((20_000,))
    density = distribution.log_prob(samples).exp().detach()
    assert gof.auto_goodness_of_fit(samples, density) > 1e-6
    for factor in (0.8, 1.25):
        assert gof.auto_goodness_of_fit(samples, factor * density) < 1e-30


def _violent(flow: ResidualFlow) -> ResidualFlow:
    """Return a flow in evaluation whose map is far from the identity."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return flow.eval()


@pytest.fixture
def posterior() -> tuple[Any, Tensor]:
    """A posterior of sbi with a flow that nobody trained, and observations."""
    pytest.importorskip("sbi.diagnostics")
    from sbi.inference.posteriors import DirectPosterior
    from torch.distributions import MultivariateNormal

    from nflows_iresnet.interop.sbi import ResidualFlowBuilder

    theta, x = torch.randn(500, 2), 3 + 2 * torch.randn(500, 3)
    estimator = ResidualFlowBuilder(hidden_features=16, num_layers=2)(theta, x).eval()
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    prior = MultivariateNormal(torch.zeros(2), 1e4 * torch.eye(2))
    return DirectPosterior(estimator, prior), x[:150]


@pytest.mark.filterwarnings("ignore")
def test_calibration_by_sbi(posterior: tuple[Any, Tensor]) -> None:
    """What is drawn from the estimator itself is calibrated under it, trained or not."""
    from sbi.diagnostics import check_tarp, run_sbc, run_tarp
    from sbi.diagnostics.sbc import check_uniformity_frequentist

    judged, x = posterior
    theta = judged.sample_batched((1,), x=x, show_progress_bars=False)[0]
    density = partial(judged.log_prob, norm_posterior=False)
    for reduce in ("marginals", density):
        ranks, _ = run_sbc(
            theta, x, judged, num_posterior_samples=100, reduce_fns=reduce, show_progress_bar=False
        )
        assert float(check_uniformity_frequentist(ranks, 100).min()) > 1e-3
        assert float(check_uniformity_frequentist(ranks // 2, 100).max()) < 1e-6
    ecp, alpha = run_tarp(theta, x, judged, num_posterior_samples=100, show_progress_bar=False)
    assert abs(check_tarp(ecp, alpha)[0]) < 5


@pytest.mark.filterwarnings("ignore")
def test_checks_of_estimators_by_sbi(posterior: tuple[Any, Tensor]) -> None:
    from sbi.utils import user_input_checks

    judged, x = posterior
    estimator = judged.posterior_estimator
    theta = estimator.sample((7,), x[:4])
    assert theta.shape == (7, 4, 2)
    user_input_checks.test_posterior_net_for_multi_d_x(estimator, theta, x[:2])
    user_input_checks.check_estimator_arg(lambda theta, x: copy.deepcopy(estimator))
    samples, log_prob = estimator.sample_and_log_prob((7,), x[:1])  # mixes up rows of several
    torch.testing.assert_close(estimator.log_prob(samples, x[:1]), log_prob, atol=1e-3, rtol=1e-3)
    assert estimator.loss(theta[0], x[:4]).shape == (4,)
