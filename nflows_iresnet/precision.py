"""What comes in: finite, in the precision of the weights, and kept there inside autocast."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from nflows_iresnet.linearization import first_parameter, is_traced


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def like_weights(values: Tensor, module: nn.Module, name: str = "inputs") -> Tensor:
    """Return values in the precision of a module's weights.

    Half precision, as an autocast region hands over, is converted. What else differs is an error:
    a silent conversion would change digits that the caller asked for.

    Args:
        values: any shape.
        module: its first parameter tells the precision; without parameters anything goes.
        name: what the values are, for the message.

    Raises:
        ValueError: if the values are integers, or of another precision than the weights.
    """
    parameter = first_parameter(module)
    if parameter is None or parameter.dtype == values.dtype:
        return values
    require_precision(values, parameter.dtype, name)
    return values.to(parameter.dtype)


def require_precision(values: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise unless values have the precision of the weights, or half of it as autocast gives.

    Args:
        values: any shape.
        dtype: of the weights.
        name: what the values are, for the message.

    Raises:
        ValueError: naming both precisions and what to do.
    """
    if values.dtype in (dtype, torch.bfloat16, torch.float16):
        return
    wanted, given = str(dtype), str(values.dtype)
    raise ValueError(
        f"the {name} {'are' if name.endswith('s') else 'is'} {given.removeprefix('torch.')}, the "
        f"weights {wanted.removeprefix('torch.')}: convert the {name} by .to({wanted})"
        + (", or the model by .double()" if values.dtype == torch.float64 else "")
    )


def context_like_weights(context: Tensor | None, module: nn.Module) -> Tensor | None:
    """Return a context, if there is one, in the precision of a module's weights."""
    return None if context is None else like_weights(context, module, "context")


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


def require_finite_in_training(
    module: nn.Module, inputs: Tensor, context: Tensor | None = None
) -> None:
    """Require finite rows of what a module is trained on; in evaluation a bad row stays alone."""
    if module.training and torch.is_grad_enabled():
        require_finite_rows("inputs", inputs)
        if context is not None:
            require_finite_rows("context", context)
