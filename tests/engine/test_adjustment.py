"""What is counted for penalties, and which requests cost anything at all."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.engine.adjustment import Adjustment
from openm1.types import SamplingParams

VOCAB = 20


def adjustment_for(prompt_ids=(), **params) -> Adjustment | None:
    return Adjustment.for_request(SamplingParams(**params), prompt_ids, VOCAB)


def counts_of(adjustment: Adjustment) -> dict[int, int]:
    ids, counts = adjustment.answer_counts()
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize(
    ("params", "asks"),
    [
        ({"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "thinking_budget": 3}, False),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"repetition_penalty": 0.9}, True),
        ({"logit_bias": {3: 0.0}}, True),
        ({"banned_token_ids": [0]}, True),
    ],
)
def test_only_requests_that_ask_have_one(params: dict, asks: bool) -> None:
    assert (adjustment_for(**params) is not None) == asks


@given(
    thought=st.lists(st.integers(0, VOCAB - 1), max_size=9),
    answer=st.lists(st.integers(0, VOCAB - 1), max_size=20),
    looks=st.lists(st.booleans(), min_size=30, max_size=30),
)
def test_the_answer_is_counted_however_often_one_looks(thought, answer, looks) -> None:
    """Before the thought opens its beginning looks like an answer, and is forgotten again."""
    adjustment = adjustment_for([1, 1, 7, VOCAB, VOCAB + 3], repetition_penalty=2.0)
    assert adjustment is not None
    output = thought + answer
    for end in range(len(output) + 1):
        start = len(thought) if end >= len(thought) else 0
        if looks[end]:
            adjustment.catch_up(output[:end], start)
            assert counts_of(adjustment) == Counter(output[start:end])
            assert adjustment.repeated_ids().tolist() == sorted({1, 7, *output[start:end]})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, rf"logit_bias has token id {VOCAB}; allowed are 0 to 19"),
        ({"banned_token_ids": [3, 99]}, r"banned_token_ids has token id 99; allowed are 0 to 19"),
        ({"banned_token_ids": range(VOCAB)}, r"banned_token_ids holds all 20 tokens"),
    ],
)
def test_what_cannot_be_is_refused(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adjustment_for(**params)


def test_one_token_may_be_left_and_a_token_banned_twice() -> None:
    assert adjustment_for(banned_token_ids=[0, *range(VOCAB - 1)]) is not None
