"""The base distribution of the presets, and the flow that they are."""

from __future__ import annotations

import operator
from contextlib import nullcontext

import torch
from nflows.distributions import StandardNormal as _NflowsStandardNormal
from nflows.flows import Flow as _NflowsFlow
from nflows.transforms import Transform
from torch import Tensor, nn

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
            batches.append(super().sample(min(size, remaining), context))
            remaining -= min(size, remaining)
        return torch.cat(batches, dim=0 if context is None else 1)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        """Return samples without log-determinants, where no transform could ask for those."""
        embedded = self._embedding_net(context)
        noise = self._distribution.sample(num_samples, context=embedded)
        if embedded is not None:
            noise = noise.flatten(start_dim=0, end_dim=1)
            embedded = embedded.repeat_interleave(num_samples, dim=0)
        is_known = all(map(_ignores_logabsdet, self._transform.modules()))
        with inverse_values_only() if is_known else nullcontext():
            samples: Tensor = self._transform.inverse(noise, context=embedded)[0]
        return samples if embedded is None else samples.unflatten(0, (-1, num_samples))


_KNOWN_PACKAGES = ("nflows", "nflows_iresnet")


def _ignores_logabsdet(module: nn.Module) -> bool:
    """Whether a transform adds up the log-determinants of its parts and looks at none."""
    package = type(module).__module__.partition(".")[0]
    return not isinstance(module, Transform) or package in _KNOWN_PACKAGES
