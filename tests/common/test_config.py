from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from openm1.common.config import from_jsonable, load_config, save_config, to_jsonable


@dataclass(frozen=True, kw_only=True, slots=True)
class Square:
    side: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Circle:
    side: float = 1.0
    """Named as the square's, so that only the class tells the two apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    shape: Square | Circle
    folder: Path
    style: Literal["thin", "thick"] = "thin"
    count: int = 1
    closed: bool = False
    title: str | None = None
    parent: Path | None = None
    sizes: tuple[int, ...] = ()
    shares: dict[str, float] | None = None


FULL = Drawing(
    shape=Circle(side=2.5),
    folder=Path("a/b"),
    style="thick",
    count=3,
    closed=True,
    title="round",
    parent=Path("c"),
    sizes=(1, 2),
    shares={"x": 0.5, "y": math.inf},
)
PLAIN = Drawing(shape=Square(), folder=Path())


@pytest.mark.parametrize("value", [FULL, PLAIN], ids=["full", "plain"])
def test_a_config_comes_back_equal_from_its_file(tmp_path: Path, value: Drawing):
    file = tmp_path / "config.json"
    save_config(value, file)
    back = load_config(Drawing, file)
    assert back == value
    assert type(back.shape) is type(value.shape)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "Drawing has unknown colour"),
        ({"count": None}, r"Drawing.count is None; allowed is a int"),
        ({"count": 1.5}, r"Drawing.count is 1.5"),
        ({"count": True}, r"Drawing.count is True"),
        ({"closed": 1}, r"Drawing.closed is 1"),
        ({"title": 7}, r"Drawing.title is 7"),
        ({"style": "wavy"}, r"Drawing.style is 'wavy'; allowed are 'thin', 'thick'"),
        ({"sizes": "12"}, r"Drawing.sizes is '12'"),
        ({"sizes": [1, "2"]}, r"Drawing.sizes\[1\] is '2'"),
        ({"shares": {"x": "much"}}, r"Drawing.shares.x is 'much'"),
        ({"folder": 3}, r"Drawing.folder is 3"),
        ({"shape": {"kind": "Star", "side": 1.0}}, "Drawing.shape.kind is 'Star'"),
        ({"shape": {"side": 1.0}}, "allowed are Circle, Square"),
        ({"shape": {"kind": "Circle", "side": "long"}}, "Drawing.shape.side is 'long'"),
        ({"shape": {"kind": "Circle"}}, "Drawing.shape has no side"),
        ({"kind": "Square"}, "Drawing.kind is 'Square'; allowed is 'Drawing'"),
    ],
)
def test_what_a_config_does_not_know_is_refused_by_name(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        from_jsonable(Drawing, to_jsonable(FULL) | change)


def test_what_is_missing_is_refused_and_not_filled_in():
    raw = to_jsonable(FULL)
    del raw["style"]
    with pytest.raises(ValueError, match="Drawing has no style"):
        from_jsonable(Drawing, raw)


def test_a_whole_number_stands_for_a_float():
    raw = json.loads(json.dumps(to_jsonable(PLAIN)).replace("1.0", "1"))
    shape = from_jsonable(Drawing, raw).shape
    assert (shape.side, type(shape.side)) == (1.0, float)
