"""What is counted for penalties, and which requests cost anything at all."""

from __future__ import annotations

from collections import Counter

import numpy as np
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


class Letters:
    """A grammar of fixed answers, and its matcher: the tokens of one of `words`, then `eos`."""

    def __init__(self, *words: tuple[int, ...], eos: int = 0) -> None:
        self.words = [(*word, eos) for word in words]
        self.told: list[int] = []
        self._taken: tuple[int, ...] = ()

    def start(self) -> Letters:
        fresh = Letters()
        fresh.words, fresh.told = self.words, self.told
        return fresh

    def consume(self, token_id: int) -> bool:
        taken = (*self._taken, token_id)
        if any(word[: len(taken)] == taken for word in self.words):
            self._taken = taken
            return True
        return False

    def allowed(self, num_left: int) -> np.ndarray:
        self.told.append(num_left)
        place, mask = len(self._taken), np.zeros(VOCAB, dtype=bool)
        for word in self.words:
            if word[:place] == self._taken and len(word) > place:
                mask[word[place]] = True
        return mask


def allowed_ids(adjustment: Adjustment, opening_token: int | None = None) -> list[int]:
    allowed = adjustment.allowed_by_grammar(opening_token)
    assert allowed is not None
    return np.flatnonzero(allowed).tolist()


def test_a_grammar_follows_the_answer_and_knows_what_is_left() -> None:
    grammar = Letters((3, 4), (3, 5))
    adjustment = adjustment_for(grammar=grammar, max_tokens=9)
    assert adjustment is not None
    assert allowed_ids(adjustment) == [3]
    adjustment.catch_up([3], 0)
    assert allowed_ids(adjustment) == [4, 5]
    adjustment.catch_up([3, 5], 0)
    assert allowed_ids(adjustment) == [0]
    assert grammar.told == [9, 8, 7]
    assert adjustment_for(presence_penalty=1.0).allowed_by_grammar(None) is None  # pyright: ignore


def test_a_grammar_begins_anew_behind_a_thought() -> None:
    """A marker of two tokens, 7 and 8: its first is no answer, and only its second may follow."""
    adjustment = adjustment_for(grammar=Letters((3,)))
    assert adjustment is not None
    adjustment.catch_up([7], 0)
    assert allowed_ids(adjustment, opening_token=8) == [8]
    adjustment.catch_up([7, 8, 1, 1, 9], 5)
    assert allowed_ids(adjustment) == [3]
    adjustment.catch_up([7, 8, 1, 1, 9, 3], 5)
    assert allowed_ids(adjustment) == [0]


def test_bans_and_grammars_do_not_mix() -> None:
    with pytest.raises(ValueError, match="none beside a grammar"):
        adjustment_for(grammar=Letters((3,)), banned_token_ids=[3])
