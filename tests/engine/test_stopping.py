"""Why replies end: stop strings (cut whole, cut in pieces, watched token by token outside the
thought), runs of all but certain tokens, length, and which of them goes first."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.chat.tokenizer import build_tokenizer
from openm1.engine.stopping import (
    RepetitionRun,
    StopCutter,
    StopWatch,
    cut_at_stop,
    finish_reason,
)
from openm1.types import SamplingParams

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


SURE, UNSURE = math.log(0.991), math.log(0.989)


@given(
    wanted=st.integers(0, 5),
    tokens=st.lists(
        st.tuples(st.sampled_from([SURE, SURE, SURE, UNSURE, -math.inf]), st.booleans()),
        max_size=30,
    ),
)
def test_a_run_is_that_many_sampled_tokens_in_a_row(wanted: int, tokens: list) -> None:
    run = RepetitionRun(wanted, 0.99)
    counted = ""
    for logprob, forced in tokens:
        run.observe(logprob, forced=forced)
        counted += "y" if logprob == SURE and not forced else "n"
        assert run.reached == (wanted > 0 and counted.endswith("y" * wanted))


@pytest.mark.parametrize(
    ("probability", "token", "counts"),
    [(0.99, 0.99, False), (0.99, 1.0, True), (0.5, 0.500001, True), (0.0, 1e-30, True)],
)
def test_a_run_is_of_tokens_above_the_probability(probability, token, counts) -> None:
    run = RepetitionRun(1, probability)
    run.observe(math.log(token), forced=False)
    assert run.reached == counts


def reason(token: int, *, length: int = 3, stops: bool = False, sure: int = 0, **params):
    """Why a reply of `length` tokens that ends with `token` ends, its last `sure` ones certain."""
    wanted = SamplingParams(**({"max_tokens": 9, "repetition_stop_tokens": 2} | params))
    run = RepetitionRun(wanted.repetition_stop_tokens, wanted.repetition_stop_probability)
    for _ in range(sure):
        run.observe(0.0, forced=False)
    request = SimpleNamespace(
        params=wanted,
        output_ids=[3] * (length - 1) + [token],
        completes_stop=(lambda token: stops) if stops else None,
        repetition=run,
    )
    return finish_reason(request, frozenset({1}))


def test_each_reason_and_which_goes_first() -> None:
    assert reason(3) is None
    assert reason(1) == "stop"
    assert reason(1, ignore_eos=True) is None
    assert reason(4, stop_token_ids=[4]) == "stop"
    assert reason(3, stops=True) == "stop"
    assert reason(3, length=9) == "length"
    assert reason(3, sure=1) is None
    assert reason(3, sure=2) == "repetition"
    assert reason(3, sure=2, repetition_stop_tokens=0) is None
    assert reason(3, sure=2, length=9) == "repetition"
    for stop in ({"stops": True}, {"stop_token_ids": [3]}):
        assert reason(3, sure=2, length=9, **stop) == "stop"
    assert reason(1, sure=2, length=9) == "stop"
