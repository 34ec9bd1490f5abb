"""Several transforms one after the other, whose residual blocks are bound together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from nflows.transforms import CompositeTransform as _NflowsCompositeTransform
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nflows_iresnet.linearization import ResidualFunction, bind_all, first_parameter, is_traced
from nflows_iresnet.precision import (
    as_now,
    context_like_weights,
    full_precision,
    is_foreign,
    require_finite_in_training,
    training_precision,
    training_products,
)
from nflows_iresnet.tensor_float import Work
from nflows_iresnet.transforms.linear import LinearTransform, LinearWeight, weights_together
from nflows_iresnet.transforms.residual import as_used, require_row_for_each
from nflows_iresnet.validation import require_tensor

Step = Callable[..., tuple[Tensor, Tensor]]


class CompositeTransform(_NflowsCompositeTransform):
    """`nflows.transforms.CompositeTransform` that normalises the weights of all its blocks at once.

    The same map and the same state_dict. Each call binds the residual blocks in its list together
    (see `linearization.bind_all`): what is hundreds of small operations for a deep flow becomes a
    few.

    A transform takes part that has a `net`, an `estimator`, and an attribute `takes_function` that
    is true: its `forward` and `inverse` then get g as `function=`.

    References:
        Chen, Xu, Zhang, Guestrin. Training deep nets with sublinear memory cost, 2016.

    Args:
        transforms: the transforms, from data to noise.
        recompute: keep only the inputs of each residual block for the backward pass, and evaluate
            the block again there, with the same weights, estimator and random numbers: the memory
            for activations is that of one block, whatever the depth, for 34 to 59 % more time.
            Same gradients. It concerns the blocks that are bound together, not what is nested in
            other transforms or overrides methods.

    Example:
        >>> from nflows_iresnet.nn import LipschitzMLP
        >>> from nflows_iresnet.transforms import ResidualTransform
        >>> blocks = [ResidualTransform(LipschitzMLP(2, [16])) for _ in range(3)]
        >>> outputs, logabsdet = CompositeTransform(blocks)(torch.zeros(5, 2))
    """

    def __init__(self, transforms: Iterable[Transform], *, recompute: bool = False) -> None:
        super().__init__(transforms)
        self.recompute = recompute

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (outputs, the sum of the log-determinants), shapes (B, *) and (B,)."""
        blocks = self._blocks()
        _require_rows(inputs, context, blocks)
        require_finite_in_training(self, inputs, context)
        with training_precision(self, inputs.device, _work_of(blocks)):
            bound, weights = self._bind(blocks, context), self._weights()
        outputs, parts = inputs, [inputs.new_zeros(inputs.shape[0])]
        for transform in self._transforms:
            step: Step = partial(transform, context=context)
            if transform in weights:
                step = partial(transform, weight=weights[transform])
            elif transform in bound:
                step = self._step(transform, bound[transform])
            with self._precision_of(transform):
                outputs, logabsdet = step(outputs)
            parts.append(logabsdet)
        return outputs, _total(parts)

    def _step(self, block: Any, function: ResidualFunction) -> Step:
        """Return the forward pass of a block that is bound, recomputed where that is wished."""
        recomputes = self.recompute and torch.is_grad_enabled() and not is_traced()
        if recomputes:
            tensors, rebuild = function.split()
            function = rebuild(tensors)  # of the weights of now
        step = partial(block, function=function, estimator=block.estimator)
        if recomputes:
            return partial(checkpoint, as_used(as_now(step)), use_reentrant=False)
        return step

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (outputs, the sum of the log-determinants), shapes (B, *) and (B,)."""
        blocks = self._blocks()
        _require_rows(inputs, context, blocks)
        with full_precision(inputs.device, _work_of(blocks)):
            bound = self._bind(blocks, context)
        outputs, parts = inputs, [inputs.new_zeros(inputs.shape[0])]
        for transform in reversed(self._transforms):
            step: Step = partial(transform.inverse, context=context)
            if transform in bound:
                step = partial(transform.inverse, function=bound[transform])
            with self._precision_of(transform):
                outputs, logabsdet = step(outputs)
            parts.append(logabsdet)
        return outputs, _total(parts)

    def _precision_of(self, transform: Transform) -> AbstractContextManager[object]:
        """Return full precision for what is not of this package, and would not see to it."""
        if _has_foreign_parameters(transform):
            return training_products(self, "anything")
        return nullcontext()

    def _blocks(self) -> list[Any]:
        """Return the blocks that are bound together: they state that they take a function."""
        return [each for each in self._transforms if getattr(each, "takes_function", False)]

    def _bind(
        self, blocks: list[Any], context: Tensor | None
    ) -> dict[torch.nn.Module, ResidualFunction]:
        nets = [block.net for block in blocks]
        functions = bind_all(nets, context_like_weights(context, self))
        return dict(zip(blocks, functions, strict=True))

    def _weights(self) -> dict[torch.nn.Module, LinearWeight]:
        """Compute the matrices of all linear maps, those of one size together."""
        alike: dict[object, list[LinearTransform]] = {}
        for each in self._transforms:
            if isinstance(each, LinearTransform) and each.takes_weight:
                factors = each.factors
                alike.setdefault((factors.shape, factors.dtype, factors.device), []).append(each)
        found = [zip(group, weights_together(group), strict=True) for group in alike.values()]
        return dict(chain.from_iterable(found))

    def extra_repr(self) -> str:
        """Show whether activations are kept."""
        return "recompute=True" if self.recompute else ""


def _require_rows(inputs: Tensor, context: Tensor | None, blocks: list[Any]) -> None:
    require_tensor("inputs", inputs)
    if context is not None:
        require_tensor("context", context)
    if inputs.dim() == 0:
        raise ValueError(
            f"expected inputs of shape (batch, ...), got the number {inputs}: give a tensor with "
            "one row for each sample"
        )
    if blocks:
        require_row_for_each(inputs, context)


def _work_of(blocks: list[Any]) -> Work:
    return "anything" if any(is_foreign(block.net) for block in blocks) else "matrices"


def _total(logabsdets: list[Tensor]) -> Tensor:
    """Return the sum of log-determinants (B,): of two operations where all are of one kind."""
    first = logabsdets[0]
    if all(each.shape == first.shape and each.dtype == first.dtype for each in logabsdets):
        return torch.stack(logabsdets).sum(0)
    return sum(logabsdets[1:], first)


def _has_foreign_parameters(module: nn.Module) -> bool:
    """Whether a transform, or one that it is made of, has weights and is not of this package."""
    if not is_foreign(module):
        return False
    if isinstance(module, (Transform, nn.ModuleList)) and not module._parameters:
        return any(map(_has_foreign_parameters, module.children()))
    return first_parameter(module) is not None
