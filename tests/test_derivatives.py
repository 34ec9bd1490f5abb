"""Derivatives of every order and by every way: right, or refused, never a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from nflows_iresnet import ResidualFlow, logdet, nn, solvers, transforms

Scalar = Callable[[Tensor], Tensor]


def hessian_by_differences(function: Scalar, at: Tensor, step: float = 1e-4) -> Tensor:
    gradient = jacobian_of(function)
    rows = [
        (gradient(at + shift) - gradient(at - shift)) / (2 * step)
        for shift in step * torch.eye(len(at), dtype=at.dtype)
    ]
    return torch.stack(rows)


def jacobian_of(function: Scalar) -> Scalar:
    return lambda at: torch.autograd.functional.jacobian(function, at)


def hessian_of(function: Scalar) -> Scalar:
    return lambda at: torch.autograd.functional.hessian(function, at)


def block(
    activation: torch.nn.Module | None = None, estimator: logdet.LogDetEstimator | None = None
) -> transforms.ResidualTransform:
    torch.manual_seed(0)
    net = nn.LipschitzMLP(2, [8], activation=activation).double()
    return transforms.ResidualTransform(net, estimator=estimator)


def point() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, dtype=torch.float64)


OF_INVERSE: dict[str, Callable[[transforms.ResidualTransform, Tensor], Tensor]] = {
    "squares": lambda b, z: b.inverse(z[None])[0].square().sum(),
    "mixed": lambda b, z: b.inverse(z[None])[0].sum() * z.sum(),
    "logabsdet": lambda b, z: b.inverse(z[None])[1].sum(),
}
ACTIVATIONS = {"mixed": None, "clipswish": nn.CLipSwish(), "of-torch": torch.nn.Tanh()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", OF_INVERSE)
def test_second_derivatives_through_the_inverse(name: str, activation: str) -> None:
    part = block(ACTIVATIONS[activation])

    def function(at: Tensor) -> Tensor:
        return OF_INVERSE[name](part, at)

    found = hessian_of(function)(point())
    expected = hessian_by_differences(function, point())
    assert float(expected.abs().max()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, found.mT)


@pytest.mark.parametrize("source", ["weights", "context"])
def test_second_derivatives_of_the_inverse_in_other_things_are_refused(source: str) -> None:
    torch.manual_seed(0)
    part = transforms.ResidualTransform(nn.LipschitzMLP(2, [8], 3)).double()
    context = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    values, _ = part.inverse(torch.randn(4, 2, dtype=torch.float64), context)
    sources = [context] if source == "context" else list(part.net.parameters())
    gradients = torch.autograd.grad(values.square().sum(), sources, create_graph=True)
    with pytest.raises(logdet.SecondDerivativeError, match="gradient in its inputs"):
        torch.stack([each.square().sum() for each in gradients]).sum().backward()


def test_a_gradient_in_the_inputs_may_be_differentiated_in_the_weights() -> None:
    """The other order holds the solution constant, and is refused."""
    part, outputs = block(nn.Sine()), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    bias = part.net.get_parameter("layers.0.bias")

    def gradient() -> Tensor:
        values, _ = part.inverse(outputs)
        return torch.autograd.grad(values.square().sum(), outputs, create_graph=True)[0]

    (found,) = torch.autograd.grad(gradient().sum(), bias)
    differences = []
    for index in range(len(bias)):
        ends = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                bias[index] += step
            ends.append(gradient().sum().detach())
            with torch.no_grad():
                bias[index] -= step
        differences.append((ends[0] - ends[1]) / 2e-4)
    torch.testing.assert_close(found, torch.stack(differences), rtol=1e-5, atol=1e-7)


def test_third_derivatives_through_the_inverse_are_refused() -> None:
    part, at = block(), point().requires_grad_()
    value = part.inverse(at[None])[0].square().sum()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(value, at, create_graph=True)
        value = gradient.sum()
    with pytest.raises(logdet.SecondDerivativeError):
        torch.autograd.grad(value, at)


@pytest.mark.parametrize("name", OF_INVERSE)
def test_function_transforms_of_the_inverse(name: str) -> None:
    part, at = block(), point()

    def function(z: Tensor) -> Tensor:
        return OF_INVERSE[name](part, z)

    expected = hessian_of(function)(at)
    torch.testing.assert_close(jacrev(function)(at), jacobian_of(function)(at))
    torch.testing.assert_close(jacrev(jacrev(function))(at), expected)
    torch.testing.assert_close(hessian(function)(at), expected)
    torch.testing.assert_close(jacrev(jacfwd(function))(at), expected)
    with pytest.raises(logdet.SecondDerivativeError, match="jacfwd"):
        jacfwd(jacfwd(function))(at)


def test_a_batch_of_inverses_under_vmap() -> None:
    part = block()
    rows = torch.randn(5, 2, dtype=torch.float64)

    def inverse(row: Tensor) -> Tensor:
        return part.inverse(row[None])[0][0]

    def forward(row: Tensor) -> Tensor:
        return part(row[None])[0][0]

    points = part.inverse(rows)[0].detach()
    torch.testing.assert_close(vmap(inverse)(rows).detach(), points)
    jacobians = vmap(jacrev(inverse))(rows)
    torch.testing.assert_close(jacobians @ vmap(jacrev(forward))(points), _identities(5))
    torch.testing.assert_close(vmap(jacfwd(inverse))(rows), jacobians)


def _identities(count: int) -> Tensor:
    return torch.eye(2, dtype=torch.float64).expand(count, 2, 2)


@pytest.mark.parametrize("make", [nn.LipschitzMLP, nn.LipschitzDenseNet])
def test_jacobians_of_the_inverse_in_its_context(make: Callable[..., torch.nn.Module]) -> None:
    torch.manual_seed(0)
    part = transforms.ResidualTransform(make(2, [8], 3)).double()
    rows, context = torch.randn(4, 2).double(), torch.randn(4, 3).double()

    def inverse(row: Tensor, conditions: Tensor) -> Tensor:
        return part.inverse(row[None], conditions[None])[0][0]

    found = vmap(jacrev(inverse, argnums=1))(rows, context)
    moving = context.clone().requires_grad_()
    outputs, _ = part.inverse(rows, moving)
    expected = [torch.autograd.grad(each.sum(), moving, retain_graph=True)[0] for each in outputs.T]
    torch.testing.assert_close(found, torch.stack(expected, dim=1))
    torch.testing.assert_close(jacrev(inverse, argnums=1)(rows[0], context[0]), found[0])


def test_forward_mode_through_the_inverse() -> None:
    part = block()
    rows, tangent = torch.randn(2, 4, 2, dtype=torch.float64)

    def inverse(outputs: Tensor) -> Tensor:
        return part.inverse(outputs)[0]

    whole = jacobian_of(inverse)(rows).flatten(2).flatten(0, 1)
    pushed = (whole @ tangent.flatten()).reshape(4, 2)
    torch.testing.assert_close(jvp(inverse, (rows,), (tangent,))[1], pushed)


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-10, 1e20, 1e37])
@pytest.mark.parametrize("features", [2, 40])
def test_cotangents_of_any_size(scale: float, features: int) -> None:
    torch.manual_seed(0)
    part = transforms.ResidualTransform(nn.LipschitzMLP(features, [16]))
    outputs = torch.randn(4, features, requires_grad=True)
    found = part.inverse(outputs)[0]
    cotangent = torch.randn(4, features)
    (expected,) = torch.autograd.grad(found, outputs, cotangent, retain_graph=True)
    (scaled,) = torch.autograd.grad(found, outputs, scale * cotangent)
    torch.testing.assert_close(scaled / scale, expected, rtol=1e-4, atol=1e-5)


NORMS: dict[str, nn.MatrixNorm] = {
    "schatten": nn.SchattenNorm(),
    "schatten-of-few": nn.SchattenNorm(1),
    "schatten-of-none": nn.SchattenNorm(0),
    "spectral": nn.SpectralNorm(),
    "frobenius": nn.FrobeniusNorm(),
    "power-iteration": nn.PowerIteration(),
}
CONV_NORMS: dict[str, nn.ConvNorm] = {
    "fourier": nn.FourierNorm(),
    "power-iteration": nn.ConvPowerIteration((4, 4)),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_weight_above_its_coefficient_has_no_second_derivative_along_itself(
    norm: nn.MatrixNorm,
) -> None:
    """W = 0.5 whatever the one weight is, so that every derivative is zero."""
    layer = nn.LipschitzLinear(1, 1, bias=False, coeff=0.5, norm=norm).double()

    def function(weight: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight[None]}, torch.ones(1, 1).double()).sum()

    at = torch.tensor([2.0], dtype=torch.float64)
    for second in (hessian_of(function), hessian(function), jacrev(jacrev(function))):
        torch.testing.assert_close(second(at), torch.zeros(1, 1).double(), rtol=0, atol=1e-12)


def layer_of(norm: nn.OperatorNorm) -> torch.nn.Module:
    torch.manual_seed(2)
    if isinstance(norm, nn.ConvNorm):
        return nn.LipschitzConv2d(2, 3, 3, bias=False, coeff=0.5, norm=norm).double().eval()
    assert isinstance(norm, nn.MatrixNorm)
    return nn.LipschitzLinear(3, 4, bias=False, coeff=0.5, norm=norm).double().eval()


@pytest.mark.parametrize(
    "norm",
    [*NORMS.values(), *CONV_NORMS.values()],
    ids=[*NORMS, *(f"conv-{n}" for n in CONV_NORMS)],
)
def test_second_derivatives_in_the_weights(norm: nn.OperatorNorm) -> None:
    layer = layer_of(norm)
    (weight,) = layer.parameters()
    inputs = torch.randn(2, *((2, 4, 4) if weight.dim() == 4 else (3,)), dtype=torch.float64)

    def function(flat: Tensor) -> Tensor:
        return functional_call(layer, {"weight": flat.view_as(weight)}, inputs).sin().sum()

    at = 2 * weight.detach().flatten()
    found = hessian_of(function)(at)
    torch.testing.assert_close(found, hessian_by_differences(function, at), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(jacrev(jacrev(function))(at), found)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_the_slow_twin_of_a_norm_is_the_norm(norm: nn.MatrixNorm) -> None:
    torch.manual_seed(0)
    for shape in ((5, 5), (7, 3), (2, 9), (1, 1)):
        weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        state = norm.initial_state(weight.detach())
        results = [norm(weight, state), norm.differentiable(weight, state)]
        gradients = [torch.autograd.grad(each, weight)[0] for each in results]
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=0)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-9)


SERIES: dict[str, logdet.LogDetEstimator] = {
    "power-series": logdet.PowerSeries(num_terms=4),
    "no-trace": logdet.PowerSeries(num_terms=4, exact_trace=False),
    "probes": logdet.PowerSeries(num_terms=4, num_probes=2),
    "roulette": logdet.RussianRoulette(),
}
SECOND: dict[str, Callable[[Scalar], Scalar]] = {
    "autograd": hessian_of,
    "jacrev-jacrev": lambda f: jacrev(jacrev(f)),
    "jacfwd-jacrev": lambda f: jacfwd(jacrev(f), randomness="same"),
    "jacrev-jacfwd": lambda f: jacrev(jacfwd(f, randomness="same")),
    "jacfwd-jacfwd": lambda f: jacfwd(jacfwd(f, randomness="same"), randomness="same"),
}


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("name", SERIES)
def test_a_second_derivative_of_a_series_is_refused(name: str, way: str) -> None:
    part = block(estimator=SERIES[name])
    with pytest.raises(logdet.SecondDerivativeError, match=r"logdet\.Exact"):
        SECOND[way](lambda z: part(z[None])[1].sum())(point())


def test_a_second_derivative_of_a_series_in_the_weights_is_refused() -> None:
    part = block(estimator=logdet.PowerSeries(num_terms=4))
    loss = part(torch.randn(3, 2, dtype=torch.float64))[1].sum()
    gradients = torch.autograd.grad(loss, list(part.parameters()), create_graph=True)
    penalty = torch.stack([each.square().sum() for each in gradients]).sum()
    with pytest.raises(logdet.SecondDerivativeError):
        penalty.backward()


def test_first_derivatives_of_a_series_with_a_graph_are_not_refused() -> None:
    part = block(estimator=logdet.PowerSeries(num_terms=4))
    inputs = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    gradients = []
    for create_graph in (False, True):
        torch.manual_seed(0)
        total = part(inputs)[1].sum()
        gradients.append(torch.autograd.grad(total, inputs, create_graph=create_graph)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


@dataclass(frozen=True)
class Alternating:
    """A probe without randomness."""

    def sample_like(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return 1 - 2 * (torch.arange(inputs.shape[-1]) % 2).to(inputs).expand_as(inputs)


def test_forward_mode_of_a_series_is_reverse_mode() -> None:
    part = block(estimator=logdet.PowerSeries(num_terms=6, probe=Alternating()))

    def function(z: Tensor) -> Tensor:
        return part(z[None])[1].sum()

    expected = jacobian_of(function)(point())
    for way in (jacrev, jacfwd):
        torch.testing.assert_close(way(function)(point()), expected)


def test_second_derivatives_of_the_exact_log_determinant() -> None:
    part = block(estimator=logdet.Exact())

    def function(z: Tensor) -> Tensor:
        return part(z[None])[1].sum()

    expected = hessian_by_differences(function, point())
    for way in (hessian_of(function), hessian(function), jacrev(jacrev(function))):
        torch.testing.assert_close(way(point()), expected, rtol=1e-5, atol=1e-7)


def test_gradients_row_by_row_with_different_randomness() -> None:
    torch.manual_seed(0)
    flow = ResidualFlow(8, 8, 2)
    rows = torch.randn(6, 8)
    flow.log_prob(rows)
    gradients = vmap(
        torch.func.grad(lambda row: flow.log_prob(row[None])[0]), randomness="different"
    )
    assert gradients(rows).shape == (6, 8)
    image = transforms.ResidualTransform(nn.LipschitzCNN(1, [4, 4]))
    total = vmap(torch.func.grad(lambda row: image(row[None])[1][0]), randomness="different")
    assert bool(total(torch.randn(3, 1, 4, 4)).isfinite().all())


def test_the_truncation_under_vmap_follows_its_law() -> None:
    """The number of terms is one draw for all lanes; its mean is that of the law."""
    roulette = logdet.RussianRoulette()
    counts: list[int] = []

    def lane(row: Tensor) -> Tensor:
        counts.append(len(roulette.term_weights(0.9)))
        return row

    torch.manual_seed(0)
    for _ in range(400):
        vmap(lane, randomness="different")(torch.zeros(3))
    drawn = torch.tensor(counts, dtype=torch.float64)
    error = float(drawn.std()) / 20
    assert abs(float(drawn.mean()) - roulette.expected_terms(0.9)) < 6 * error


def test_a_solver_that_cannot_converge_still_raises_under_vmap() -> None:
    net = _Expanding().double()
    part = transforms.ResidualTransform(net, estimator=logdet.Exact())
    with pytest.raises(solvers.FixedPointNotConverged):
        vmap(lambda row: part.inverse(row[None])[0])(torch.randn(3, 2, dtype=torch.float64))


class _Expanding(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.weight * inputs


# --- weights that are others when gradients come back ---------------------------------------------


class Scaled(torch.nn.Module):
    """g(x) = w sin(x), differentiated automatically."""

    lipschitz = 0.9

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.weight * inputs.sin()


def of_scaled(kind: type[transforms.ResidualTransform]) -> Callable[[], torch.nn.Module]:
    return lambda: _Inverse(kind(Scaled(), estimator=logdet.Exact()))


class _Inverse(torch.nn.Module):
    def __init__(self, transform: transforms.ResidualTransform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, inputs: Tensor) -> Tensor:
        values, logabsdet = self.transform.inverse(inputs)
        return values.sum() + logabsdet.sum()


INVERSES: dict[str, Callable[[], torch.nn.Module]] = {
    "residual": of_scaled(transforms.ResidualTransform),
    "monotone": of_scaled(transforms.MonotoneTransform),
    "parameter-of-an-activation": lambda: _Inverse(block(nn.CLipSwish())),
    "activation-of-torch": lambda: _Inverse(block(torch.nn.Tanh())),
}


@pytest.mark.parametrize("make", INVERSES.values(), ids=INVERSES)
def test_lent_weights_are_those_that_gradients_come_back_to(
    make: Callable[[], torch.nn.Module],
) -> None:
    """`functional_call` has taken them back by then, and an ensemble has none of its own."""
    module, at = make(), torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(3, 2)
    buffers = dict(module.named_buffers())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(module, {**weights, **buffers}, (at,))

    own = {name: each.detach() for name, each in module.named_parameters()}
    stacks = {name: torch.stack([each, 1.5 * each, 2 * each]) for name, each in own.items()}
    together = vmap(grad(loss))(stacks)
    for index in range(3):
        lent = {name: each[index].clone().requires_grad_() for name, each in stacks.items()}
        lent_gradients = gradients(loss(lent), lent)
        module.load_state_dict({**lent, **buffers})
        owned = gradients(module(at), dict(module.named_parameters()))
        for name in own:
            torch.testing.assert_close(lent_gradients[name], owned[name])
            torch.testing.assert_close(together[name][index], owned[name])


def gradients(loss: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(of.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(of, found, strict=True))


@pytest.mark.parametrize("make", INVERSES.values(), ids=INVERSES)
def test_weights_that_are_overwritten_before_the_backward_pass_are_noticed_or_do_not_matter(
    make: Callable[[], torch.nn.Module],
) -> None:
    """A normalised weight has its own memory; what is used as it is has not."""
    module = make().requires_grad_(False)
    at = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(module(at), at)
    noticed = set()
    for name, weight in module.named_parameters():
        loss, before = module(at), weight.clone()
        weight.mul_(1.5)
        try:
            torch.testing.assert_close(torch.autograd.grad(loss, at)[0], expected)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            noticed.add(name.rpartition(".")[2])
        weight.copy_(before)
    assert noticed & {"weight", "bias", "unconstrained_beta"}


def test_lent_weights_are_those_that_are_recomputed() -> None:
    def gradient(*, recompute: bool) -> Tensor:
        torch.manual_seed(0)
        flow = ResidualFlow(2, 8, 2, activation=nn.CLipSwish(), recompute=recompute).eval().double()
        lent = {name: 1.5 * each.detach() for name, each in flow.named_parameters()}
        beta = next(each for name, each in lent.items() if "beta" in name).requires_grad_()
        score = _Score(flow)
        named = {f"flow.{name}": each for name, each in lent.items()}
        loss = functional_call(score, named, (torch.ones(3, 2, dtype=torch.float64),))
        return torch.autograd.grad(loss.sum(), beta)[0]

    torch.testing.assert_close(gradient(recompute=True), gradient(recompute=False))


class _Score(torch.nn.Module):
    def __init__(self, flow: ResidualFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, inputs: Tensor) -> Tensor:
        return self.flow.log_prob(inputs)


class Counting(nn.CLipSwish):
    """Counts its calls, in a buffer and beside it."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen = 0

    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        self.seen += 1
        return super().value_and_slope(inputs)


def test_activations_may_change_what_no_gradient_goes_through() -> None:
    def gradient(activation: torch.nn.Module) -> list[Tensor]:
        part = block(activation)
        at = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
        values, logabsdet = part.inverse(part.inverse(at)[0])
        loss = values.sum() + logabsdet.sum() + part(at)[1].sum()
        return list(torch.autograd.grad(loss, [at, *part.parameters()], allow_unused=True))

    counting = Counting()
    part = block(counting)
    part.inverse(torch.ones(3, 2, dtype=torch.float64))
    assert sum(each.seen for each in part.modules() if isinstance(each, Counting)) > 0
    for found, expected in zip(gradient(counting), gradient(nn.CLipSwish()), strict=True):
        torch.testing.assert_close(found, expected)


def test_activations_may_be_parametrised() -> None:
    class Half(torch.nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values / 2

    activation = nn.LipSwish()
    torch.nn.utils.parametrize.register_parametrization(activation, "unconstrained_beta", Half())
    part = block(activation)
    at = torch.ones(3, 2, dtype=torch.float64)
    values, _ = part.inverse(at)
    values.sum().backward()
    torch.testing.assert_close(part(values)[0], at)
    assert all(each.grad is not None for each in part.parameters())


def test_what_cannot_be_recomputed_is_named_with_the_remedy() -> None:
    flow = ResidualFlow(2, 8, 2, activation=torch.nn.Tanh(), recompute=True)
    with pytest.raises(ValueError, match=r"recompute=True.*leave them out"):
        flow.log_prob(torch.randn(8, 2))


@pytest.mark.parametrize("estimator", [logdet.Exact(), logdet.PowerSeries(num_terms=30)])
@pytest.mark.parametrize("kind", [transforms.ResidualTransform, transforms.MonotoneTransform])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_forward_mode_has_derivatives_without_gradients_too(
    direction: str, kind: type[transforms.ResidualTransform], estimator: logdet.LogDetEstimator
) -> None:
    torch.manual_seed(0)
    block = kind(nn.LipschitzMLP(3, [8, 8]), estimator=estimator).double()
    function = getattr(block, direction)
    point, tangent = torch.randn(2, 4, 3, dtype=torch.float64)

    def pushed() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return jvp(function, (point,), (tangent,))[1]

    def pushed_by_duals() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        with forward_ad.dual_level():
            outputs = function(forward_ad.make_dual(point, tangent))
            return tuple(forward_ad.unpack_dual(each).tangent for each in outputs)

    wanted = pushed()
    assert min(float(each.abs().max()) for each in wanted) > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(pushed(), wanted, rtol=1e-9, atol=1e-11)
    with torch.inference_mode():
        if bool(jvp(torch.sin, (point,), (tangent,))[1].any()):  # not so in old versions of torch
            torch.testing.assert_close(pushed(), wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(pushed_by_duals(), wanted, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(pushed_by_duals(), wanted, rtol=1e-9, atol=1e-11)
