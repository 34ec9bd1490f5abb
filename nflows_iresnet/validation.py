"""Checks of what users give, with errors that name the value and the remedy."""

from __future__ import annotations

import math
import operator
from typing import TypeVar

from torch import Tensor

Strategy = TypeVar("Strategy")


def validated_size(name: str, value: int) -> int:
    """Return a size as an int, numpy integers included, if it is at least 1; a bool is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        size = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def validated_bins(name: str, value: int) -> int:
    """Return a number of bins as an int: a size, or 0 for no spline."""
    is_none = not isinstance(value, bool) and value == 0
    return 0 if is_none else validated_size(name, value)


def validated_bound(bound: float, usual: float) -> float:
    """Return the bound of a spline as a float, if it is positive and finite."""
    if not 0 < bound < math.inf:
        raise ValueError(f"bound must be positive and finite, got {bound}; try {usual}")
    return float(bound)


def require_tensor(name: str, values: object) -> None:
    """Raise unless values are a tensor.

    Args:
        name: what the values are, for the message.
        values: what was given for them.
    """
    if not isinstance(values, Tensor):
        raise ValueError(
            f"the {name} must be a tensor, got {type(values).__name__}: convert by "
            "torch.as_tensor(..., dtype=torch.float32), or what precision the weights have"
        )


def validated_strategy(name: str, value: object, kind: type[Strategy], example: str) -> Strategy:
    """Return a strategy if it is one.

    Args:
        name: of the argument.
        value: what was given for it.
        kind: the class that strategies derive from.
        example: code that makes one, for the message.
    """
    if not isinstance(value, kind):
        given = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise ValueError(f"{name} must be a {kind.__name__} such as {example}, got {given}")
    return value
