"""Stop strings: cut whole, cut in pieces, and watched token by token outside the thought."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.chat.tokenizer import build_tokenizer
from openm1.engine.stopping import StopCutter, StopWatch, cut_at_stop

TOKENIZER = build_tokenizer(["ab", "cab"], special_tokens=["<think>", "</think>"])
OPEN, CLOSE = "<think>", "</think>"


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one two", (), "one two"),
        ("one two", ("x",), "one two"),
        ("one two", ("two", "ne"), "o"),
        ("one two", ("one",), ""),
        ("aab", ("ab",), "a"),
    ],
)
def test_text_ends_before_the_earliest_stop_string(text: str, stop, kept: str) -> None:
    assert cut_at_stop(text, stop) == kept


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stop=st.lists(st.text("ab", min_size=1, max_size=3), max_size=2).map(tuple),
)
def test_pieces_joined_are_the_cut_of_what_had_come(pieces: list[str], stop) -> None:
    cutter = StopCutter(stop)
    shown, come = "", ""
    for piece in pieces:
        if not cutter.found:
            come += piece
        shown += cutter.push(piece)
        assert cut_at_stop(come, stop).startswith(shown)
        assert cutter.found == any(s in come for s in stop)
    assert shown + cutter.flush() == cut_at_stop(come, stop)


def first_stop(reply: str, *stop: str, opened: bool = False) -> str | None:
    """The reply up to the token that completes a stop string."""
    watch = StopWatch(TOKENIZER, stop, thought_opened=opened)
    taken: list[int] = []
    for token in TOKENIZER.encode(reply, allow_special=True):
        taken.append(token)
        if watch.push(token):
            return TOKENIZER.decode(taken)
    return None


def test_a_stop_string_may_span_tokens_or_lie_inside_one() -> None:
    assert first_stop("x ab y", "x a") == "x ab"
    assert first_stop("x cab y", "a") == "x cab"
    assert first_stop("x y", "z") is None


def test_a_stop_string_of_many_bytes_is_found() -> None:
    assert first_stop("Größe", "ß") == "Größ"


def test_stop_strings_do_not_act_inside_a_thought_nor_on_its_markers() -> None:
    reply = f"{OPEN}a. b.{CLOSE}c. d."
    assert first_stop(reply, ".") == f"{OPEN}a. b.{CLOSE}c."
    assert first_stop(reply, "think") is None
    assert first_stop(reply, ">") is None
    assert first_stop(f"a.{CLOSE}c.", ".", opened=True) == f"a.{CLOSE}c."
    assert first_stop(f"c. {OPEN}", ".") == "c."


def test_the_line_breaks_after_a_thought_are_no_part_of_the_answer() -> None:
    reply = f"{OPEN}\na\n{CLOSE}\n\nb\nc"
    assert first_stop(reply, "\n") == f"{OPEN}\na\n{CLOSE}\n\nb\n"
