"""Several transforms one after the other, whose residual blocks are bound together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from nflows.transforms import CompositeTransform as _NflowsCompositeTransform
from torch import Tensor

from nflows_iresnet.linearization import ResidualFunction, bind_all
from nflows_iresnet.transforms.precision import full_precision, like_weights
from nflows_iresnet.transforms.residual import ResidualTransform

Step = Callable[..., tuple[Tensor, Tensor]]


class CompositeTransform(_NflowsCompositeTransform):
    """`nflows.transforms.CompositeTransform` that normalises the weights of all its blocks at once.

    The same map and the same state_dict. Each call binds the residual blocks in its list together
    (see `linearization.bind_all`): what is hundreds of small operations for a deep flow becomes a
    few.

    Args:
        transforms: the transforms, from data to noise.

    Example:
        >>> from nflows_iresnet.nn import LipschitzMLP
        >>> blocks = [ResidualTransform(LipschitzMLP(2, [16])) for _ in range(3)]
        >>> outputs, logabsdet = CompositeTransform(blocks)(torch.zeros(5, 2))
    """

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (outputs, the sum of the log-determinants), shapes (B, *) and (B,)."""
        bound = self._bind(inputs, context)
        steps = [_with(transform, bound) for transform in self._transforms]
        return _cascade(steps, inputs, context)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (outputs, the sum of the log-determinants), shapes (B, *) and (B,)."""
        bound = self._bind(inputs, context)
        steps = [_with(each, bound, each.inverse) for each in reversed(self._transforms)]
        return _cascade(steps, inputs, context)

    def _bind(
        self, inputs: Tensor, context: Tensor | None
    ) -> dict[torch.nn.Module, ResidualFunction]:
        blocks = [each for each in self._transforms if isinstance(each, ResidualTransform)]
        with full_precision(inputs.device):
            functions = bind_all([block.net for block in blocks], like_weights(context, self))
        return dict(zip(blocks, functions, strict=True))


def _with(
    transform: torch.nn.Module,
    bound: dict[torch.nn.Module, ResidualFunction],
    step: Step | None = None,
) -> Step:
    step = transform if step is None else step
    return partial(step, bound=bound[transform]) if transform in bound else step


def _cascade(
    steps: Sequence[Step], inputs: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    outputs, total = inputs, inputs.new_zeros(len(inputs))
    for step in steps:
        outputs, logabsdet = step(outputs, context)
        total = total + logabsdet
    return outputs, total
