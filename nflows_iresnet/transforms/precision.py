"""Full precision inside autocast regions: log-determinants and inverses need it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

Values = TypeVar("Values", Tensor, "Tensor | None")


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def like_weights(values: Values, module: nn.Module) -> Values:
    """Bring half-precision results of an autocast region to the precision of the weights."""
    if values is None or values.dtype not in (torch.bfloat16, torch.float16):
        return values
    parameter = next(module.parameters(), None)
    return values if parameter is None else values.to(parameter.dtype)
