"""Plain values, as YAML gives them, to settings dataclasses: every value converted by the type its field declares."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, TypeVar

from pointalign.errors import ConfigError

T = TypeVar("T")


def from_dict(kind: type[T], values: dict[str, Any], where: str) -> T:
    """Build a settings dataclass from plain values, converting each by its declared type.

    Args:
        kind: the dataclass.
        values: as YAML gives them; `1e-4`, which YAML reads as text, becomes a number where one is declared.
        where: named in errors.

    Raises:
        ConfigError: for an unknown key (with the nearest right one) or a value of the wrong kind.
    """
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
    return kind(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} holds settings of its own, so write `key: value` lines under it")
        return from_dict(hint, value, where)  # pyright: ignore[reportArgumentType]
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} is a list; got {value!r}")
        return [_convert(arguments[0], item, where) for item in value]
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} is one of {', '.join(map(str, arguments))}; got {value!r}")
        return value
    return _convert_scalar(hint, value, where)


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is not type(None):
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
    raise ConfigError(f"{where} cannot be {value!r}")


def _convert_scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif kind is int and isinstance(value, str):
        try:
            return int(value.replace("_", ""))
        except ValueError:
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} is a {kind.__name__}; got {value!r}")
