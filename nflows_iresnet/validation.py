"""Checks of what users give, with errors that name the value and the remedy."""

from __future__ import annotations

import math
import operator
from typing import TypeVar

from torch import Tensor

from nflows_iresnet.linearization import is_traced

Strategy = TypeVar("Strategy")


def validated_size(name: str, value: int) -> int:
    """Return a size as an int, numpy integers included, if it is at least 1."""
    try:
        size = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


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


def require_finite_rows(name: str, values: Tensor) -> None:
    """Raise if a row is not finite; only where asking costs nothing, that is on the CPU.

    A single bad row in training makes the loss, then every weight, not a number: one step later
    nobody could tell the data's fault from the learning rate's.

    Args:
        name: what the values are.
        values: shape (B, *).

    Raises:
        ValueError: that names the first bad row.
    """
    if values.device.type != "cpu" or is_traced() or math.isfinite(float(values.detach().sum())):
        return
    is_bad = ~values.isfinite().flatten(start_dim=1).all(dim=1)
    if bool(is_bad.any()):
        rows = is_bad.nonzero()[:, 0].tolist()
        raise ValueError(
            f"{len(rows)} of {values.shape[0]} rows of the {name} are not finite, "
            f"first row {rows[0]}: {values[rows[0]].flatten()[:8].tolist()}; drop or impute such "
            "rows before training"
        )
