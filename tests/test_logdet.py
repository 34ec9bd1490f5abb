"""Estimators: exact, or unbiased with finite variance, or biased within a bound."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from nflows_iresnet import logdet, nn
from nflows_iresnet.linearization import linearize
from nflows_iresnet.logdet.power_series import weighted_series
from nflows_iresnet.nn.mlp import MLPLinearization
from nflows_iresnet.testing import Subject, exact_logabsdet
from nflows_iresnet.transforms import ResidualTransform
from tests import device
from tests.cases import FixedLinear


def exact_linear(net: FixedLinear) -> float:
    matrix = torch.eye(len(net.weight), dtype=net.weight.dtype) + net.weight.detach()
    return float(torch.linalg.slogdet(matrix).logabsdet)


@pytest.mark.parametrize("features", [1, 2, 3, 4, 7, 20])
def test_exact_equals_slogdet_of_the_full_jacobian(features: int) -> None:
    torch.manual_seed(features)
    net = nn.LipschitzMLP(features, [16, 16]).double()
    inputs = torch.randn(3, features, dtype=torch.float64)
    _, logabsdet = logdet.Exact()(net, inputs)
    expected = exact_logabsdet(Subject(ResidualTransform(net), inputs))
    torch.testing.assert_close(logabsdet, expected, rtol=0, atol=1e-12)


def test_exact_in_chunks_is_the_same_with_context() -> None:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(4, [8], 2).double()
    inputs, context = torch.randn(7, 4).double(), torch.randn(7, 2).double()
    whole = logdet.Exact().estimate(net, inputs, context)
    for size in (1, 3, 7, 100):
        parts = logdet.Exact(chunk_size=size).estimate(net, inputs, context)
        torch.testing.assert_close(parts.logabsdet, whole.logabsdet, rtol=0, atol=1e-13)
        torch.testing.assert_close(parts.outputs, whole.outputs, rtol=0, atol=1e-13)
    assert bool((whole.standard_error == 0).all())  # type: ignore[union-attr]


class AllSigns:
    """Every vector of signs, once: the mean over them is exact, without randomness."""

    def __init__(self, features: int) -> None:
        self._vectors = iter(itertools.product((-1.0, 1.0), repeat=features))

    def sample_like(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.tensor(next(self._vectors), dtype=inputs.dtype).expand_as(inputs)


def test_the_mean_over_all_signs_is_exact_in_value_and_weighted_gradient() -> None:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(3, [6], coeff=0.6).double()
    inputs = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    targets = [inputs, *net.parameters()]
    series = logdet.PowerSeries(num_terms=60, num_probes=8, probe=AllSigns(3), exact_trace=False)
    values, gradients = [], []
    for estimator in (logdet.Exact(), series):
        _, logabsdet = estimator(net, inputs)
        values.append(logabsdet)
        loss = weights @ logabsdet
        gradient = torch.autograd.grad(loss, targets, allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([each.flatten() for each in gradient]))
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)


def test_the_control_variate_changes_no_mean_and_lowers_the_variance() -> None:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(8, [16, 16]).double()
    inputs = torch.randn(1, 8, dtype=torch.float64)
    expected = float(logdet.Exact()(net, inputs)[1].detach())
    spread = {}
    for exact_trace in (True, False):
        estimator = logdet.RussianRoulette(num_probes=2000, exact_trace=exact_trace)
        estimate = estimator.estimate(net, inputs)
        error = abs(float(estimate.logabsdet.detach()) - expected)
        assert estimate.standard_error is not None
        assert error < 6 * float(estimate.standard_error)
        spread[exact_trace] = float(estimate.standard_error)
    assert spread[True] < spread[False] / 2


@pytest.mark.parametrize("num_terms", [1, 2, 5, 20])
@pytest.mark.parametrize("lipschitz", [0.5, 0.9])
def test_the_bias_of_the_series_is_within_its_bound(num_terms: int, lipschitz: float) -> None:
    """The truncation error of the series is O(L^{N+1}), and the bound is attained by -L I."""
    series = logdet.PowerSeries(num_terms=num_terms, exact_trace=False)
    inputs = torch.zeros(1, 4, dtype=torch.float64)
    for sign in (-1.0, 1.0):
        _, logabsdet = series(lambda x, s=sign: s * lipschitz * x, inputs)
        bias = abs(float(logabsdet) - 4 * math.log1p(sign * lipschitz))
        assert bias <= series.bias_bound(lipschitz, 4)
        if sign < 0:
            assert bias > 0.5 * series.bias_bound(lipschitz, 4) * (1 - lipschitz) ** 0.5


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "estimator",
    [
        logdet.RussianRoulette(num_probes=800, lipschitz=0.9),
        logdet.RussianRoulette(num_probes=800, lipschitz=0.9, num_exact_terms=1),
        logdet.RussianRoulette(num_probes=800, lipschitz=0.9, probe=logdet.Gaussian()),
        logdet.RussianRoulette(
            num_probes=800, lipschitz=0.9, truncation=logdet.GeometricTruncation(0.85)
        ),
    ],
    ids=["matched", "one-exact-term", "gaussian", "geometric"],
)
def test_the_roulette_is_unbiased(estimator: logdet.RussianRoulette, grad: bool) -> None:
    torch.manual_seed(3)
    net = FixedLinear(4, norm=0.9).double()
    with torch.set_grad_enabled(grad):
        estimate = estimator.estimate(net, torch.zeros(1, 4, dtype=torch.float64))
    assert estimate.standard_error is not None
    error = abs(float(estimate.logabsdet.detach()) - exact_linear(net))
    assert error < 6 * float(estimate.standard_error)


def test_the_mean_at_the_worst_jacobian_errs_within_the_bound_of_the_variance() -> None:
    torch.manual_seed(0)
    estimator = logdet.RussianRoulette(lipschitz=0.97)
    inputs = torch.zeros(1, 6, dtype=torch.float64)
    draws = torch.stack([estimator(lambda x: -0.97 * x, inputs)[1] for _ in range(800)])
    error = abs(float(draws.mean()) - 6 * math.log(0.03))
    assert error < 6 * (estimator.variance_bound(0.97, 6) / len(draws)) ** 0.5


def test_the_law_of_the_truncation() -> None:
    torch.manual_seed(0)
    estimator = logdet.RussianRoulette(num_exact_terms=2)
    lengths = torch.tensor([len(estimator.term_weights(0.9)) for _ in range(20_000)]).double()
    standard_error = float(lengths.std()) / len(lengths) ** 0.5
    assert abs(float(lengths.mean()) - estimator.expected_terms(0.9)) < 6 * standard_error
    for term in (2, 3, 5, 10):
        share = float((lengths >= term).double().mean())
        assert share == pytest.approx(estimator.survival(term, 0.9), abs=0.02)


def test_infinite_variance_is_said() -> None:
    estimator = logdet.RussianRoulette(truncation=logdet.GeometricTruncation(0.5), lipschitz=0.9)
    assert estimator.variance_bound(0.9, 2) == math.inf
    assert math.isfinite(estimator.variance_bound(0.7, 2))
    with pytest.warns(logdet.InfiniteVarianceWarning, match=r"0\.9"):
        estimator(lambda x: 0.9 * x, torch.zeros(1, 2))


def test_the_roulette_refuses_nets_without_a_guarantee() -> None:
    with pytest.raises(ValueError, match="lipschitz="):
        logdet.RussianRoulette()(torch.nn.Linear(2, 2), torch.zeros(1, 2))


def test_only_torch_decides_and_a_generator_too() -> None:
    net, inputs = FixedLinear(3).double(), torch.zeros(2, 3, dtype=torch.float64)
    estimator = logdet.RussianRoulette(num_probes=2)
    torch.manual_seed(1)
    first = estimator(net, inputs)[1]
    torch.manual_seed(1)
    assert torch.equal(estimator(net, inputs)[1], first)
    draws = [
        estimator.estimate(net, inputs, generator=device.generator(7)).logabsdet for _ in range(2)
    ]
    assert torch.equal(*draws)


def test_standard_errors_are_right() -> None:
    torch.manual_seed(0)
    net, inputs = FixedLinear(5, norm=0.7).double(), torch.zeros(1, 5, dtype=torch.float64)
    estimator = logdet.PowerSeries(num_terms=4, num_probes=20)
    with torch.no_grad():
        estimates = [estimator.estimate(net, inputs) for _ in range(1000)]
    values = torch.stack([estimate.logabsdet for estimate in estimates])
    errors = torch.stack([_known(estimate.standard_error) for estimate in estimates])
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.2)
    assert logdet.PowerSeries().estimate(net, inputs).standard_error is None


def _known(error: Tensor | None) -> Tensor:
    assert error is not None
    return error


@pytest.mark.parametrize("probe", [logdet.Rademacher(), logdet.Gaussian()])
def test_probes_have_identity_covariance_and_estimate_the_trace(probe: logdet.Probe) -> None:
    """Hutchinson's identity, E[v^T A v] = tr A."""
    torch.manual_seed(0)
    vectors = probe.sample_like(torch.zeros(200_000, 3, dtype=torch.float64))
    covariance = vectors.mT @ vectors / len(vectors)
    torch.testing.assert_close(covariance, torch.eye(3).double(), rtol=0, atol=0.02)
    matrix = torch.tensor([[1.0, 2.0, 0.0], [0.5, -3.0, 1.0], [1.0, 1.0, 0.25]]).double()
    draws = (vectors @ matrix * vectors).sum(1)
    standard_error = float(draws.std()) / len(draws) ** 0.5
    assert abs(float(draws.mean()) + 1.75) < 6 * standard_error


def test_log_det_is_the_trace_of_the_log() -> None:
    """ln det(I + J) = tr ln(I + J) as the series of traces of powers, and the sign is positive."""
    matrix = FixedLinear(4, norm=0.8).double().weight.detach()
    power, total = torch.eye(4, dtype=torch.float64), 0.0
    for term in range(1, 200):
        power = power @ matrix
        total += (-1) ** (term + 1) * float(power.trace()) / term
    sign, logabsdet = torch.linalg.slogdet(torch.eye(4).double() + matrix)
    assert total == pytest.approx(float(logabsdet), abs=1e-12)
    assert float(sign) == 1.0


@dataclass(frozen=True)
class Bad:
    factory: type
    arguments: dict[str, float]
    message: str


@pytest.mark.parametrize(
    "bad",
    [
        Bad(logdet.Exact, {"chunk_size": 0}, "chunk_size"),
        Bad(logdet.PowerSeries, {"num_terms": 0}, "num_terms"),
        Bad(logdet.PowerSeries, {"num_probes": 0}, "num_probes"),
        Bad(logdet.RussianRoulette, {"num_exact_terms": 0}, "num_exact_terms"),
        Bad(logdet.RussianRoulette, {"lipschitz": 1.0}, "less than 1"),
        Bad(logdet.GeometricTruncation, {"continuation": 1.0}, "continuation"),
        Bad(logdet.LipschitzTruncation, {"power": -1.0}, "power"),
        Bad(logdet.LipschitzTruncation, {"power": math.inf}, "power"),
    ],
    ids=lambda bad: f"{bad.factory.__name__}-{bad.message}",
)
def test_bad_arguments_are_named(bad: Bad) -> None:
    with pytest.raises(ValueError, match=bad.message):
        bad.factory(**bad.arguments)


def test_the_default_says_what_it_chooses() -> None:
    default = logdet.Auto()
    assert isinstance(default.choose(2), logdet.Exact)
    assert isinstance(default.choose(64), logdet.RussianRoulette)
    assert "RussianRoulette" in repr(default)
    assert f"max_exact_features={default.max_exact_features}" in repr(default)


def test_the_graph_does_not_grow_with_the_number_of_terms() -> None:
    net = nn.LipschitzMLP(6, [16, 16], coeff=0.9)
    inputs = torch.randn(32, 6)

    def saved_elements(num_terms: int) -> int:
        elements = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logdet.PowerSeries(num_terms=num_terms)(net, inputs)
        return elements

    assert saved_elements(3) == saved_elements(100) > 0


def test_weighted_series_without_terms_beyond_the_trace() -> None:
    net = nn.LipschitzMLP(3, [4]).double()
    at_inputs = linearize(net, torch.randn(2, 3, dtype=torch.float64))
    probe = torch.ones(2, 3, dtype=torch.float64)
    value = weighted_series(at_inputs, probe, [1.0], exact_trace=True)
    torch.testing.assert_close(value, at_inputs.trace())


class Counted(MLPLinearization):
    """J = c I with the products written down."""

    def __init__(self, factor: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(torch.zeros(2, 3, dtype=dtype), [factor * torch.eye(3, dtype=dtype)], [])
        self.multiplied: list[Tensor] = []

    def vjp(self, cotangent: Tensor) -> Tensor:
        self.multiplied.append(cotangent)
        return super().vjp(cotangent)

    def jvp(self, tangent: Tensor) -> Tensor:
        self.multiplied.append(tangent)
        return super().jvp(tangent)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("exact_trace", [True, False])
def test_a_series_of_n_terms_takes_n_products(grad: bool, exact_trace: bool) -> None:
    """The last product of the value is the one that the derivative needs."""
    at = Counted(-0.5)
    probe = torch.ones(2, 3, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        value = weighted_series(at, probe, [1.0] * 7, exact_trace)
    assert len(at.multiplied) == 7
    expected = -3 * sum(0.5**term / term for term in range(1, 8))
    torch.testing.assert_close(value, torch.full_like(value, expected), rtol=0, atol=1e-14)


@pytest.mark.usefixtures("values_are_seen")
def test_products_that_are_lost_in_rounding_are_left_out() -> None:
    """They would be with subnormal numbers, for which a CPU takes a hundred times as long."""
    at = Counted(0.05, torch.float32)
    value = weighted_series(at, torch.ones(2, 3), [1.0] * 100, exact_trace=False)
    smallest = min(float(each.abs().amax()) for each in at.multiplied)
    assert smallest > torch.finfo(torch.float32).tiny ** 0.75
    assert len(at.multiplied) < 40
    torch.testing.assert_close(value, torch.full((2,), 3 * math.log1p(0.05)))


def test_the_exact_trace_is_the_control_variate_by_default() -> None:
    """At one seed the default is `exact_trace=True`, where the trace is cheap, and only there."""
    torch.manual_seed(0)
    inputs = torch.randn(3, 8, dtype=torch.float64)
    cheap, dear = nn.LipschitzMLP(8, [16]).double(), nn.LipschitzMLP(8, [16, 16, 16]).double()
    for net, exact_trace in ((cheap, True), (dear, False)):
        for default in (logdet.PowerSeries(), logdet.RussianRoulette()):
            found, expected = [
                each.estimate(net, inputs, generator=torch.Generator().manual_seed(1)).logabsdet
                for each in (default, replace(default, exact_trace=exact_trace))
            ]
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_two_probes_tell_their_standard_error_from_their_difference() -> None:
    """Half of it: the square root of the unbiased variance over two."""
    net, inputs = FixedLinear(5, norm=0.7).double(), torch.zeros(3, 5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    one, two = (logdet.PowerSeries(num_probes=1), logdet.PowerSeries(num_probes=2))
    first, second = [one.estimate(net, inputs, generator=generator).logabsdet for _ in range(2)]
    both = two.estimate(net, inputs, generator=generator.manual_seed(2))
    torch.testing.assert_close(both.logabsdet, (first + second) / 2)
    torch.testing.assert_close(_known(both.standard_error), (first - second).abs() / 2)
    assert bool((first != second).any())


@pytest.mark.parametrize(
    "estimator",
    [
        logdet.Auto(),
        logdet.RussianRoulette(lipschitz=0.8),
        logdet.RussianRoulette(lipschitz=0.8, probe=logdet.Gaussian()),
        logdet.PowerSeries(probe=logdet.Gaussian(), num_probes=2),
        logdet.Krylov(lipschitz=0.8),
    ],
    ids=str,
)
def test_a_generator_decides_all_and_leaves_the_global_one_alone(
    estimator: logdet.LogDetEstimator,
) -> None:
    torch.manual_seed(0)
    net, inputs = FixedLinear(64).double(), torch.randn(2, 64, dtype=torch.float64)
    state, found = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        found.append(estimator.estimate(net, inputs, generator=generator).logabsdet)
        at_inputs = linearize(net, inputs)
        again = estimator.logabsdet(at_inputs, 0.8, torch.Generator().manual_seed(seed))[0]
        torch.testing.assert_close(again, found[-1], rtol=0, atol=0)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_at_its_boundary_a_geometric_law_has_no_finite_variance() -> None:
    """With q = L^2 the bound sums up 1 / k^2 for the value, but ones for its derivative."""
    law = logdet.GeometricTruncation(0.25)
    assert not law.has_finite_variance(0.5)
    assert law.has_finite_variance(0.499)
    roulette = logdet.RussianRoulette(truncation=law, lipschitz=0.5)
    assert roulette.variance_bound(0.5, features=3) == math.inf
    with pytest.warns(logdet.InfiniteVarianceWarning):
        roulette.term_weights(None)


def test_the_exact_log_determinant_is_that_of_the_magnitude_in_every_dimension() -> None:
    """A net of a user may stretch by more than one: det(I + J) is negative then."""
    for features in (1, 2, 3, 5):
        net = FixedLinear(features, norm=0.5).double()
        with torch.no_grad():
            net.weight.copy_(torch.diag(torch.tensor([-3.0] + [0.5] * (features - 1))))
        inputs = torch.randn(2, features, dtype=torch.float64, requires_grad=True)
        logabsdet = logdet.Exact()(lambda x, net=net: x @ net.weight.mT, inputs)[1]
        expected = math.log(2.0) + (features - 1) * math.log(1.5)
        torch.testing.assert_close(logabsdet, torch.full_like(logabsdet, expected))


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, 3.5])
def test_the_matched_law_is_its_formula(power: float) -> None:
    law = logdet.LipschitzTruncation(power=power)
    for term, num_exact, lipschitz in ((4, 3, 0.9), (10, 2, 0.5), (7, 5, 0.97)):
        expected = lipschitz ** (term - num_exact) * (num_exact / term) ** power
        assert law.survival(term, num_exact, lipschitz) == pytest.approx(expected, rel=1e-12)


def test_terms_that_are_small_but_not_lost_are_summed_up() -> None:
    """Of g(x) = x / 5 the fifth term is below a thousandth, and the sum is known to 15 digits."""
    inputs = torch.randn(3, 4, dtype=torch.float64)
    series = logdet.PowerSeries(num_terms=24, exact_trace=False)
    logabsdet = series(lambda x: x / 5, inputs)[1]
    expected = torch.full_like(logabsdet, 4 * math.log(1.2))
    torch.testing.assert_close(logabsdet, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("estimator", [logdet.RussianRoulette(), logdet.Krylov()], ids=str)
def test_the_bound_of_a_variance_grows_as_the_square_of_the_dimension(
    estimator: logdet.RussianRoulette,
) -> None:
    """Terms of the trace add up in step, where J is a multiple of the identity."""
    one = estimator.variance_bound(0.8, features=1)
    assert 0 < one < math.inf
    assert estimator.variance_bound(0.8, features=6) == pytest.approx(36 * one, rel=1e-12)


def test_a_bound_that_is_given_comes_before_the_one_that_is_guaranteed() -> None:
    """The user may know better than the certificate; the law is matched to what was given."""
    given = logdet.RussianRoulette(lipschitz=0.5)
    for seed in range(20):
        found, expected, guaranteed = [
            roulette.term_weights(bound, torch.Generator().manual_seed(seed))
            for roulette, bound in (
                (given, 0.9),
                (given, None),
                (logdet.RussianRoulette(), 0.5),
            )
        ]
        assert found == expected == guaranteed


@pytest.mark.parametrize("kind", [logdet.RussianRoulette, logdet.Krylov])
def test_the_variance_is_that_of_the_law_that_is_drawn_from(
    kind: type[logdet.RussianRoulette],
) -> None:
    matched = kind().variance_bound(0.9, 4)
    assert kind(lipschitz=0.9).variance_bound(0.9, 4) == matched
    assert kind(lipschitz=0.95).variance_bound(0.9, 4) < matched
    assert matched < kind(lipschitz=0.85).variance_bound(0.9, 4) < math.inf
    for own in (0.3, 0.8, 0.9**2):
        assert kind(lipschitz=own).variance_bound(0.9, 4) == math.inf
    assert kind(lipschitz=0.5).expected_terms(0.9) == kind().expected_terms(0.5)


def test_a_law_for_less_than_the_network_guarantees_is_warned_of() -> None:
    net, inputs = nn.LipschitzMLP(2, [8], coeff=0.9), torch.zeros(2, 2)
    with pytest.warns(logdet.InfiniteVarianceWarning, match=r"a `lipschitz` above 0.81"):
        logdet.RussianRoulette(lipschitz=0.7).estimate(net, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logdet.RussianRoulette(lipschitz=0.85).estimate(net, inputs)


def test_the_bound_of_the_variance_knows_the_probe() -> None:
    class Own:
        def sample_like(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return torch.randn_like(inputs)

    for kind in (logdet.RussianRoulette, logdet.Krylov):
        bound = kind().variance_bound(0.5, 2)
        assert kind(probe=logdet.Gaussian()).variance_bound(0.5, 2) == pytest.approx(2 * bound)
        assert kind(probe=Own()).variance_bound(0.5, 2) == math.inf


def test_gaussian_probes_vary_within_their_bound_where_signs_would_not() -> None:
    roulette = logdet.RussianRoulette(probe=logdet.Gaussian(), lipschitz=0.5, num_probes=1)
    torch.manual_seed(0)
    values = torch.cat([roulette(lambda x: -0.5 * x, torch.zeros(50, 1))[1] for _ in range(400)])
    bound, of_signs = (
        roulette.variance_bound(0.5, 1),
        logdet.RussianRoulette().variance_bound(0.5, 1),
    )
    assert of_signs < float(values.double().var()) < bound


def test_the_warning_of_a_law_needs_no_hash_and_no_moment_of_the_probe() -> None:
    @dataclass
    class OwnLaw:
        def survival(self, term: int, num_exact: int, lipschitz: float) -> float:
            return lipschitz ** (term - num_exact)

        def has_finite_variance(self, lipschitz: float) -> bool:
            return True

    class OwnProbe:
        def sample_like(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return torch.randn_like(inputs)

    net, inputs = nn.LipschitzMLP(2, [8], coeff=0.9), torch.zeros(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logdet.RussianRoulette(lipschitz=0.85, probe=OwnProbe()).estimate(net, inputs)
        logdet.RussianRoulette(lipschitz=0.85, truncation=OwnLaw()).estimate(net, inputs)
