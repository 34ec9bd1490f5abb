"""Constants that are made once, and outlive every CUDA graph that reads them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import TypeVar

import torch

Constant = TypeVar("Constant")


def made_once(maxsize: int) -> Callable[[Callable[..., Constant]], Callable[..., Constant]]:
    """Return a decorator of functions that make tensors, of which the last results are kept.

    A graph reads the memory of what it was captured with. So what is asked for in a capture, for a
    device among the arguments, is kept for ever; and what is made in one is for that graph alone,
    as it is not filled before the first replay.

    Args:
        maxsize: how many results are kept otherwise.
    """

    def decorate(make: Callable[..., Constant]) -> Callable[..., Constant]:
        latest: dict[tuple[Hashable, ...], Constant] = {}
        read_by_graphs: dict[int, Constant] = {}

        @wraps(make)
        def made(*arguments: Hashable) -> Constant:
            is_captured = _is_captured(arguments)
            found = latest.get(arguments)
            if found is None:
                with torch.inference_mode(False):
                    found = make(*arguments)
                if not is_captured:
                    latest[arguments] = found
                    while len(latest) > maxsize:
                        latest.pop(next(iter(latest)), None)
            if is_captured:
                read_by_graphs[id(found)] = found
            return found

        return made

    return decorate


def _is_captured(arguments: tuple[Hashable, ...]) -> bool:
    devices = {each.type for each in arguments if isinstance(each, torch.device)}
    return "cuda" in devices and torch.cuda.is_current_stream_capturing()
