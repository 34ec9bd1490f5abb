"""FFJORD: the continuous normalizing flow of zuko behind the face of every other model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nflows_iresnet.experiments.adapters import DensityModel

if TYPE_CHECKING:
    from nflows.transforms import Transform

TRAINING_TOLERANCE = 1e-4
"""Absolute tolerance of the integration in training, a tenth of the relative one; zuko's defaults,
1e-6 and 1e-5, hold everywhere else."""
_JACOBIAN_ELEMENTS = 2**22


class ContinuousModel(DensityModel):
    r"""x -> z(1), dz/dt = f(t, z), with the density that follows from the trace of df/dz.

    Training estimates the trace by Hutchinson's method with a looser tolerance of the integration;
    `exact_log_prob` integrates the exact trace.

    References:
        Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud. FFJORD, 2019.

    Args:
        flow: a `zuko.flows.CNF`.
        first: the transform of nflows between the data and the flow, or None.
    """

    estimates = True

    def __init__(self, flow: nn.Module, first: Transform | None = None) -> None:
        super().__init__()
        self.flow, self.first = flow, first

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the log-density with Hutchinson's estimate of the trace."""
        with self._integrating(exact=False):
            return self._log_prob(inputs)

    @torch.no_grad()
    def exact_log_prob(self, inputs: Tensor) -> Tensor:
        """Return the log-density with the exact trace, as many rows at a time as fit."""
        rows = max(1, _JACOBIAN_ELEMENTS // inputs.shape[1:].numel() ** 2)
        with self._integrating(exact=True):
            return torch.cat([self._log_prob(chunk) for chunk in inputs.split(rows)])

    @contextmanager
    def _integrating(self, *, exact: bool) -> Iterator[None]:
        """Integrate one or the other trace, loosely in training."""
        ode = self.flow.transform
        before = ode.exact, ode.atol, ode.rtol
        ode.exact = exact
        if self.training:
            ode.atol, ode.rtol = TRAINING_TOLERANCE, 10 * TRAINING_TOLERANCE
        try:
            yield
        finally:
            ode.exact, ode.atol, ode.rtol = before

    def _log_prob(self, inputs: Tensor) -> Tensor:
        if self.first is None:
            return self.flow().log_prob(inputs)
        values, logabsdet = self.first(inputs)
        return self.flow().log_prob(values) + logabsdet

    def encode(self, inputs: Tensor) -> Tensor:
        """Data to noise."""
        values = inputs if self.first is None else self.first(inputs)[0]
        return self.flow().transform(values)

    def decode(self, noise: Tensor) -> Tensor:
        """Noise to data: the same equation backwards in time."""
        values = self.flow().transform.inv(noise)
        return values if self.first is None else self.first.inverse(values)[0]

    def sample(self, num_samples: int) -> Tensor:
        """Draw samples."""
        return self.decode(self.flow().base.sample((num_samples,)))


def ffjord(
    features: int, hidden_features: int, num_layers: int, first: Transform | None = None
) -> DensityModel:
    """Build FFJORD with a network of `num_layers` hidden layers.

    Raises:
        ImportError: zuko is not installed; the message says how to install it.
    """
    if find_spec("zuko") is None:
        raise ImportError("zuko is not installed: pip install 'nflows-iresnet[ffjord]'")
    import zuko

    widths = (hidden_features,) * num_layers
    return ContinuousModel(zuko.flows.CNF(features, hidden_features=widths), first)
