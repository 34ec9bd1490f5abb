"""One Cholesky factorisation as a certificate: above hostile weights, and what it needs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from nflows_iresnet import ResidualFlow, nn
from nflows_iresnet.linearization import SecondDerivativeError
from nflows_iresnet.nn import cholesky_norm
from nflows_iresnet.nn.cholesky_norm import CholeskyNorm, default_norm, top_vector
from nflows_iresnet.nn.norms import SchattenNorm
from tests.planted import norms as planted_norms
from tests.test_norms import KINDS
from tests.test_tensor_float32 import Emulation

Size = tuple[int, int]
SIZES = [(1, 1), (2, 3), (25, 25), (64, 300), (256, 256), (300, 700), (512, 512)]


def with_singular_values(values: Tensor) -> Tensor:
    left, right = (torch.linalg.qr(torch.randn(len(values), len(values)))[0] for _ in "ab")
    return left * values @ right


SPECTRA: dict[str, Callable[[Size], Tensor]] = {
    **KINDS,
    "two singular values": lambda size: torch.eye(*size) * (1 - 0.1 * (torch.arange(size[1]) % 3)),
    "dense below the top": lambda size: with_singular_values(torch.linspace(0, 1, min(size))),
    "one above equal ones": lambda size: with_singular_values(
        torch.cat([torch.ones(1), torch.full((min(size) - 1,), 0.994)])
    ),
    "rank ten": lambda size: torch.randn(size[0], 10) @ torch.randn(10, size[1]),
    "one entry": lambda size: torch.zeros(size).index_fill_(0, torch.tensor(0), 1e-30),
}


def spectral_norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.double(), 2))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_it_is_an_upper_bound_in_float32_and_the_same_in_float64(size: Size, kind: str) -> None:
    torch.manual_seed(4)
    weight, norm = SPECTRA[kind](size), CholeskyNorm()
    true = spectral_norm(weight)
    value, gradient = norm.value_and_gradient(weight, {})
    assert true <= float(value) <= 1.016 * true + 1e-300
    assert gradient.shape == weight.shape
    assert bool(gradient.isfinite().all())
    of_double, _ = norm.value_and_gradient(weight.double(), {})
    assert float(of_double) >= true
    torch.testing.assert_close(value, of_double, rtol=4e-6, atol=1e-300)


@pytest.mark.parametrize("kind", [kind for kind in SPECTRA if kind != "zero"])
def test_it_is_proved_and_needs_no_other_norm(kind: str) -> None:
    torch.manual_seed(5)
    for dtype in (torch.float32, torch.float64):
        assert bool(CholeskyNorm()._proved(SPECTRA[kind]((256, 300)).to(dtype))[2])


@pytest.mark.parametrize("factor", [1e-200, 1e-30, 1e30, 1e200])
def test_weights_of_a_float64_network_may_have_any_size(factor: float) -> None:
    torch.manual_seed(6)
    weight = torch.randn(30, 30, dtype=torch.float64)
    true = spectral_norm(weight)
    value, gradient = CholeskyNorm().value_and_gradient(factor * weight, {})
    assert 1 <= float(value) / factor / true <= 1.006
    torch.testing.assert_close((gradient * weight).sum(), value / factor, rtol=1e-9, atol=0)


def test_a_direction_that_is_missed_is_found_out_and_the_schatten_norm_stands_in() -> None:
    weight = planted_norms.orthogonal_to_the_start(64)
    norm = CholeskyNorm()
    estimate = weight @ top_vector(weight.mT @ weight, 24)
    assert float(estimate.norm()) == pytest.approx(1, abs=0.01)
    assert spectral_norm(weight) == pytest.approx(1.05)
    assert not bool(norm._proved(weight)[2])
    value, gradient = norm.value_and_gradient(weight, {})
    expected = SchattenNorm().value_and_gradient(weight, {})
    torch.testing.assert_close((value, gradient), expected)
    stack = torch.stack([weight, torch.eye(64, dtype=torch.float64), 0 * weight])
    values, gradients = norm.value_and_gradient(stack, {})
    torch.testing.assert_close((values[0], gradients[0]), expected)
    assert 1 < float(values[1]) < 1.006
    assert float(values[2]) >= 0


def test_the_rounding_of_the_factorisation_is_within_what_is_allowed() -> None:
    """A_ = R^T R is off by less than the bound of the proof, in the norm and in each entry."""
    torch.manual_seed(7)
    for size in (64, 300, 700):
        gram = torch.randn(size, size).mul(size**-0.5)
        matrix = 4.1 * torch.eye(size) - gram.mT @ gram
        factor = torch.linalg.cholesky(matrix, upper=True).double()
        error = factor.mT @ factor - matrix.double()
        allowed = cholesky_norm._relative_error_of_cholesky(size)
        largest = float(matrix.diagonal().max())
        assert spectral_norm(error) <= allowed * largest / 4
        index = torch.arange(1, size + 1)
        terms = 2.0**-24 * (torch.minimum(index, index[:, None]) + 1)
        assert bool((error.abs() <= 1.001 * terms * (factor.abs().mT @ factor.abs())).all())


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_the_norm_of_the_matrix_of_minima_is_what_the_proof_says(size: int) -> None:
    index = torch.arange(1, size + 1, dtype=torch.float64)
    minima = torch.minimum(index, index[:, None])
    unit = 2.0**-24
    allowed = cholesky_norm._relative_error_of_cholesky(size) / unit
    assert spectral_norm(minima + 1) <= allowed <= 1.01 * spectral_norm(minima) + 1.1 * size + 3


@pytest.mark.parametrize("shape", [(300, 64), (700, 300), (1500, 40)])
def test_the_rounding_of_the_gram_matrix_is_within_what_is_allowed(shape: Size) -> None:
    torch.manual_seed(8)
    matrix = torch.rand(shape)
    gram = cholesky_norm._summed_gram_matrix(matrix)
    error = gram.double() - matrix.double().mT @ matrix.double()
    allowed = cholesky_norm._relative_error_of_gram(shape) * float(gram.diagonal().sum())
    assert spectral_norm(error) <= allowed / 4


@pytest.mark.parametrize("bug", planted_norms.BUGS)
def test_a_planted_bug_is_seen(bug: str) -> None:
    """Each forgets one part of the certificate, and loses a matrix for which it is needed."""
    planted, weight = planted_norms.BUGS[bug]()
    true = torch.linalg.matrix_norm(weight, 2) * (1 - 1e-12)
    assert not bool((planted.value_and_gradient(weight, {})[0] >= true).all())
    healthy = CholeskyNorm(planted.num_steps, planted.slack)
    assert bool((healthy.value_and_gradient(weight, {})[0] >= true).all())


def test_the_allowance_for_the_gram_matrix_is_needed_and_suffices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums of positive terms that lose as much as sums in float32 may, for a matrix of rank one."""
    weight, norm = torch.ones(500, 30), CholeskyNorm(slack=1e-7)
    summed = cholesky_norm._summed_gram_matrix
    lost = 501 * 2.0**-24
    monkeypatch.setattr(
        cholesky_norm, "_summed_gram_matrix", lambda unit: summed(unit) * (1 - lost)
    )
    monkeypatch.setattr(cholesky_norm, "top_vector", _shrunk_by((1 - lost) ** 0.5))
    assert bool(norm._proved(weight)[2])
    assert float(norm(weight)) >= spectral_norm(weight)
    monkeypatch.setattr(cholesky_norm, "_relative_error_of_gram", lambda shape: 0.0)
    assert float(norm(weight)) < spectral_norm(weight)


def _shrunk_by(factor: float) -> Callable[[Tensor, int], Tensor]:
    """Estimate what the matrix that lost something allows: the least that can be proved."""
    return lambda gram, num_steps: top_vector(gram, num_steps) * factor * (1 + 1e-7)


def test_the_allowance_for_the_factorisation_is_needed_and_suffices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A factorisation that runs through for as negative an eigenvalue as its rounding may hide."""
    size, cholesky = 256, torch.linalg.cholesky_ex
    index = torch.arange(1, size + 1)
    hidden = 2.0**-24 * spectral_norm(torch.minimum(index, index[:, None]) + 1)

    def runs_through(matrix: Tensor) -> object:
        largest = matrix.diagonal().max() if len(matrix) == size else 0 * matrix[0, 0]
        return cholesky(matrix.double() + 1.001 * hidden * largest * torch.eye(len(matrix)))

    singular = torch.full((size,), 0.1, dtype=torch.float64)
    singular[0], singular[1] = 1, (1 - 0.98 * hidden) ** 0.5
    weight, second = singular.diag().float(), torch.eye(size)[:, 1:2]
    monkeypatch.setattr(cholesky_norm, "top_vector", lambda gram, num_steps: second)
    norm = CholeskyNorm(slack=1e-8)
    assert not bool(norm._proved(weight)[2])
    monkeypatch.setattr(torch.linalg, "cholesky_ex", runs_through)
    assert bool(norm._proved(weight)[2])
    assert float(norm(weight)) >= 1
    monkeypatch.setattr(cholesky_norm, "_relative_error_of_cholesky", lambda size: 0.0)
    monkeypatch.setattr(cholesky_norm, "_relative_error_of_gram", lambda shape: 0.0)
    assert float(norm(weight)) < 1


def test_the_gradient_belongs_to_the_value() -> None:
    """<grad |W|, W> = |W|, the allowance included: else normalising would not be a projection."""
    torch.manual_seed(9)
    for size in ((256, 256), (512, 300)):
        weight = torch.randn(size)
        value, gradient = CholeskyNorm().value_and_gradient(weight, {})
        torch.testing.assert_close((gradient * weight).sum().double(), value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (20, 20), (60, 40)])
def test_the_gradient_is_that_of_finite_differences(shape: Size) -> None:
    """Where the Krylov space holds the top direction: all of it, or a separated one."""
    torch.manual_seed(10)
    weight = torch.randn(shape, dtype=torch.float64)
    weight += torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
    value, gradient = CholeskyNorm().value_and_gradient(weight, {})
    true = spectral_norm(weight)
    for _ in range(5):
        step = 1e-5 * torch.randn(shape, dtype=torch.float64)
        ends = [float(CholeskyNorm()(weight + sign * step)) for sign in (1, -1)]
        pairing = float((gradient * step).sum())
        assert (ends[0] - ends[1]) / 2 == pytest.approx(pairing, rel=1e-5, abs=1e-9)
    exact = torch.autograd.functional.jacobian(nn.SpectralNorm(), weight)
    torch.testing.assert_close(gradient / float(value), exact / true, rtol=0, atol=1e-7)


def test_the_gradient_has_the_direction_of_the_schatten_norms() -> None:
    torch.manual_seed(11)
    weight = torch.randn(300, 256) + 0.3 * torch.outer(torch.randn(300), torch.randn(256))
    norms = (CholeskyNorm(), SchattenNorm())
    ours, theirs = (norm.value_and_gradient(weight, {})[1].flatten() for norm in norms)
    assert float(torch.cosine_similarity(ours, theirs, dim=0)) > 0.9999


def test_the_gradient_is_a_subgradient_to_within_the_slack() -> None:
    """|W'| >= <u v^T, W'>, and |W| <= value: for every W', wherever Lanczos stopped."""
    torch.manual_seed(12)
    weight = with_singular_values(1 - torch.linspace(0, 1, 300).square())
    value, gradient = CholeskyNorm(num_steps=4, slack=0.1).value_and_gradient(weight, {})
    unit = gradient / torch.linalg.matrix_norm(gradient, 2)
    reached = float((unit * weight).sum())
    for other in (torch.randn(300, 300), -weight, weight + 0.1 * torch.randn(300, 300)):
        rise = float((unit * (other - weight)).sum())
        assert spectral_norm(other) >= spectral_norm(weight) + rise - (float(value) - reached)


def test_values_alone_and_in_a_stack_are_equal_and_nothing_is_random() -> None:
    torch.manual_seed(13)
    weights, norm = torch.randn(3, 260, 270), CholeskyNorm()
    state = torch.get_rng_state()
    together = norm.value_and_gradient(weights, {})
    again = norm.value_and_gradient(weights, {})
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(*pair) for pair in zip(together, again, strict=True))
    for weight, *of_stack in zip(weights, *together, strict=True):
        value, gradient = norm.value_and_gradient(weight, {})
        torch.testing.assert_close(of_stack[0], value, rtol=1e-6, atol=0)
        torch.testing.assert_close(of_stack[1], gradient, rtol=0, atol=1e-5)
    values, _ = norm.of_stack(weights, [{}] * 3)
    torch.testing.assert_close(values, together[0], rtol=1e-6, atol=0)


def test_float32_is_used_where_its_rounding_adds_little() -> None:
    assert CholeskyNorm()._dtype(torch.empty(32, 32)) == torch.float32
    assert CholeskyNorm()._dtype(torch.empty(1025, 1025)) == torch.float64
    assert CholeskyNorm()._dtype(torch.empty(32, 32, dtype=torch.float64)) == torch.float64


@pytest.mark.parametrize("size", [32, 300])
def test_no_setting_of_short_products_reaches_the_bound(size: int) -> None:
    torch.manual_seed(0)
    weight, before = torch.randn(size, size), torch.get_float32_matmul_precision()
    expected = CholeskyNorm()(weight)
    try:
        torch.set_float32_matmul_precision("high")
        with Emulation():
            found = CholeskyNorm()(weight)
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    layer = nn.LipschitzLinear(30, 30, norm=CholeskyNorm())
    with torch.no_grad():
        layer.weight[3, 4] = value
    with pytest.raises(ValueError, match="training has diverged"):
        layer(torch.zeros(1, 30))


def test_function_transforms_and_their_second_derivative() -> None:
    torch.manual_seed(14)
    layer = nn.LipschitzLinear(3, 40, bias=False, coeff=0.5, norm=CholeskyNorm()).double()
    inputs = torch.randn(2, 3, dtype=torch.float64)

    def function(weight: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight}, inputs).sin().sum()

    weights = 3 * torch.randn(2, 40, 3, dtype=torch.float64)
    expected = [torch.autograd.functional.jacobian(function, weight) for weight in weights]
    torch.testing.assert_close(grad(function)(weights[0]), expected[0])
    torch.testing.assert_close(torch.func.jacfwd(function)(weights[0]), expected[0])
    torch.testing.assert_close(vmap(grad(function))(weights), torch.stack(expected))
    with pytest.raises(SecondDerivativeError, match=r"SchattenNorm\(\)"):
        jacrev(jacrev(function))(weights[0])
    with pytest.raises(SecondDerivativeError, match=r"SchattenNorm\(\)"):
        torch.autograd.functional.hessian(function, weights[0])


def test_vmap_of_the_norm_of_wide_weights() -> None:
    torch.manual_seed(15)
    weights, norm = torch.randn(2, 40, 50, dtype=torch.float64), CholeskyNorm()
    expected = torch.stack([norm(weight) for weight in weights])
    torch.testing.assert_close(vmap(norm)(weights), expected)


def test_the_default_is_chosen_by_the_shape_and_is_shown() -> None:
    net = nn.LipschitzMLP(2, [256, 300])
    assert [layer.norm for layer in net.normed_layers] == [
        SchattenNorm(),
        CholeskyNorm(),
        SchattenNorm(),
    ]
    assert "norm=CholeskyNorm(num_steps=24, slack=0.005)" in repr(net)
    assert net.lipschitz_bound() <= 0.97
    assert isinstance(default_norm(255, 1000), SchattenNorm)
    assert isinstance(nn.LipschitzLinear(256, 256).norm, CholeskyNorm)
    dense = nn.LipschitzDenseNet(256, [256])
    assert all(isinstance(layer.norm, CholeskyNorm) for layer in dense.normed_layers)


WIDE: dict[str, Callable[[], torch.nn.Module]] = {
    "mlp": lambda: nn.LipschitzMLP(256, [256]),
    "dense": lambda: nn.LipschitzDenseNet(256, [256]),
    "linear": lambda: nn.LipschitzLinear(256, 256),
}
OLDER: dict[str, Callable[[], torch.nn.Module]] = {
    "mlp": lambda: nn.LipschitzMLP(256, [256], norm=SchattenNorm()),
    "dense": lambda: nn.LipschitzDenseNet(256, [256], norm=SchattenNorm()),
    "linear": lambda: nn.LipschitzLinear(256, 256, norm=SchattenNorm()),
}


@pytest.mark.parametrize("kind", WIDE)
def test_states_of_the_older_default_load_as_the_function_they_were(kind: str) -> None:
    torch.manual_seed(16)
    older, newer, inputs = OLDER[kind](), WIDE[kind](), torch.randn(3, 256)
    with torch.no_grad():
        for parameter in older.parameters():
            parameter.mul_(3)
    of_today = newer.state_dict()
    newer.load_state_dict(older.state_dict())
    torch.testing.assert_close(newer(inputs), older(inputs), rtol=0, atol=0)
    assert "CholeskyNorm" not in repr(newer)
    newer.load_state_dict(of_today)
    assert "CholeskyNorm" in repr(newer)
    with pytest.raises(RuntimeError, match="was saved with norm="):
        older.load_state_dict(of_today)


@pytest.mark.slow
def test_a_wide_flow_trains_and_is_certified() -> None:
    torch.manual_seed(17)
    flow = ResidualFlow(8, 256, 1)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    inputs = torch.randn(64, 8).sign() + 0.1 * torch.randn(64, 8)
    for _ in range(5):
        optimizer.zero_grad()
        (-flow.log_prob(inputs).mean()).backward()
        optimizer.step()
    for weight in (each.detach() for each in flow.parameters() if each.dim() == 2):
        assert (
            spectral_norm(weight) <= float(CholeskyNorm()(weight)) <= 1.02 * spectral_norm(weight)
        )


def test_a_wide_network_compiles_to_one_graph_of_the_same_function() -> None:
    """Where no value can be looked at, both norms are computed and one is taken."""
    torch.manual_seed(18)
    layers = [nn.LipschitzLinear(30, 40, norm=CholeskyNorm(num_steps=8)) for _ in "ab"]
    with torch.no_grad():
        layers[1].weight.zero_()
    for layer in layers:
        inputs = torch.randn(3, 30)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(layer(inputs).sin().sum(), layer.weight)[0]
        found = torch.autograd.grad(compiled(inputs).sin().sum(), layer.weight)[0]
        torch.testing.assert_close(compiled(inputs), layer(inputs))
        torch.testing.assert_close(found, expected)
