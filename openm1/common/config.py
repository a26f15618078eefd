"""Frozen dataclasses to and from JSON, refusing what they do not know."""

from __future__ import annotations

import json
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_jsonable(value: Any) -> Any:
    """A dataclass as a dict with its class name under "kind", so that unions can be read back."""
    if is_dataclass(value) and not isinstance(value, type):
        plain = {f.name: to_jsonable(getattr(value, f.name)) for f in fields(value)}
        return {"kind": type(value).__name__, **plain}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def from_jsonable(cls: type[T], raw: Any) -> T:
    """Reads what `to_jsonable` wrote. Raises ValueError on unknown or missing keys."""
    return _read(cls, raw, cls.__name__)


def save_config(config: Any, path: Path) -> None:
    """Writes a dataclass as indented JSON."""
    path.write_text(json.dumps(to_jsonable(config), indent=2) + "\n")


def load_config(cls: type[T], path: Path) -> T:
    return from_jsonable(cls, json.loads(path.read_text()))


def _read(kind: Any, raw: Any, where: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _read_union(get_args(kind), raw, where)
    if origin is tuple:
        inner = get_args(kind)[0]
        return tuple(_read(inner, item, where) for item in raw)
    if origin is dict:
        inner = get_args(kind)[1]
        return {key: _read(inner, item, f"{where}.{key}") for key, item in raw.items()}
    if origin is Literal:
        if raw not in get_args(kind):
            raise ValueError(
                f"{where} is {raw!r}; allowed are {', '.join(map(repr, get_args(kind)))}"
            )
        return raw
    if is_dataclass(kind):
        return _read_dataclass(kind, raw, where)
    return kind(raw) if kind in (float, Path) else raw


def _read_union(options: tuple[Any, ...], raw: Any, where: str) -> Any:
    if raw is None and type(None) in options:
        return None
    classes = {option.__name__: option for option in options if is_dataclass(option)}
    if classes:
        kind = raw.get("kind") if isinstance(raw, dict) else None
        if kind not in classes:
            raise ValueError(f"{where}.kind is {kind!r}; allowed are {', '.join(sorted(classes))}")
        return _read(classes[kind], raw, where)
    return _read(next(o for o in options if o is not type(None)), raw, where)


def _read_dataclass(cls: Any, raw: Any, where: str) -> Any:
    hints = get_type_hints(cls)
    names = {f.name for f in fields(cls)}
    given = {key: value for key, value in raw.items() if key != "kind"}
    if unknown := set(given) - names:
        raise ValueError(f"{where} has unknown {', '.join(sorted(unknown))}")
    return cls(**{key: _read(hints[key], value, f"{where}.{key}") for key, value in given.items()})
