"""What all unit-wise activations are: values, slopes, and what may be asked of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from functools import cache
from typing import cast

from torch import Tensor, nn

from nflows_iresnet.linearization import defined_together


class Activation(nn.Module, ABC):
    """A unit-wise activation: values and slopes. Units lie along the last dimension.

    Networks of images hand over their channels as the last dimension.

    Attributes:
        lipschitz: certified Lipschitz constant of the map with respect to the 2-norm.
        widening: the number of output units per input unit. Output unit `j + i * n` of n inputs
            depends on input unit `j` alone.
        has_curvature: whether `curvature` is implemented; only for activations without parameters
            and without widening. It makes training faster and changes nothing else.
    """

    lipschitz: float = 1.0
    widening: int = 1
    has_curvature: bool = False

    @abstractmethod
    def value_and_slope(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a(x), a'(x)), both of shape (*, widening * units)."""

    def curvature(self, value: Tensor, slope: Tensor) -> Tensor:
        """Return a''(x) where a(x) = value and a'(x) = slope.

        Raises:
            NotImplementedError: unless `has_curvature`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no curvature")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return a(x), shape (*, widening * units)."""
        return self.value_and_slope(inputs)[0]

    def overwrite(self, inputs: Tensor) -> Tensor:
        """Return a(x), written over the inputs where that is faster; without a graph."""
        return self.forward(inputs)


def overwrite(activation: nn.Module, inputs: Tensor) -> Tensor:
    """Return activation(inputs), where no graph is recorded and nobody needs the inputs again.

    A subclass that replaces `forward` has to replace `overwrite` too, or is called as it is; so is
    one with hooks.
    """
    if knows_overwrite(activation):
        return cast("Activation", activation).overwrite(inputs)
    outputs: Tensor = activation(inputs)
    return outputs


def knows_overwrite(activation: nn.Module) -> bool:
    """Whether an activation's `overwrite` is all that a call of it would do."""
    is_called_as_it_is = (
        not activation._forward_hooks
        and not activation._forward_pre_hooks
        and "forward" not in vars(activation)
    )
    return is_called_as_it_is and _defines_overwrite(cast("Hashable", type(activation)))


@cache
def _defines_overwrite(kind: type) -> bool:
    names = ("value_and_slope", "forward", "overwrite")
    return issubclass(kind, Activation) and defined_together(kind, *names)


def knows_curvature(activation: nn.Module) -> bool:
    """Whether an activation's `curvature` is that of its own values and slopes.

    A subclass that replaces `value_and_slope` has to replace `curvature` too, and parameters would
    need derivatives of their own.
    """
    if not isinstance(activation, Activation) or not activation.has_curvature:
        return False
    is_its_own = defined_together(type(activation), "value_and_slope", "curvature")
    return is_its_own and next(activation.parameters(), None) is None
