"""The base distribution of the presets, and the flow that they are."""

from __future__ import annotations

import operator

import torch
from nflows.distributions import StandardNormal as _NflowsStandardNormal
from nflows.flows import Flow as _NflowsFlow
from torch import Tensor

from nflows_iresnet.transforms.residual import inverse_values_only


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

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        leading = [num_samples] if context is None else [len(context), num_samples]
        return torch.randn(*leading, *self._shape, dtype=self._like.dtype, device=self._like.device)


class Flow(_NflowsFlow):
    """A flow of nflows whose `sample` takes any integers and any batch size.

    nflows refuses numpy integers, fails to join batches of unequal size where there is a context,
    and computes log-determinants that it drops.
    """

    def sample(
        self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Return samples, shape (num_samples, *), with a context (B, num_samples, *).

        Args:
            num_samples: samples to draw, for each row of the context.
            context: shape (B, C), or None.
            batch_size: how many to draw at a time; all by default.
        """
        remaining = operator.index(num_samples)
        size = remaining if batch_size is None else operator.index(batch_size)
        if remaining < 1 or size < 1:
            raise ValueError(
                f"num_samples and batch_size must be at least 1, got {num_samples} and {batch_size}"
            )
        batches = []
        while remaining:
            with inverse_values_only():
                batches.append(super().sample(min(size, remaining), context))
            remaining -= min(size, remaining)
        return torch.cat(batches, dim=0 if context is None else 1)
