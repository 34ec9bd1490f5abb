"""The moving average of a model's parameters, which generalises better than the last ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parameter import Parameter


class WeightAverage:
    r"""a_t = d_t a_{t-1} + (1 - d_t) w_t with d_t = min(decay, t / (t + 10)), a_0 = w_0.

    The decay grows from zero, so that the random start is soon forgotten.

    References:
        Polyak, Juditsky. Acceleration of stochastic approximation by averaging, 1992.

    Args:
        parameters: what is averaged.
        decay: the final d, in [0, 1).
    """

    def __init__(self, parameters: Iterator[Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self._parameters: list[torch.Tensor] = list(parameters)
        self._decay, self._count = decay, 0
        self._averages = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present parameters."""
        decay = min(self._decay, self._count / (self._count + 10))
        self._count += 1
        torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model for the duration of a block."""
        trained = [parameter.detach().clone() for parameter in self._parameters]
        self._put(self._averages)
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs."""
        return {"count": self._count, "averages": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved average."""
        self._count = state["count"]
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)
