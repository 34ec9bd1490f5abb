"""Losses of normflows through ToNormflows: they train, and equal a direct computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import normflows as nf
import pytest
import torch
from nflows import transforms as nflows_transforms
from torch import Tensor, nn

from nflows_iresnet import ResidualTransform
from nflows_iresnet.interop.normflows import ToNormflows
from nflows_iresnet.nn import LipschitzMLP


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _block(features: int = 2, context: int | None = None) -> ResidualTransform:
    net = LipschitzMLP(features, [16, 16], context, coeff=0.8)
    with torch.no_grad():
        for parameter in net.layers.parameters():
            parameter.mul_(3)
    return ResidualTransform(net)


def _residual_stack(features: int = 2, context: int | None = None) -> list[ToNormflows]:
    return [
        ToNormflows(_block(features, context)),
        ToNormflows(nflows_transforms.LULinear(features)),
        ToNormflows(_block(features, context)),
    ]


class Banana(nn.Module):
    """A target with the interface of normflows, with context as its shift."""

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        z = z if context is None else z - context[:, :2]
        return -z[:, 0].square() / 2 - 2 * (z[:, 1] - 0.5 * z[:, 0].square()).square()


class HeavyTailed(nn.Module):
    """A target whose importance weights are bounded, as alpha divergences need it."""

    def log_prob(self, z: Tensor) -> Tensor:
        offsets = (z - z.new_tensor([1.0, -0.5])) / z.new_tensor([2.0, 1.0])
        return -2 * offsets.square().sum(1).log1p()


@dataclass(frozen=True)
class Model:
    """A model of normflows made of residual blocks, and its losses."""

    build: Callable[[], nn.Module]
    losses: Mapping[str, Callable[[Any], Tensor]]


def _normalizing() -> nn.Module:
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(2), _residual_stack(), Banana())


def _heavy_tailed() -> nn.Module:
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(2), _residual_stack(), HeavyTailed())


def _conditional() -> nn.Module:
    base = nf.distributions.base.ConditionalDiagGaussian(2, nn.Linear(3, 4))
    return nf.ConditionalNormalizingFlow(base, _residual_stack(2, 3), Banana())


def _class_conditional() -> nn.Module:
    base = nf.distributions.ClassCondDiagGaussian(2, num_classes=3)
    return nf.ClassCondFlow(base, _residual_stack())


def _multiscale() -> nn.Module:
    bases = [nf.distributions.DiagGaussian(2) for _ in range(2)]
    levels = [_residual_stack(2), _residual_stack(4)]
    return nf.MultiscaleFlow(bases, levels, [nf.flows.Merge()], class_cond=False)


def _autoencoder() -> nn.Module:
    encoder = nf.distributions.NNDiagGaussian(nn.Linear(3, 4))
    return nf.NormalizingFlowVAE(Banana(), encoder, _residual_stack())


def _negative_elbo(model: Any) -> Tensor:
    _, log_q, log_p = model(_data(3), num_samples=2)
    return (log_q - log_p).mean()


def _data(features: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return 2 * torch.randn(64, features, generator=generator) + 1


MODELS = {
    "normalizing": Model(
        _normalizing,
        {
            "forward_kld": lambda model: model.forward_kld(_data()),
            "reverse_kld": lambda model: model.reverse_kld(64),
            "reverse_kld-path": lambda model: model.reverse_kld(64, score_fn=False),
        },
    ),
    "heavy-tailed": Model(
        _heavy_tailed,
        {
            "reverse_kld": lambda model: model.reverse_kld(256),
            "alpha": lambda model: model.reverse_alpha_div(256, alpha=2),
            "alpha-dreg": lambda model: model.reverse_alpha_div(256, alpha=0.5, dreg=True),
        },
    ),
    "conditional": Model(
        _conditional,
        {
            "forward_kld": lambda model: model.forward_kld(_data(), context=_data(3)),
            "reverse_kld": lambda model: model.reverse_kld(64, context=_data(3)),
            "reverse_kld-path": lambda model: model.reverse_kld(
                64, context=_data(3), score_fn=False
            ),
        },
    ),
    "class-conditional": Model(
        _class_conditional,
        {"forward_kld": lambda model: model.forward_kld(_data(), torch.arange(64) % 3)},
    ),
    "multiscale": Model(_multiscale, {"forward_kld": lambda model: model.forward_kld(_data(4))}),
    "autoencoder": Model(_autoencoder, {"elbo": _negative_elbo}),
}
LOSSES = [(model, loss) for model in MODELS for loss in MODELS[model].losses]
DIRECT = ("normalizing", "heavy-tailed", "conditional")


@pytest.mark.parametrize(("model", "loss"), LOSSES)
def test_models_train(model: str, loss: str) -> None:
    flow = MODELS[model].build()
    objective = MODELS[model].losses[loss]
    measure = MODELS[model].losses["reverse_kld"] if loss.startswith("alpha") else objective
    torch.manual_seed(1)
    before = measure(flow).item()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(40 if loss.startswith("alpha") else 10):  # whose gradients scatter
        optimizer.zero_grad()
        objective(flow).backward()
        for name, parameter in flow.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
    torch.manual_seed(1)
    assert measure(flow).item() < before - 0.05


class Unrolled(nf.flows.Flow):
    """The same block the slow way: iterations and Jacobians that autograd sees step by step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def _log_det(self, x: Tensor, context: Tensor | None) -> Tensor:
        def row(x: Tensor, context: Tensor | None) -> Tensor:
            outputs: Tensor = self.net(x[None], None if context is None else context[None])
            return x + outputs[0]

        in_dims = (0, None if context is None else 0)
        jacobian = torch.func.vmap(torch.func.jacrev(row), in_dims)(x, context)
        return torch.linalg.slogdet(jacobian).logabsdet

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = z
        for _ in range(100):
            x = z - self.net(x, context)
        return x, -self._log_det(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z + self.net(z, context), self._log_det(z, context)


def _unrolled(model: Any) -> Any:
    flows = [
        Unrolled(flow.transform.net) if isinstance(flow.transform, ResidualTransform) else flow
        for flow in model.flows
    ]
    return type(model)(model.q0, flows, model.p)


def _value_and_gradient(loss: Callable[[Any], Tensor], model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    value = loss(model)
    parameters = [parameter for _, parameter in sorted(model.named_parameters(), key=_bare_name)]
    gradients = torch.autograd.grad(value, parameters)
    return torch.cat([value[None], *(each.flatten() for each in gradients)])


def _bare_name(named: tuple[str, nn.Parameter]) -> str:
    return named[0].replace("transform.", "")


@pytest.mark.parametrize(("model", "loss"), [pair for pair in LOSSES if pair[0] in DIRECT])
@pytest.mark.usefixtures("_float64")
def test_losses_and_gradients_equal_a_direct_computation(model: str, loss: str) -> None:
    flow = MODELS[model].build()
    objective = MODELS[model].losses[loss]
    actual = _value_and_gradient(objective, flow)
    expected = _value_and_gradient(objective, _unrolled(flow))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["normalizing", "multiscale"])
def test_samples_know_their_density(model: str) -> None:
    flow: Any = MODELS[model].build()
    samples, log_q = flow.sample(16)
    arguments = (samples, None) if model == "multiscale" else (samples,)
    torch.testing.assert_close(flow.log_prob(*arguments), log_q, atol=1e-4, rtol=0)
