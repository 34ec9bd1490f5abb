"""The default: exact where that is cheap, unbiased elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_iresnet.linearization import Linearization, ResidualFunction
from nflows_iresnet.logdet.base import Exact, LogDetEstimate, LogDetEstimator
from nflows_iresnet.logdet.russian_roulette import RussianRoulette
from nflows_iresnet.validation import validated_strategy


@dataclass(frozen=True)
class Auto(LogDetEstimator):
    """`exact` up to `max_exact_features` dimensions, `otherwise` beyond.

    The choice depends on the number of dimensions and on whether the network guarantees a bound,
    never on training or evaluation mode. With 128 rows a training step with `Exact` takes 0.96 to
    1.3 times as long as with `RussianRoulette` up to 6 dimensions, and 1.8 times in 16. Measured:
    docs/measurements.md#exact-or-estimated.

    Args:
        max_exact_features: the largest dimension for which the full Jacobian is used.
        exact: the estimator up to that dimension.
        otherwise: the estimator beyond.
        max_exact_features_without_bound: the same for networks that guarantee no Lipschitz bound,
            from which the roulette cannot take its law.

    Example:
        >>> Auto().choose(features=64)
        RussianRoulette(...)
    """

    max_exact_features: int = 6
    exact: LogDetEstimator = Exact()
    otherwise: LogDetEstimator = RussianRoulette()
    max_exact_features_without_bound: int = 16

    def __post_init__(self) -> None:
        for name in ("max_exact_features", "max_exact_features_without_bound"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        for name in ("exact", "otherwise"):
            validated_strategy(name, getattr(self, name), LogDetEstimator, "logdet.Exact()")

    def choose(self, features: int, *, has_bound: bool = True) -> LogDetEstimator:
        """Return the estimator for `features` dimensions and a network with or without a bound."""
        limit = self.max_exact_features if has_bound else self.max_exact_features_without_bound
        return self.exact if features <= limit else self.otherwise

    def _estimate(
        self, function: ResidualFunction, inputs: Tensor, generator: torch.Generator | None
    ) -> LogDetEstimate:
        """Delegate to the estimator chosen for the inputs and the network."""
        features = inputs.shape[1:].numel()
        chosen = self.choose(features, has_bound=function.lipschitz is not None)
        return chosen.estimate(function, inputs, generator=generator)

    def logabsdet(
        self,
        at_inputs: Linearization,
        lipschitz: float | None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Delegate to the estimator chosen for the number of dimensions and the bound."""
        features = at_inputs.shape[1:].numel()
        chosen = self.choose(features, has_bound=lipschitz is not None)
        return chosen.logabsdet(at_inputs, lipschitz, generator)
