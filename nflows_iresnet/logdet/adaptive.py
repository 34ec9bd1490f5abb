"""The default: exact where that is cheap, unbiased elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_iresnet.logdet.base import Exact, LogDetEstimate, LogDetEstimator
from nflows_iresnet.logdet.roulette import RussianRoulette


@dataclass(frozen=True)
class Adaptive(LogDetEstimator):
    """`exact` up to `max_exact_features` dimensions, `otherwise` beyond.

    The choice depends on the number of dimensions alone, never on training or evaluation mode.

    Args:
        max_exact_features: the largest dimension for which the full Jacobian is used.
        exact: the estimator up to that dimension.
        otherwise: the estimator beyond.

    Example:
        >>> Adaptive(max_exact_features=16).choose(features=64)
        RussianRoulette(...)
    """

    max_exact_features: int = 16
    exact: LogDetEstimator = Exact()
    otherwise: LogDetEstimator = RussianRoulette()

    def choose(self, features: int) -> LogDetEstimator:
        """Return the estimator that is used for `features` dimensions."""
        return self.exact if features <= self.max_exact_features else self.otherwise

    def estimate(
        self,
        net: Callable[..., Tensor],
        inputs: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> LogDetEstimate:
        """Delegate to the estimator chosen for the dimension of `inputs`."""
        chosen = self.choose(inputs.shape[1:].numel())
        return chosen.estimate(net, inputs, context, generator=generator)
