"""Every transform that keeps the contract: adding one is adding one line to CASES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from nflows import transforms as nflows_transforms
from nflows.nn.nets import ResidualNet
from torch import Tensor, nn

from nflows_iresnet import flows, logdet, solvers, transforms
from nflows_iresnet import nn as lipschitz_nn
from tests.device import generator

NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Case:
    """A transform, the sizes of its inputs, and the clauses that it cannot keep, with reasons."""

    factory: Callable[[], nn.Module]
    features: int = 3
    shape: tuple[int, ...] | None = None
    """Of one row where it is no vector of `features`."""
    context_features: int | None = None
    bias: float = 0.0
    num_draws: int = 200
    excluded: Mapping[str, str] = field(default_factory=lambda: NONE)
    is_variant: bool = False
    """A variation of another case: its costly clauses are marked slow."""

    def inputs(self) -> Tensor:
        torch.manual_seed(11)
        return torch.randn(4, *(self.shape or (self.features,)), dtype=torch.float64)

    def context(self) -> Tensor | None:
        if self.context_features is None:
            return None
        torch.manual_seed(12)
        return torch.randn(4, self.context_features, dtype=torch.float64)


class FixedLinear(nn.Module):
    """g(x) = A x with a matrix of a given norm: its Jacobian is large, and known."""

    def __init__(self, features: int = 3, norm: float = 0.8) -> None:
        super().__init__()
        matrix = torch.randn(features, features, generator=generator(1))
        self.weight = nn.Parameter(norm * matrix / torch.linalg.matrix_norm(matrix, ord=2))
        self.lipschitz = norm

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.mT

    def lipschitz_bound(self) -> float:
        return lipschitz_nn.spectral_norm_bound(self.weight)


class ConditionalByAutograd(nn.Module):
    """A net of a user: no structure to exploit, with context."""

    def __init__(self) -> None:
        super().__init__()
        self.first = lipschitz_nn.LipschitzLinear(3, 8)
        self.second = lipschitz_nn.LipschitzLinear(8, 3)
        self.context = nn.Linear(2, 8)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        shift = 0 if context is None else self.context(context)
        outputs: Tensor = self.second(torch.tanh(self.first(inputs) + shift))
        return outputs


def _mlp(
    *hidden: int,
    features: int = 3,
    context: int | None = None,
    activation: nn.Module | None = None,
    norm: lipschitz_nn.MatrixNorm | None = None,
) -> lipschitz_nn.LipschitzMLP:
    torch.manual_seed(2)
    return lipschitz_nn.LipschitzMLP(features, hidden, context, activation=activation, norm=norm)


def _dense(*hidden: int, **options: Any) -> lipschitz_nn.LipschitzDenseNet:
    torch.manual_seed(2)
    context = options.pop("context", None)
    return lipschitz_nn.LipschitzDenseNet(3, hidden, context, **options)


def _cnn(
    *hidden: int, channels: int = 1, context: int | None = None, **options: Any
) -> lipschitz_nn.LipschitzCNN:
    torch.manual_seed(2)
    return lipschitz_nn.LipschitzCNN(channels, hidden, context, **options)


def _block(
    net: nn.Module,
    estimator: logdet.LogDetEstimator | None = None,
    solver: solvers.Solver | None = None,
) -> transforms.ResidualTransform:
    return transforms.ResidualTransform(net, estimator=estimator, solver=solver)


def _monotone(
    net: nn.Module,
    estimator: logdet.LogDetEstimator | None = None,
    solver: solvers.Solver | None = None,
) -> transforms.MonotoneTransform:
    return transforms.MonotoneTransform(net, estimator=estimator, solver=solver)


def _roulette(continuation: float | None = None, **options: float) -> logdet.RussianRoulette:
    law = (
        logdet.LipschitzTruncation()
        if continuation is None
        else logdet.GeometricTruncation(continuation)
    )
    return logdet.RussianRoulette(truncation=law, **options)  # type: ignore[arg-type]


def _preset(flow: nn.Module) -> nn.Module:
    transform: nn.Module = flow._transform  # type: ignore[assignment]
    return transform


def _spline(features: int = 3) -> nn.Module:
    torch.manual_seed(3)
    spline = transforms.ElementwiseRationalQuadraticSpline(features, num_bins=4, bound=2.0)
    for parameter in spline.parameters():
        nn.init.normal_(parameter)
    return spline


def _linear() -> nn.Module:
    torch.manual_seed(3)
    linear = transforms.LinearTransform(3)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, std=0.5)
    return linear


def _coupling() -> nn.Module:
    return nflows_transforms.AffineCouplingTransform(
        torch.tensor([1, -1, 1]), lambda i, o: ResidualNet(i, o, 8, context_features=2)
    )


def _by_splines(partner: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    transform = partner(1, 3, 8, 1, 2, num_bins=4, bound=2.0)
    for parameter in transform.parameters():
        nn.init.normal_(parameter, std=0.4)
    return transform


def _maf() -> nn.Module:
    return nflows_transforms.MaskedAffineAutoregressiveTransform(3, 8, num_blocks=1)


_OPTIONAL = {"forgotten_context": "a net of a user that works without its context, too"}
_INCOMPATIBLE_WITH_VMAP = {"vmap_and_jacrev": "nflows' autoregressive inverse is not batched"}
_AUTOCAST = {"autocast": "nflows computes in bfloat16 inside autocast: errors of 1e-2"}

CASES: dict[str, Case] = {
    "mlp-linear": Case(lambda: _block(_mlp())),
    "mlp-1": Case(lambda: _block(_mlp(16)), is_variant=True),
    "mlp-2": Case(lambda: _block(_mlp(16, 12))),
    "mlp-3": Case(lambda: _block(_mlp(8, 8, 8)), is_variant=True),
    "mlp-context": Case(lambda: _block(_mlp(8, 8, context=2)), context_features=2),
    "mlp-1d": Case(lambda: _block(_mlp(8, features=1)), features=1, is_variant=True),
    "mlp-5d-lu": Case(lambda: _block(_mlp(8, features=5)), features=5),
    "mlp-sine": Case(lambda: _block(_mlp(8, 8, activation=lipschitz_nn.Sine())), is_variant=True),
    "mlp-lipswish": Case(
        lambda: _block(_mlp(8, 8, activation=lipschitz_nn.LipSwish())), is_variant=True
    ),
    "mlp-clipswish": Case(lambda: _block(_mlp(8, 8, activation=lipschitz_nn.CLipSwish()))),
    "mlp-softplus": Case(
        lambda: _block(_mlp(8, 8, activation=lipschitz_nn.Softplus())), is_variant=True
    ),
    "mlp-elu": Case(lambda: _block(_mlp(8, 8, activation=lipschitz_nn.ELU())), is_variant=True),
    "mlp-tanh-of-torch": Case(lambda: _block(_mlp(8, 8, activation=nn.Tanh())), is_variant=True),
    "mlp-maxmin": Case(lambda: _block(_mlp(8, 8, activation=lipschitz_nn.MaxMin()))),
    "mlp-schatten": Case(
        lambda: _block(_mlp(8, 8, norm=lipschitz_nn.SchattenNorm())), is_variant=True
    ),
    "mlp-frobenius": Case(
        lambda: _block(_mlp(8, 8, norm=lipschitz_nn.FrobeniusNorm())), is_variant=True
    ),
    "module-of-a-user": Case(
        lambda: _block(ConditionalByAutograd()), context_features=2, excluded=_OPTIONAL
    ),
    "picard": Case(
        lambda: _block(_mlp(8, 8), solver=solvers.FixedPointIteration()), is_variant=True
    ),
    "anderson-1": Case(
        lambda: _block(_mlp(8, 8), solver=solvers.Anderson(history=1)), is_variant=True
    ),
    "exact-in-chunks": Case(
        lambda: _block(_mlp(8, 8), logdet.Exact(chunk_size=2)), is_variant=True
    ),
    "series": Case(
        lambda: _block(FixedLinear(norm=0.6), logdet.PowerSeries(num_terms=12)),
        bias=logdet.PowerSeries(num_terms=12).bias_bound(0.6, 3),
    ),
    "series-gaussian": Case(
        lambda: _block(
            FixedLinear(norm=0.6), logdet.PowerSeries(num_terms=12, probe=logdet.Gaussian())
        ),
        bias=logdet.PowerSeries(num_terms=12).bias_bound(0.6, 3),
        is_variant=True,
    ),
    "roulette-linear-0.8": Case(lambda: _block(FixedLinear(norm=0.8), _roulette())),
    "roulette-geometric": Case(
        lambda: _block(FixedLinear(norm=0.6), _roulette(0.7)), is_variant=True
    ),
    "roulette-mlp": Case(lambda: _block(_mlp(8, 8), _roulette())),
    "roulette-no-trace": Case(
        lambda: _block(_mlp(8, 8), _roulette(exact_trace=False)), is_variant=True
    ),
    "roulette-probes": Case(lambda: _block(_mlp(8, 8), _roulette(num_probes=3)), num_draws=100),
    "roulette-of-a-user": Case(
        lambda: _block(ConditionalByAutograd(), _roulette(lipschitz=0.95)),
        context_features=2,
        excluded=_OPTIONAL,
    ),
    "krylov-linear-0.8": Case(lambda: _block(FixedLinear(norm=0.8), logdet.Krylov())),
    "krylov-mlp": Case(lambda: _block(_mlp(8, 8), logdet.Krylov())),
    "krylov-two-terms": Case(
        lambda: _block(_mlp(8, 8), logdet.Krylov(num_exact_terms=2, exact_trace=False)),
        is_variant=True,
    ),
    "krylov-probes": Case(
        lambda: _block(_mlp(8, 8), logdet.Krylov(num_probes=3)), num_draws=100, is_variant=True
    ),
    "krylov-of-a-user": Case(
        lambda: _block(ConditionalByAutograd(), logdet.Krylov(lipschitz=0.95)),
        context_features=2,
        excluded=_OPTIONAL,
        is_variant=True,
    ),
    "krylov-cnn": Case(
        lambda: _block(_cnn(5, 4, channels=2), logdet.Krylov()), shape=(2, 3, 3), is_variant=True
    ),
    "mlp-context-clipswish": Case(
        lambda: _block(_mlp(4, 4, context=2, activation=lipschitz_nn.CLipSwish())),
        context_features=2,
        is_variant=True,
    ),
    "cnn-3-1-3": Case(lambda: _block(_cnn(5, 4)), shape=(1, 3, 4)),
    "cnn-circular": Case(
        lambda: _block(_cnn(4, 4, channels=2, padding_mode="circular")),
        shape=(2, 2, 3),
        is_variant=True,
    ),
    "cnn-context-clipswish": Case(
        lambda: _block(_cnn(2, 2, context=2, activation=lipschitz_nn.CLipSwish())),
        shape=(1, 2, 3),
        context_features=2,
        is_variant=True,
    ),
    "cnn-maxmin": Case(
        lambda: _block(_cnn(4, 4, activation=lipschitz_nn.MaxMin())),
        shape=(1, 2, 3),
        is_variant=True,
    ),
    "cnn-roulette": Case(lambda: _block(_cnn(5, 4, channels=2), _roulette()), shape=(2, 3, 3)),
    "dense-net": Case(lambda: _block(_dense(6, 4))),
    "dense-net-clipswish": Case(
        lambda: _block(_dense(4, 3, context=2, activation=lipschitz_nn.CLipSwish())),
        context_features=2,
    ),
    "dense-net-maxmin": Case(
        lambda: _block(_dense(4, 4, activation=lipschitz_nn.MaxMin())), is_variant=True
    ),
    "dense-net-roulette": Case(
        lambda: _block(_dense(4, 4, context=2), _roulette()), context_features=2, is_variant=True
    ),
    "monotone-mlp": Case(lambda: _monotone(_mlp(8, 8))),
    "monotone-linear-0.8": Case(lambda: _monotone(FixedLinear(norm=0.8), logdet.Exact())),
    "monotone-context-clipswish": Case(
        lambda: _monotone(_mlp(4, 4, context=2, activation=lipschitz_nn.CLipSwish())),
        context_features=2,
        is_variant=True,
    ),
    "monotone-series": Case(
        lambda: _monotone(FixedLinear(norm=0.6), logdet.PowerSeries(num_terms=12)),
        bias=2 * logdet.PowerSeries(num_terms=12).bias_bound(0.6, 3),
        is_variant=True,
    ),
    "monotone-roulette": Case(lambda: _monotone(_mlp(8, 8), _roulette())),
    "monotone-roulette-linear-0.8": Case(
        lambda: _monotone(FixedLinear(norm=0.8), _roulette()), is_variant=True
    ),
    "monotone-module-of-a-user": Case(
        lambda: _monotone(ConditionalByAutograd()), context_features=2, excluded=_OPTIONAL
    ),
    "monotone-cnn": Case(
        lambda: _monotone(_cnn(4, 4, channels=2)), shape=(2, 2, 3), is_variant=True
    ),
    "conditional-affine": Case(
        lambda: transforms.ConditionalAffine(3, 2, net=lipschitz_nn.context_mlp(2, [4], 6)),
        context_features=2,
    ),
    "marginal-spline": Case(_spline),
    "marginal-spline-quantiles": Case(
        lambda: transforms.ElementwiseRationalQuadraticSpline(3, 4, initialization="quantiles"),
        is_variant=True,
    ),
    "marginal-spline-images": Case(lambda: _spline(2), shape=(2, 2, 3)),
    "linear": Case(_linear),
    "linear-images": Case(
        lambda: transforms.LinearTransform(2, initialization="whitening"),
        shape=(2, 2, 3),
        is_variant=True,
    ),
    "act-norm": Case(lambda: transforms.ActNorm(3)),
    "act-norm-images": Case(lambda: transforms.ActNorm(2), shape=(2, 2, 3)),
    "residual-flow": Case(
        lambda: _preset(flows.ResidualFlow(3, 8, 2, context_features=2)), context_features=2
    ),
    "invertible-resnet": Case(
        lambda: _preset(flows.InvertibleResNet(3, 8, 1, coeff=0.5)),
        bias=logdet.PowerSeries(num_terms=10).bias_bound(0.5, 3),
    ),
    "hybrid-flow": Case(
        lambda: _preset(flows.HybridFlow(3, 8, 3, 1, context_features=2)), context_features=2
    ),
    "hybrid-flow-affine": Case(
        lambda: _preset(flows.HybridFlow(3, 8, 3, 1, partner=flows.affine_coupling)),
        excluded=_AUTOCAST,
        is_variant=True,
    ),
    "hybrid-flow-autoregressive": Case(
        lambda: _preset(
            flows.HybridFlow(3, 8, 3, 1, context_features=2, partner=flows.masked_autoregressive)
        ),
        context_features=2,
        excluded=_AUTOCAST,
        is_variant=True,
    ),
    "spline-coupling": Case(lambda: _by_splines(flows.spline_coupling), context_features=2),
    "spline-autoregressive": Case(
        lambda: _by_splines(flows.spline_autoregressive), context_features=2
    ),
    "nflows-lu": Case(
        lambda: nflows_transforms.LULinear(3, identity_init=False), excluded=_AUTOCAST
    ),
    "nflows-coupling": Case(_coupling, context_features=2, excluded=_AUTOCAST),
    "nflows-maf": Case(_maf, excluded=_AUTOCAST),
}
