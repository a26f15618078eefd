"""Laws of thought splitting: the stream equals the whole, and nothing but blanks is dropped."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.chat.thinking import THINK_CLOSE, THINK_OPEN, ThoughtSplitter, split_thought

# Text rich in markers, halves of markers and blanks, where splitters go wrong.
SHARDS = [THINK_OPEN, THINK_CLOSE, "<think", "</thi", "<", ">", " ", "\n", "a", "7 b", "\u00e9"]
texts = st.lists(st.sampled_from(SHARDS), max_size=12).map("".join)


def chunks_of(draw, text: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    edges = [0, *cuts, len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("4", False, (None, "4")),
        (" 4 ", False, (None, " 4 ")),
        ("<think>\n2+2\n</think>\n\n4", False, ("2+2", "4")),
        ("<think>2+2</think>4 ", False, ("2+2", "4 ")),
        ("\n <think>2+2</think>4", False, ("2+2", "4")),
        ("2+2\n</think>\n\n4", True, ("2+2", "4")),
        ("<think>2+2", False, ("2+2", "")),
        ("2+2 ", True, ("2+2", "")),
        ("<think></think>4", False, ("", "4")),
        ("", True, ("", "")),
        ("<think>a</think>b<think>c</think>d", False, ("a", "b<think>c</think>d")),
        ("write <think> first", False, (None, "write <think> first")),
        ("4</think>", False, (None, "4</think>")),
        ("<think>a</thi", False, ("a</thi", "")),
    ],
)
def test_cases(text, opened, expected):
    assert split_thought(text, opened=opened) == expected


@given(st.data(), texts, st.booleans())
def test_stream_equals_whole(data, text, opened):
    splitter = ThoughtSplitter(opened=opened)
    pieces = [piece for chunk in chunks_of(data.draw, text) for piece in splitter.push(chunk)]
    pieces += splitter.flush()
    reasoning = "".join(piece for part, piece in pieces if part == "reasoning")
    answer = "".join(piece for part, piece in pieces if part == "answer")
    expected = split_thought(text, opened=opened)
    assert (reasoning if splitter.has_thought else None, answer) == expected
    assert all(piece for _, piece in pieces)
    if expected[0] is None:
        assert reasoning == ""


@given(texts, st.booleans())
def test_only_blanks_and_the_two_markers_are_dropped(text, opened):
    reasoning, answer = split_thought(text, opened=opened)
    kept = "".join(((reasoning or "") + answer).split())
    rest = text if opened or reasoning is None else text.replace(THINK_OPEN, "", 1)
    rest = rest if reasoning is None else rest.replace(THINK_CLOSE, "", 1)
    assert kept == "".join(rest.split())


def test_text_is_not_held_longer_than_needed():
    splitter = ThoughtSplitter()
    assert splitter.push("<think>a") == [("reasoning", "a")]
    assert splitter.in_thought
    assert splitter.push(" </th") == []
    assert splitter.push("ink> b") == [("answer", "b")]
    assert not splitter.in_thought
    assert splitter.push("c") == [("answer", "c")]


def test_the_answer_begins_with_its_first_character() -> None:
    splitter = ThoughtSplitter()
    splitter.push("<think>hm</think>")
    assert not splitter.in_answer
    splitter.push("\n\n")
    assert not splitter.in_answer
    splitter.push("4")
    assert splitter.in_answer
    plain = ThoughtSplitter()
    plain.push("<thi")
    assert not plain.in_answer
    plain.push("s")
    assert plain.in_answer
