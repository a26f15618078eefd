"""A JSON object in pieces, against Python's own reader."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from openm1.chat.json_scan import MAX_DEPTH, ObjectScan

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), values, max_size=4)
SHARDS = ['"', "\\", *"{}[],: 1-.a\n", "e9", "true", "u00"]


def scanned(chunks: list[str]) -> tuple[str, str, str]:
    """(state, what belongs to the object, what is left)."""
    scan, taken, left = ObjectScan(), "", ""
    for chunk in chunks:
        if scan.state == "open":
            sure, left = scan.push(chunk)
            taken += sure
        else:
            left += chunk
    return scan.state, taken, left


@given(objects, st.booleans(), st.data())
def test_an_object_is_whole_at_its_last_brace(value: dict, ascii: bool, data) -> None:
    text = json.dumps(value, ensure_ascii=ascii)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert scanned(chunks) == ("whole", text, "")
    assert scanned([*chunks, "} x"]) == ("whole", text, "} x")
    for end in range(len(text)):
        state, taken, left = scanned([text[:end]])
        assert state == "open" and text.startswith(taken) and not left


@given(st.lists(st.sampled_from(SHARDS), max_size=14).map("".join))
def test_whole_is_what_python_reads_and_broken_can_be_nothing_more(tail: str) -> None:
    # JSON, but what no double holds.
    assume("e911" not in tail)
    text = "{" + tail
    state, taken, left = scanned([text])
    assert scanned(list(text)) == (state, taken, left)
    if state == "whole":
        assert isinstance(json.loads(taken), dict)
    # Python goes on behind a line break between values.
    elif not left.startswith("\n"):
        with pytest.raises(ValueError):
            json.loads(text)
    if state == "broken":
        assert taken + left == text


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('{"a": 1e999}', '{"a": '),
        ('{"a": -1e999, "b": 1}', '{"a": '),
        ('{"a": NaN}', '{"a": '),
        ('{"a": Infinity}', '{"a": '),
        ('{"a": 01}', '{"a": '),
        ('{"a": 1.}', '{"a": '),
        (f'{{"a": {"9" * 401}}}', '{"a": '),
        ('{"a": "\\ud800"}', '{"a": "'),
        ('{"a": "\\ud83dx"}', '{"a": "'),
        ('{"a": "\\x"}', '{"a": "'),
        ('{"a": "\n"}', '{"a": "'),
        ('{"a": 1,\n"b": 2}', '{"a": 1,'),
        ('{"a": 1,}', '{"a": 1,'),
        ('{"a" 1}', '{"a" '),
        ("{1: 2}", "{"),
        ('{"a": [1}', '{"a": [1'),
        ('{"a": True}', '{"a": '),
        ("[1]", ""),
    ],
)
def test_where_an_object_breaks(text: str, taken: str) -> None:
    assert scanned([text]) == scanned(list(text)) == ("broken", taken, text.removeprefix(taken))


def test_pairs_of_surrogates_and_long_numbers_pass() -> None:
    text = '{"a": "\\ud83d\\ude00\\u00e9\\\\", "b": 1e308, "c": -0.5E-7}'
    assert scanned(list(text)) == ("whole", text, "")
    assert math.isfinite(json.loads(text)["b"])


def test_depth_is_bounded() -> None:
    def nested(depth: int) -> str:
        return '{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"

    assert scanned([nested(MAX_DEPTH)])[0] == "whole"
    assert scanned([nested(MAX_DEPTH + 1)])[0] == "broken"
