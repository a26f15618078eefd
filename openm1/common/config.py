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
    """Writes a dataclass as indented JSON; the file is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(to_jsonable(config), indent=2) + "\n")
    temporary.replace(path)


def load_config(cls: type[T], path: Path) -> T:
    return from_jsonable(cls, json.loads(path.read_text()))


def _read(kind: Any, raw: Any, where: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _read_union(get_args(kind), raw, where)
    if origin is tuple:
        inner = get_args(kind)[0]
        items = enumerate(_typed(list, raw, where))
        return tuple(_read(inner, item, f"{where}[{i}]") for i, item in items)
    if origin is dict:
        inner = get_args(kind)[1]
        items = _typed(dict, raw, where).items()
        return {key: _read(inner, item, f"{where}.{key}") for key, item in items}
    if origin is Literal:
        if raw not in get_args(kind):
            raise ValueError(
                f"{where} is {raw!r}; allowed are {', '.join(map(repr, get_args(kind)))}"
            )
        return raw
    if is_dataclass(kind):
        return _read_dataclass(kind, _typed(dict, raw, where), where)
    if kind is Path:
        return Path(_typed(str, raw, where))
    if kind is float and type(raw) is int:
        return float(raw)
    return _typed(kind, raw, where) if kind in (str, int, float, bool) else raw


def _typed(kind: type[T], raw: Any, where: str) -> T:
    # A bool is an int to Python, not to a reader of the file.
    if type(raw) is not kind:
        raise ValueError(f"{where} is {raw!r}; allowed is a {kind.__name__}")
    return raw


def _read_union(options: tuple[Any, ...], raw: Any, where: str) -> Any:
    if raw is None and type(None) in options:
        return None
    classes = {o.__name__: o for o in options if isinstance(o, type) and is_dataclass(o)}
    if classes:
        kind = raw.get("kind") if isinstance(raw, dict) else None
        if kind not in classes:
            raise ValueError(f"{where}.kind is {kind!r}; allowed are {', '.join(sorted(classes))}")
        return _read(classes[kind], raw, where)
    return _read(next(o for o in options if o is not type(None)), raw, where)


def _read_dataclass(cls: Any, raw: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(cls)
    names = {f.name for f in fields(cls)}
    given = dict(raw)
    if (kind := given.pop("kind", None)) != cls.__name__:
        raise ValueError(f"{where}.kind is {kind!r}; allowed is {cls.__name__!r}")
    for problem, which in (("unknown", set(given) - names), ("no", names - set(given))):
        if which:
            raise ValueError(f"{where} has {problem} {', '.join(sorted(which))}")
    return cls(**{key: _read(hints[key], value, f"{where}.{key}") for key, value in given.items()})
