"""What the nouns refuse, and what they put in order."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from openm1.types import Message, SamplingParams

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "bad", "allowed"),
    [
        ("max_tokens", (0, -1, 1.5, None, True), "an integer of at least 1"),
        ("n", (0, 2.0), "an integer of at least 1"),
        ("top_k", (-1, 0.5), "an integer of at least 0"),
        ("top_logprobs", (-1, True, 2.0), "an integer of at least 0"),
        ("repetition_stop_tokens", (-1, 3.5, None), "an integer of at least 0"),
        ("thinking_budget", (-1, 1.5, False), "None or an integer of at least 0"),
        ("thinking_grace", (-1, 1.5, False), "None or an integer of at least 0"),
        ("thinking", (None, 1, "no"), "True or False"),
        ("priority", (0.5, None), "an integer"),
        ("temperature", (-0.1, 101, NAN), "0 (greedy) to 100"),
        ("top_p", (0.0, 1.1, NAN), "above 0 and at most 1"),
        ("min_p", (-0.1, 1.1, NAN), "0 (off) to 1"),
        ("presence_penalty", (NAN, INF, -INF), "a finite number, 0 being off"),
        ("frequency_penalty", (NAN, INF, -INF), "a finite number, 0 being off"),
        ("repetition_penalty", (0, -1, NAN, INF), "above 0, 1 being off"),
        ("logit_bias", ({"3": 1.0}, {-1: 1.0}, {3: NAN}, {3: INF}, {1.0: 1}), "finite numbers by"),
        ("banned_token_ids", ((-1,), ("3",), (1.0,), (True,)), "token ids"),
        ("repetition_stop_probability", (-0.1, 1.0, NAN), "at least 0 and below 1"),
        ("stop", (("",), ""), "non-empty strings"),
    ],
)
def test_bad_sampling_params_are_refused_by_name(name: str, bad: tuple, allowed: str) -> None:
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{name} is .*; allowed is {re.escape(allowed)}"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("max_tokens", (1, np.int64(5))),
        ("top_logprobs", (0, 20)),
        ("thinking_budget", (None, 0, 80_000)),
        ("thinking_grace", (None, 0, 512)),
        ("temperature", (0, 0.0, 100)),
        ("top_p", (1, 1e-9)),
        ("min_p", (0, 1)),
        ("presence_penalty", (-2, 2.5)),
        ("frequency_penalty", (-2, 2.5)),
        ("repetition_penalty", (0.5, 2)),
        ("repetition_stop_probability", (0, 0.999)),
        ("repetition_stop_tokens", (0, 1)),
        ("priority", (-3, 0, 7)),
        ("logit_bias", ({}, {0: -100}, {np.int64(7): 0.5})),
    ],
)
def test_the_borders_are_allowed(name: str, good: tuple) -> None:
    for value in good:
        assert getattr(SamplingParams(**{name: value}), name) == value


def test_lists_become_tuples_and_the_bias_is_the_params_own() -> None:
    bias = {3: 1.0}
    params = SamplingParams(
        stop="x", stop_token_ids=[1], banned_token_ids=range(2), logit_bias=bias
    )
    bias[4] = 2.0
    assert params.stop == ("x",) and params.stop_token_ids == (1,)
    assert params.banned_token_ids == (0, 1) and params.logit_bias == {3: 1.0}
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_the_defaults_change_nothing_but_endless_repetition() -> None:
    params = SamplingParams()
    assert (params.min_p, params.repetition_penalty, params.top_logprobs) == (0.0, 1.0, 0)
    assert params.thinking and params.thinking_budget is None
    assert (params.repetition_stop_tokens, params.repetition_stop_probability) == (3000, 0.99)


def test_a_message_has_a_known_role() -> None:
    with pytest.raises(ValueError, match="role is 'bot'; allowed are system, user, assistant"):
        Message(role="bot")
