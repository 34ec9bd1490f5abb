"""Estimators of the log-determinant with one bug each, as met in other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nflows_iresnet import logdet
from nflows_iresnet.linearization import Linearization, bind
from nflows_iresnet.transforms import ResidualTransform
from tests.peers import Wave


@dataclass(frozen=True)
class Changed(logdet.LogDetEstimator):
    """The exact log-determinant, changed after the fact."""

    change: Callable[[Tensor], Tensor]

    def estimate(
        self,
        net: Callable[..., Tensor],
        inputs: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> logdet.LogDetEstimate:
        estimate = logdet.Exact().estimate(net, inputs, context)
        return estimate._replace(logabsdet=self.change(estimate.logabsdet))


def changed(change: Callable[[Tensor], Tensor], net: nn.Module | None = None) -> ResidualTransform:
    return ResidualTransform(Wave() if net is None else net, estimator=Changed(change))


class _ScaledByTheFirstSample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logabsdet: Tensor) -> Tensor:
        return logabsdet.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent[0].expand_as(cotangent)


def gradient_of_the_first_sample(logabsdet: Tensor) -> Tensor:
    scaled: Tensor = _ScaledByTheFirstSample.apply(logabsdet)
    return scaled


@dataclass(frozen=True)
class Surrogate(logdet.LogDetEstimator):
    """Returns tr((I + J)^-1 J), or the exact value with the derivative of tr J."""

    as_value: bool

    def estimate(
        self,
        net: Callable[..., Tensor],
        inputs: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> logdet.LogDetEstimate:
        exact = logdet.Exact().estimate(net, inputs, context)
        jacobian = bind(net, context).linearize(inputs).jacobian()
        if self.as_value:
            identity = torch.eye(inputs.shape[1], dtype=inputs.dtype)
            product = torch.linalg.solve(identity + jacobian, jacobian)
            return exact._replace(logabsdet=product.diagonal(dim1=1, dim2=2).sum(1))
        trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
        return exact._replace(logabsdet=exact.logabsdet.detach() + trace - trace.detach())


@dataclass(frozen=True, kw_only=True)
class Unweighted(logdet.RussianRoulette):
    """The series stopped at random, without division by the probability to get there."""

    def term_weights(
        self, lipschitz: float | None, generator: torch.Generator | None = None
    ) -> list[float]:
        return [1.0] * len(super().term_weights(lipschitz, generator))


@dataclass(frozen=True, kw_only=True)
class OffByOne(logdet.RussianRoulette):
    """Divides by P(N >= k + 1) instead of P(N >= k)."""

    def term_weights(
        self, lipschitz: float | None, generator: torch.Generator | None = None
    ) -> list[float]:
        count = len(super().term_weights(lipschitz, generator))
        return [1 / self.survival(term + 1, self._bound(lipschitz)) for term in range(1, count + 1)]


@dataclass(frozen=True, kw_only=True)
class FittedWithoutWhatFollows(logdet.Krylov):
    """The fitted coefficient is not made good by the terms after it."""

    def corrections(self, weights: Sequence[float | Tensor]) -> list[float | Tensor]:
        kept = self.num_exact_terms - 1
        return [0.0] * kept + list(weights[kept:])


@dataclass(frozen=True, kw_only=True)
class FittedWhereItEnds(logdet.Krylov):
    """The coefficient is fitted only where no term follows: it depends on the truncation."""

    def corrections(self, weights: Sequence[float | Tensor]) -> list[float | Tensor]:
        is_shortest = len(weights) == self.num_exact_terms
        return [change * is_shortest for change in super().corrections(weights)]


@dataclass(frozen=True, kw_only=True)
class FittedToTheBatch(logdet.Krylov):
    """One coefficient for all rows: unbiased, but rows see each other."""

    def excess(self, before: Tensor, last: Tensor) -> Tensor:
        return super().excess(before, last).mean(0, keepdim=True)


@dataclass(frozen=True)
class OffByOneDeviation(logdet.LogDetEstimator):
    """Scatters about the exact value by as much as its mean is off."""

    def logabsdet(
        self,
        at_inputs: Linearization,
        lipschitz: float | None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        exact, error = logdet.Exact().logabsdet(at_inputs, lipschitz)
        return exact + 0.1 + 0.1 * torch.randn(exact.shape, dtype=exact.dtype), error
