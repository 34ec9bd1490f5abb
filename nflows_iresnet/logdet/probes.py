"""Random vectors v with E[v v^T] = I, from which a trace is estimated as E[v^T A v] = tr A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Probe(Protocol):
    """A law of random vectors with zero mean and identity covariance."""

    def sample_like(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return one vector per row, of the shape, dtype and device of `inputs`."""


@dataclass(frozen=True)
class Rademacher:
    """Independent signs. The least variance of all probes with independent entries.

    Var[v^T A v] = 2 sum_{i != j} S_ij^2 with S the symmetric part of A: the diagonal adds none.

    References:
        Hutchinson. A stochastic estimator of the trace of the influence matrix, 1989.
    """

    def sample_like(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return signs +1 and -1 with probability one half each."""
        bits = torch.randint(
            2, inputs.shape, generator=generator, dtype=inputs.dtype, device=inputs.device
        )
        return 2 * bits - 1


@dataclass(frozen=True)
class Gaussian:
    """Standard normal entries, as used by Behrmann et al. 2019 and Chen et al. 2019.

    Var[v^T A v] = 2 sum_ij S_ij^2: never less than with `Rademacher`.
    """

    def sample_like(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return independent standard normal entries."""
        return torch.empty_like(inputs, requires_grad=False).normal_(generator=generator)
