"""Restore: JSON back into the words, every value checked against the annotation of its field."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


def restore(kind: Any, value: Any) -> Any:
    """`value`, as `json.loads` gives it, as `kind`: a dataclass, `Mapping`, `tuple`, `Literal` or a plain type. Lists become tuples.

    A field that is absent takes its default; one that `kind` does not have is passed over. Raises `TypeError` for anything else.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _dataclass(kind, _checked(value, Mapping))
    if kind is Any:
        return tuple(restore(Any, item) for item in value) if isinstance(value, list | tuple) else value
    if origin is Literal and value in inside:
        return value
    if origin is Mapping:
        return {_checked(name, str): restore(inside[1], item) for name, item in _checked(value, Mapping).items()}
    if origin is tuple:
        return tuple(restore(inside[0], item) for item in _checked(value, list | tuple))
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return value
    if kind in (bool, int, str) and type(value) is kind:
        return value
    raise TypeError(f"`{value}` is no {kind}")


def _dataclass(kind: Any, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind)
    required = {item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING}
    if missing := required - values.keys():
        raise TypeError(f"without {', '.join(sorted(missing))}")
    return kind(**{item.name: restore(hints[item.name], values[item.name]) for item in fields(kind) if item.name in values})


def _checked(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"`{value}` is no {kind}")
    return value
