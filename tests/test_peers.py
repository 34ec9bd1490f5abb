"""Faults of normflows' log-determinants, each beside our numbers: values, variance, gradients.

Each fault has one function that measures it, one test that ours passes, and one test marked `peer`
that shows the fault. Networks are linear or a sine, so that every expected number is exact.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nflows_iresnet import logdet
from nflows_iresnet.nn import LipschitzMLP, lipschitz_bound
from nflows_iresnet.transforms import ResidualTransform
from tests.peers import (
    FEATURES,
    Block,
    Linear,
    Normflows,
    Wave,
    draws,
    exact_logabsdet,
    rows,
    scaled_identity,
    seed,
    standard_errors_off,
    symmetric,
)

EIGENVALUES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
ROULETTE = logdet.RussianRoulette(lipschitz=0.7)
NUM_DRAWS = 400


def _linear() -> Linear:
    return symmetric(*EIGENVALUES)


class TestWeightedGradient:
    """normflows scales the gradient of the whole batch by the weight of its first sample."""

    INCREASING = torch.linspace(0, 2, 4000)
    DECREASING = torch.linspace(2, 0, 4000)

    @staticmethod
    def relative_error(block: Block, weights: Tensor) -> float:
        """Of d/dA sum_i w_i log|det(I + A)| = sum_i w_i (I + A)^-T."""
        seed(0)
        (weights @ block(rows(len(weights)))[1]).backward()
        weight = block.net.weight
        assert isinstance(weight, Tensor)
        exact = weights.sum() * torch.linalg.inv(torch.eye(FEATURES) + weight.detach()).mT
        assert weight.grad is not None
        return float((weight.grad - exact).norm() / exact.norm())

    @pytest.mark.parametrize("weights", [INCREASING, DECREASING], ids=["masked-first", "heavy"])
    def test_ours(self, weights: Tensor) -> None:
        """Exact is exact; the series errs by its probes alone, which is 0.04 for 4000 rows."""
        assert self.relative_error(ResidualTransform(_linear()), weights) < 1e-5
        series = logdet.PowerSeries(num_terms=25)
        block = ResidualTransform(_linear(), estimator=series)
        assert self.relative_error(block, weights) < 0.16

    @pytest.mark.peer
    def test_normflows_scales_by_the_first_weight(self) -> None:
        """Twice the average weight on the first sample: twice the gradient."""
        block = Normflows(_linear(), n_power_series=25)
        assert self.relative_error(block, self.DECREASING) > 0.3

    @pytest.mark.peer
    def test_normflows_ignores_all_rows_if_the_first_is_masked(self) -> None:
        """Weight zero on the first sample: the log-determinant has no gradient at all."""
        net = _linear()
        assert self.relative_error(Normflows(net, n_power_series=25), self.INCREASING) == 1
        assert net.weight.grad is not None
        assert torch.equal(net.weight.grad, torch.zeros_like(net.weight))


class TestValueInTraining:
    """In training normflows returns an estimate of tr((I + J)^-1 J), not of log|det(I + J)|."""

    @staticmethod
    def values(block: Block) -> Tensor:
        inputs = rows(16)
        return draws(lambda: block(inputs)[1], NUM_DRAWS)

    def test_ours(self) -> None:
        """The mean over draws is the log-determinant, within 6 of its standard errors (0.014)."""
        block = ResidualTransform(_linear(), estimator=ROULETTE).train()
        assert standard_errors_off(self.values(block), exact_logabsdet(_linear())) < 6

    @pytest.mark.peer
    def test_normflows_returns_a_surrogate(self) -> None:
        """2.19 is asked for; the mean is that of another quantity, 1.80, ten errors away."""
        values = self.values(Normflows(_linear()).train())
        assert standard_errors_off(values, exact_logabsdet(_linear())) > 6
        surrogate = sum(value / (1 + value) for value in EIGENVALUES)
        assert standard_errors_off(values, surrogate) < 6


class TestVariance:
    """At g(x) = -0.97 x the customary laws of the roulette have infinite variance."""

    EXACT = FEATURES * math.log(1 - 0.97)
    CERTIFIED = logdet.RussianRoulette(exact_trace=False)

    @staticmethod
    def values(block: Block, num_draws: int) -> Tensor:
        inputs = rows(1)
        return draws(lambda: block(inputs)[1], num_draws)

    def test_ours_has_the_variance_that_was_promised(self) -> None:
        """Mean within 6 of the standard errors that the stated bound (2424) allows, 9.3 nats."""
        net = LipschitzMLP(FEATURES, [], coeff=0.97)
        with torch.no_grad():
            net.layers[0].weight.copy_(-torch.eye(FEATURES))  # type: ignore[operator]
        values = self.values(ResidualTransform(net, estimator=self.CERTIFIED), 1000)
        promised = self.CERTIFIED.variance_bound(0.97, FEATURES) / len(values)
        assert abs(float(values.mean()) - self.EXACT) < 6 * math.sqrt(promised)

    def test_ours_warns_of_a_law_with_infinite_variance(self) -> None:
        """The geometric law of the papers is there, but it says what it does."""
        law = logdet.RussianRoulette(truncation=logdet.GeometricTruncation(0.5), lipschitz=0.97)
        assert law.variance_bound(0.97, FEATURES) == math.inf
        with pytest.warns(logdet.InfiniteVarianceWarning, match="finite variance"):
            law(scaled_identity(-0.97), rows(1))

    @pytest.mark.peer
    @pytest.mark.parametrize(
        ("law", "ratio"), [("geometric", 1 / 2), ("poisson", 2 / 13)], ids=["geometric", "poisson"]
    )
    def test_normflows_laws_have_infinite_variance(
        self, law: str, ratio: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """E[V^2] = sum_n P(N = n) V_n^2 diverges: its terms grow, here from n = 12 to 13."""
        block = Normflows(scaled_identity(-0.97), reduce_memory=False, n_dist=law)
        squares = []
        for length in (12, 13):
            monkeypatch.setattr(np.random, law, lambda *_, n=length: np.array([n]))
            squares.append(float(self.values(block, 1).square()))
        assert ratio * squares[1] / squares[0] > 1.2


class TestScoreInEvaluation:
    """In evaluation normflows' log-determinant is random and has no gradient, without a word."""

    @staticmethod
    def gradient_errors(block: Block, net: Wave) -> list[float]:
        """Relative errors of d/dx and d/da of sum log p(x), with a standard normal base."""
        inputs = rows(64).requires_grad_()
        outputs, logabsdet = block.eval()(inputs)
        values = [logabsdet, net.logabsdet(inputs)], [outputs, inputs + net(inputs)]
        gradients, exact = (
            torch.autograd.grad(each.sum() - image.square().sum() / 2, [inputs, net.amplitude])
            for each, image in zip(*values, strict=True)
        )
        pairs = zip(gradients, exact, strict=True)
        return [float((left - right).norm() / right.norm()) for left, right in pairs]

    @staticmethod
    def spread(block: Block) -> float:
        """Standard deviation of the log-determinant of one row over repeated calls, in nats."""
        inputs = rows(1)
        return float(draws(lambda: block.eval()(inputs)[1], 50).std())

    def test_ours_is_deterministic_and_has_a_gradient(self) -> None:
        """The default in six dimensions is exact."""
        net = Wave()
        block = ResidualTransform(net)
        assert self.spread(block) == 0
        assert max(self.gradient_errors(block, net)) < 1e-4

    def test_ours_has_an_unbiased_gradient_with_the_roulette(self) -> None:
        """Evaluation changes nothing; a sine has no probe noise, and 400 draws err by 1 to 4 %."""
        net = Wave(0.7)
        roulette = logdet.RussianRoulette(lipschitz=0.7, num_probes=400)
        seed(0)
        block = ResidualTransform(net, estimator=roulette)
        assert max(self.gradient_errors(block, net)) < 0.12

    @pytest.mark.peer
    def test_normflows_is_random(self) -> None:
        """The same row, the same weights, evaluation mode: nats apart."""
        assert self.spread(Normflows(symmetric(0.9, 0.5, 0.9, -0.5, -0.9, -0.9))) > 0.5

    @pytest.mark.peer
    def test_normflows_gradients_lack_the_log_determinant(self) -> None:
        """Score and parameter gradient of the base alone come back, and nothing is raised."""
        net = Wave()
        score, parameters = self.gradient_errors(Normflows(net), net)
        assert score > 0.05
        assert parameters > 0.05


class TestSeed:
    """numpy's global generator decides the truncation of normflows."""

    @staticmethod
    def values(block: Block) -> list[float]:
        """With one seed of torch, over forty seeds of numpy."""
        values = []
        for other in range(40):
            torch.manual_seed(0)
            np.random.seed(other)
            values.append(block(rows(4))[1].sum().item())
        return values

    def test_ours(self) -> None:
        """torch.manual_seed alone reproduces everything."""
        assert len(set(self.values(ResidualTransform(_linear(), estimator=ROULETTE)))) == 1

    @pytest.mark.peer
    def test_normflows_needs_the_seed_of_numpy(self) -> None:
        """The same torch seed gives different values."""
        assert len(set(self.values(Normflows(_linear())))) > 1


@pytest.fixture
def torchflows() -> Any:
    """The module of torchflows with its residual blocks, made with a fixed seed."""
    seed(0)
    return pytest.importorskip("torchflows.bijections.finite.residual.iterative")


@pytest.fixture
def freia_block() -> Any:
    """An i-ResNet layer of FrEIA as (inputs) -> (outputs, logabsdet), with a large Jacobian."""
    modules = pytest.importorskip("FrEIA.modules")
    seed(0)
    layer = modules.IResNetLayer([(FEATURES,)], internal_size=32)
    for each in layer.layers:
        torch.nn.init.orthogonal_(each.weight)
    layer.lipschitz_correction()
    return _Freia(layer)


class _Freia:
    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, inputs: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        (outputs,), logabsdet = self.layer([inputs.clone()], rev=rev)
        return outputs, logabsdet

    def inverse(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self(inputs, rev=True)


def _mlp_block(context_features: int | None = None) -> ResidualTransform:
    seed(0)
    return ResidualTransform(LipschitzMLP(FEATURES, [16, 16], context_features))


class TestCoefficient:
    """torchflows stores the coefficient `c` of a layer and never uses it."""

    @pytest.mark.parametrize("coeff", [0.1, 0.9])
    def test_ours(self, coeff: float) -> None:
        """Large weights are brought down to the coefficient, and to no less."""
        net = LipschitzMLP(FEATURES, [16], coeff=coeff)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(100)
        assert 0.99 * coeff < lipschitz_bound(net) <= coeff

    @pytest.mark.peer
    def test_torchflows_ignores_it(self, torchflows: Any) -> None:
        """Asked for 0.1, the norm is 1."""
        layer = torchflows.SpectralLinear(FEATURES, FEATURES, c=0.1)
        assert float(torch.linalg.matrix_norm(layer.w.normalized().detach(), ord=2)) > 0.5


class TestOneFunction:
    """torchflows re-estimates its norms from random vectors in each call: g is another function."""

    @staticmethod
    def distance(net: Any) -> float:
        """Between two evaluations at the same inputs."""
        inputs = rows(8)
        return (net(inputs) - net(inputs)).abs().max().detach().item()

    def test_ours(self) -> None:
        """The same inputs give the same outputs, to the last bit, in training too."""
        assert self.distance(_mlp_block().net.train()) == 0

    @pytest.mark.peer
    def test_torchflows_moves(self, torchflows: Any) -> None:
        """So that its inverse chases a moving target."""
        assert self.distance(torchflows.SpectralNeuralNetwork((FEATURES,))) > 1e-4


class TestRouletteWeights:
    """Each term must be divided by the probability that it is reached, and by nothing else."""

    @staticmethod
    def mean_is_off(block: Any) -> float:
        """In standard errors, for g(x) = x / 2."""
        inputs = rows(16)
        values = draws(lambda: block.forward(inputs)[1], 400)
        return standard_errors_off(values, exact_logabsdet(scaled_identity(0.5)))

    def test_ours(self) -> None:
        """The mean of 400 draws is right within 6 standard errors."""
        roulette = logdet.RussianRoulette(lipschitz=0.5)
        assert self.mean_is_off(ResidualTransform(scaled_identity(0.5), estimator=roulette)) < 6

    def test_ours_every_term_has_weight_one_on_average(self) -> None:
        """E[weight of term k] = 1, here for the first six terms within 6 standard errors."""
        seed(0)
        roulette = logdet.RussianRoulette()
        weights = [roulette.term_weights(0.8) for _ in range(4000)]
        for term in range(6):
            values = torch.tensor([each[term] if term < len(each) else 0.0 for each in weights])
            error = values.std() / len(values) ** 0.5
            assert abs(float(values.mean()) - 1) <= 6 * float(error) + 1e-6

    @pytest.mark.peer
    def test_torchflows_weighs_wrongly(self, torchflows: Any) -> None:
        """The Neumann weights of the derivative are divided by k once too often: 1.8 for 2.4."""
        block = torchflows.ResFlowBlock((FEATURES,), g=scaled_identity(0.5))
        assert self.mean_is_off(block) > 8


class TestInverseLogDet:
    """The log-determinant of the inverse is minus the one of forward AT THE SOLUTION."""

    @staticmethod
    def error(block: Any) -> float:
        """Of logabsdet(inverse) + logabsdet(forward) with the same probes, in nats."""
        inputs = rows(8)
        seed(3)
        outputs, forward = block(inputs)
        seed(3)
        _, inverse = block.inverse(outputs.detach())
        return (forward + inverse).abs().max().detach().item()

    def test_ours(self) -> None:
        """Exact and random alike."""
        assert self.error(_mlp_block()) < 1e-4
        roulette = logdet.RussianRoulette(lipschitz=0.9)
        assert self.error(ResidualTransform(Wave(), estimator=roulette)) < 1e-4

    @pytest.mark.peer
    def test_torchflows_has_the_wrong_sign(self, torchflows: Any) -> None:
        """Both directions report the same number."""
        net = scaled_identity(0.5)
        block = torchflows.InvertibleResNetBlock((FEATURES,), g=net, n_power_series_iterations=20)
        assert self.error(block) > exact_logabsdet(net)

    @pytest.mark.peer
    def test_freia_evaluates_at_the_wrong_point(self, freia_block: Any) -> None:
        """At the outputs, before they are inverted."""
        assert self.error(freia_block) > 0.01


class TestInverseIsChecked:
    """A fixed number of iterations is no inverse: 25 in torchflows, 50 in FrEIA."""

    @staticmethod
    def error(block: Any) -> float:
        """Of the round trip for g(x) = -0.97 x."""
        inputs = rows(8)
        found, _ = block.inverse(block.forward(inputs)[0].detach())
        return (found - inputs).abs().max().detach().item()

    def test_ours(self) -> None:
        """As many as it takes."""
        assert self.error(ResidualTransform(scaled_identity(-0.97))) < 1e-3

    @pytest.mark.peer
    def test_torchflows_stops_silently(self, torchflows: Any) -> None:
        """The error is of the size of the inputs."""
        block = torchflows.InvertibleResNetBlock((FEATURES,), g=scaled_identity(-0.97))
        assert self.error(block) > 0.3


class TestContext:
    """torchflows accepts a context and ignores it."""

    @staticmethod
    def change(block: Any) -> float:
        """Of the outputs when the context goes from 0 to 1."""
        outputs = []
        for value in (0.0, 1.0):
            seed(0)
            outputs.append(block(rows(4), context=torch.full((4, 2), value))[0])
        return (outputs[1] - outputs[0]).abs().max().detach().item()

    def test_ours_is_used(self) -> None:
        """Another context, another map."""
        assert self.change(_mlp_block(context_features=2)) > 1e-3

    def test_ours_is_refused_where_it_cannot_be_used(self) -> None:
        """A network without context says so."""
        with pytest.raises(ValueError, match="context_features"):
            _mlp_block()(rows(4), torch.zeros(4, 2))

    @pytest.mark.peer
    def test_torchflows_ignores_it(self, torchflows: Any) -> None:
        """Accepted, documented, unused."""
        assert self.change(torchflows.InvertibleResNetBlock((FEATURES,), (2,))) == 0


class TestLogDetGradient:
    """FrEIA's log-determinant has no gradient: likelihood training minimises something else."""

    def test_ours(self) -> None:
        """Every estimator's log-determinant moves every weight of g (biases shift slopes only)."""
        for estimator in (logdet.Exact(), logdet.RussianRoulette(), logdet.PowerSeries()):
            block = _mlp_block()
            block.estimator = estimator
            block(rows(8))[1].sum().backward()
            weights = [p.grad for name, p in block.named_parameters() if name.endswith("weight")]
            assert all(each is not None and float(each.norm()) > 0 for each in weights)

    @pytest.mark.peer
    def test_freia_has_none(self, freia_block: Any) -> None:
        """It is a constant for autograd."""
        assert not freia_block(rows(8))[1].requires_grad


class TestSeriesCoefficients:
    """`exact_trace` of i-DenseNets and MonotoneFlows leaves out the coefficients of the series."""

    @pytest.mark.parametrize("num_terms", [1, 2, 3, 8])
    @pytest.mark.parametrize("exact_trace", [True, False])
    def test_ours(self, num_terms: int, exact_trace: bool) -> None:
        """In one dimension exactly the partial sums of log(1 + c) = c - c^2 / 2 + c^3 / 3 - ..."""
        series = logdet.PowerSeries(num_terms=num_terms, exact_trace=exact_trace)
        _, logabsdet = series(scaled_identity(0.8, features=1), rows(1, 1))
        partial = sum((-1) ** (k + 1) * 0.8**k / k for k in range(1, num_terms + 1))
        assert logabsdet.item() == pytest.approx(partial, abs=1e-6)
        assert abs(partial - math.log1p(0.8)) <= series.bias_bound(0.8, features=1)
