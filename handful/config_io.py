"""Configs to and from plain values, as JSON and TOML hold them. An unknown key is an error.

to_dict(config)          nested plain values
from_dict(cls, values)   the config that they are
read_toml(path)          a file's plain values
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from handful.errors import ConfigError

__all__ = ["from_dict", "read_toml", "to_dict"]

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain values, for JSON."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value


def from_dict(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Make a config from nested plain values. ConfigError for an unknown key or a value of the wrong type."""
    hints = get_type_hints(cls)
    where = where or cls.__name__.removesuffix("Config").lower()
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"{where}.{key}: no such setting; there are {', '.join(sorted(hints))}")
        out[key] = _convert(hints[key], value, f"{where}.{key}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.name not in out and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}.{missing[0]}: needed and not given")
    return cls(**out)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (a for a in get_args(hint) if a is not type(None))
        return _convert(inner, value, where)
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{where} = {value!r}: one of {', '.join(map(str, get_args(hint)))}")
        return value
    if origin is tuple:  # of any length, all of one type
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} = {value!r}: a list")
        return tuple(_convert(get_args(hint)[0], item, where) for item in value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} = {value!r}: a table of settings")
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    # bool is an int to Python, not to a reader of config files.
    right = isinstance(value, int | float) if hint is float else isinstance(value, hint)
    if not right or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} = {value!r}: of type {hint.__name__}")
    return float(value) if hint is float else value


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file into plain values. ConfigError for a missing or malformed one."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"config {str(path)!r}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {str(path)!r}: not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"config {str(path)!r}: {error.strerror}") from None
