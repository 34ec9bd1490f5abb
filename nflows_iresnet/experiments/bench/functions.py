"""One residual branch for every library: plain modules, frozen weights, counted evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.linearization import Linearization, ResidualFunction, bind
from nflows_iresnet.logdet import LogDetEstimate, LogDetEstimator
from nflows_iresnet.nn import LipschitzMLP


class FrozenNet(nn.Module):
    """The function of a `LipschitzMLP` now, with the weights in use as ordinary parameters.

    As a module it is a plain network for any library. This one, which asks for `bind`, sees its
    structure.

    Args:
        net: whose function it is.
    """

    def __init__(self, net: LipschitzMLP) -> None:
        super().__init__()
        with torch.no_grad():
            self._function = net.bind()
        self.weights = _frozen(self._function.weights)
        self.shifts = _frozen(self._function.shifts)
        self.activations = nn.ModuleList(net.activations)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return g(inputs), (B, d) -> (B, d)."""
        hidden = F.linear(inputs, self.weights[0], self.shifts[0])
        for index, activation in enumerate(self.activations, start=1):
            hidden = F.linear(activation(hidden), self.weights[index], self.shifts[index])
        return hidden

    def bind(self, context: Tensor | None = None) -> ResidualFunction:
        """Return the same as a function with structure."""
        return replace(self._function, weights=list(self.weights), shifts=list(self.shifts))


def _frozen(tensors: Sequence[Tensor]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(tensor.detach().clone()) for tensor in tensors])


class SlowestMap(nn.Module):
    """x -> -S x, S diagonal from 0 to the bound: linear, and as slow as the bound allows.

    Args:
        features: d.
        lipschitz: the largest element of S.
    """

    def __init__(self, features: int, lipschitz: float) -> None:
        super().__init__()
        self.lipschitz = lipschitz
        self.register_buffer("diagonal", torch.linspace(0.0, lipschitz, features))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return -S x, (B, d) -> (B, d)."""
        return -inputs * self.get_buffer("diagonal")


class Counted(nn.Module):
    """A network that counts the rows for which it was evaluated.

    Args:
        net: the network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.rows = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Return net(inputs)."""
        self.rows += inputs.shape[0]
        outputs: Tensor = self.net(inputs)
        return outputs

    def bind(self, context: Tensor | None = None) -> ResidualFunction:
        """Return the network as a function that counts here."""
        return _CountedFunction(bind(self.net, context), self)


class _CountedFunction(ResidualFunction):
    def __init__(self, function: ResidualFunction, counter: Counted) -> None:
        self._function, self._counter = function, counter
        self.lipschitz = function.lipschitz

    def __call__(self, inputs: Tensor) -> Tensor:
        self._counter.rows += inputs.shape[0]
        return self._function(inputs)

    def linearize(self, inputs: Tensor) -> Linearization:
        self._counter.rows += inputs.shape[0]
        return self._function.linearize(inputs)

    def select(self, rows: Tensor | slice) -> ResidualFunction:
        return _CountedFunction(self._function.select(rows), self._counter)


@dataclass(frozen=True)
class NoLogDet(LogDetEstimator):
    """Zero, without an evaluation: for the inverse alone, which is what other libraries time.

    `ResidualTransform.inverse` takes nothing but the log-determinant from its estimator.
    """

    def estimate(
        self,
        net: Callable[..., Tensor],
        inputs: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> LogDetEstimate:
        """Return the inputs and zeros."""
        zeros = inputs.new_zeros(inputs.shape[0])
        return LogDetEstimate(inputs, zeros, zeros)
