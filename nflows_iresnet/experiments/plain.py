"""Plain JSON data: what may stand in it, and how records are rebuilt from it."""

from __future__ import annotations

import json
import math
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints


def parse(text: str, version: int | str) -> dict[str, Any]:
    """Return the content of a file of results without its format.

    Raises:
        ValueError: not results of this format.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(data, dict) or data.pop("format", None) != version:
        raise ValueError(f"it holds no results of this command (format {version})")
    return data


def finite(value: object) -> object:
    """Return plain data with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def rebuild(kind: Any, data: Any, name: str = "the content") -> Any:
    """Rebuild a value of an annotated type from plain JSON data.

    Args:
        kind: a dataclass, or the type of one of its fields: Any, int, float, bool, str, a dict, a
            tuple of any length, or one of these that may be None.
        data: what JSON made of it; null stands for a float that was not finite.
        name: what it is called in messages.

    Returns:
        The value.

    Raises:
        ValueError: the data are of another type; the message names the field.

    Example:
        >>> rebuild(tuple[int, ...], [1, 2])
        (1, 2)
        >>> rebuild(dict[str, float], {"a": "b"}, "loss")
        Traceback (most recent call last):
        ValueError: loss.a is no float
    """
    if kind is Any:
        return data
    if is_dataclass(kind):
        return _rebuild_dataclass(kind, data, name)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        known = next(each for each in arguments if each is not NoneType)
        return None if data is None else rebuild(known, data, name)
    if origin is tuple:
        items = enumerate(_checked(list, data, name))
        return tuple(rebuild(arguments[0], item, f"{name}[{index}]") for index, item in items)
    if origin is dict:
        pairs = _checked(dict, data, name).items()
        return {key: rebuild(arguments[1], item, f"{name}.{key}") for key, item in pairs}
    if kind is float:
        return math.nan if data is None else _checked(float, data, name)
    return _checked(kind, data, name)


def _rebuild_dataclass(kind: Any, data: Any, name: str) -> Any:
    types, prefix = get_type_hints(kind), f"{name}." if name != "the content" else ""
    fields = _checked(dict, data, name)
    for key in fields:
        if key not in types:
            raise ValueError(f"{prefix}{key} is unknown")
    values = {key: rebuild(types[key], item, f"{prefix}{key}") for key, item in fields.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{name} is not complete ({error})") from error


def _checked(kind: type, data: Any, name: str) -> Any:
    accepted = (int, float) if kind is float else kind
    if not isinstance(data, accepted) or (isinstance(data, bool) and kind is not bool):
        raise ValueError(f"{name} is no {kind.__name__}")
    return data
