"""The base distribution of the presets."""

from __future__ import annotations

import torch
from nflows.distributions import StandardNormal as _NflowsStandardNormal
from torch import Tensor


class StandardNormal(_NflowsStandardNormal):
    """The standard normal of nflows, sampled in the precision of the flow.

    nflows draws float32 samples whatever the precision of the model, so that a flow in float64
    cannot sample. A buffer without elements that follows `.double()` and `.to(device)` tells the
    precision here.

    Args:
        shape: the shape of one sample.
    """

    def __init__(self, shape: tuple[int, ...] | list[int]) -> None:
        super().__init__(shape)
        self.register_buffer("_like", torch.zeros(0), persistent=False)

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        return super()._log_prob(inputs, context).to(inputs.dtype)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        leading = [num_samples] if context is None else [len(context), num_samples]
        return torch.randn(*leading, *self._shape, dtype=self._like.dtype, device=self._like.device)
