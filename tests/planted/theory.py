"""Solvers, series and flows that break one equation of the method each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_iresnet import flows, logdet, solvers


class _Damped(solvers.Accelerator):
    def propose(self, point: Tensor, image: Tensor, best: solvers.Progress) -> Tensor:
        return (point + image) / 2


@dataclass(frozen=True)
class Damped(solvers.Solver):
    """Goes half of the way in each step: it converges, but not at the rate of Banach."""

    def start(self, init: Tensor) -> solvers.Accelerator:
        return _Damped()


@dataclass(frozen=True, kw_only=True)
class WithoutOneOverK(logdet.PowerSeries):
    """Forgets to divide the k-th term by k."""

    def term_weights(
        self, lipschitz: float | None, generator: torch.Generator | None = None
    ) -> list[float]:
        return [float(term) for term in range(1, self.num_terms + 1)]


@dataclass(frozen=True, kw_only=True)
class WithoutSigns(logdet.PowerSeries):
    """Forgets that the terms alternate: the series of -ln det(I - J)."""

    def term_weights(
        self, lipschitz: float | None, generator: torch.Generator | None = None
    ) -> list[float]:
        return [float((-1) ** index) for index in range(self.num_terms)]


@dataclass(frozen=True, kw_only=True)
class OneTermShort(logdet.PowerSeries):
    """Stops one term early."""

    def term_weights(
        self, lipschitz: float | None, generator: torch.Generator | None = None
    ) -> list[float]:
        return [1.0] * (self.num_terms - 1)


@dataclass(frozen=True, kw_only=True)
class BoundOfOneMoreTerm(logdet.PowerSeries):
    """States the bound of the bias with one more term than it keeps."""

    def bias_bound(self, lipschitz: float, features: int) -> float:
        more = logdet.PowerSeries(num_terms=self.num_terms + 1)
        return more.bias_bound(lipschitz, features)


class WrongSign(flows.ResidualFlow):
    """Subtracts the log-determinant."""

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        noise, logabsdet = self._transform(inputs, context)
        return self._distribution.log_prob(noise) - logabsdet
