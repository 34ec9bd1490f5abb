"""Networks whose numbers are known, and blocks of other libraries in the convention of nflows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import normflows
import numpy as np
import torch
from torch import Tensor, nn

from nflows_iresnet.transforms import ResidualTransform
from tests import device

FEATURES = 6


def seed(value: int) -> None:
    """Seed torch, and numpy for the peers that draw from its global generator."""
    torch.manual_seed(value)
    np.random.seed(value)


class Linear(nn.Module):
    """g(x) = A x: log-determinant, gradient and inverse are known in closed form."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.mT


def symmetric(*eigenvalues: float) -> Linear:
    """A linear g with these eigenvalues, in a basis that is not the one of the coordinates."""
    gaussian = torch.randn(len(eigenvalues), len(eigenvalues), generator=_generator(0))
    basis = torch.linalg.qr(gaussian).Q
    return Linear(basis @ torch.diag(torch.tensor(eigenvalues)) @ basis.mT)


def scaled_identity(factor: float, features: int = FEATURES) -> Linear:
    """g(x) = factor * x."""
    return Linear(factor * torch.eye(features))


def exact_logabsdet(net: Linear) -> float:
    """log|det(I + A)|."""
    identity = torch.eye(len(net.weight))
    return float(torch.linalg.slogdet((identity + net.weight).detach().double()).logabsdet)


class Wave(nn.Module):
    """g(x) = a sin(x) for each coordinate: the log-determinant depends on x, by a known formula."""

    def __init__(self, amplitude: float = 0.9) -> None:
        super().__init__()
        self.amplitude = nn.Parameter(torch.tensor(amplitude))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.amplitude * inputs.sin()

    def logabsdet(self, inputs: Tensor) -> Tensor:
        return (1 + self.amplitude * inputs.cos()).log().sum(dim=-1)


class Normflows(nn.Module):
    """A residual block of normflows as (inputs, context) -> (outputs, logabsdet), data to noise."""

    def __init__(self, net: nn.Module, **options: Any) -> None:
        super().__init__()
        self.net = net
        self.block = normflows.flows.Residual(net, **options)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, logabsdet = self.block.inverse(inputs, **_given(context))
        return outputs, logabsdet

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, logabsdet = self.block.forward(inputs, **_given(context))
        return outputs, logabsdet


Block = Normflows | ResidualTransform


def normflows_mlp(*widths: int) -> nn.Module:
    """The Lipschitz network of normflows, with a last layer that is not close to zero."""
    net: nn.Module = normflows.nets.LipschitzMLP(list(widths), init_zeros=False)
    return net


def rows(num_rows: int, features: int = FEATURES) -> Tensor:
    """Standard normal rows, the same in each call."""
    drawn = torch.randn(num_rows, features, generator=_generator(1), device="cpu")
    return drawn.to(device.current())


def draws(sample: Callable[[], Tensor], num_draws: int) -> Tensor:
    """Independent draws: the truncation of a roulette is shared by the rows of one call."""
    seed(0)
    with torch.no_grad():
        return torch.stack([sample().double().mean() for _ in range(num_draws)])


def standard_errors_off(values: Tensor, exact: float) -> float:
    """|mean - exact| in units of the standard error of the mean."""
    return float((values.mean() - exact).abs() / (values.std() / len(values) ** 0.5))


def _given(context: Tensor | None) -> dict[str, Tensor]:
    return {} if context is None else {"context": context}


def _generator(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)
