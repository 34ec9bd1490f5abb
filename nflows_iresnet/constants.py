"""Constants that are made once, and outlive every CUDA graph that reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

Constant = TypeVar("Constant")


def made_once(maxsize: int) -> Callable[[Callable[..., Constant]], Callable[..., Constant]]:
    """Return a decorator of functions that make tensors, of which the last results are kept.

    A graph reads the memory of what it was captured with. So what is asked for in a capture, for a
    device among the arguments, is kept for ever.

    Args:
        maxsize: how many results are kept otherwise.
    """

    def decorate(make: Callable[..., Constant]) -> Callable[..., Constant]:
        latest = lru_cache(maxsize)(torch.inference_mode(False)(make))
        read_by_graphs: dict[int, Constant] = {}

        @wraps(make)
        def made(*arguments: Any) -> Constant:
            found = latest(*arguments)
            devices = {each.type for each in arguments if isinstance(each, torch.device)}
            if "cuda" in devices and torch.cuda.is_current_stream_capturing():
                read_by_graphs[id(found)] = found
            return found

        return made

    return decorate
