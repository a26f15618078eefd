from __future__ import annotations

import json
import math
from dataclasses import replace
from random import Random

import pytest

from openm1.rl.config import RLConfig
from openm1.rl.losses import CISPO, DAPO, Unified
from openm1.rl.stages import (
    WindowGrowth,
    WindowState,
    advance,
    late_grad_norm,
    late_loss,
    window_tokens,
)

GROWTH = WindowGrowth(later_tokens=(48, 56), horizon_steps=4)
FIRST = 40


def play(growth: WindowGrowth, steps, state: WindowState | None = None) -> list[WindowState]:
    """The states after each (perplexity, p99 length)."""
    state = state or WindowState()
    states = []
    for perplexity, length in steps:
        tokens = window_tokens(growth, state, FIRST)
        state = advance(
            growth,
            state,
            perplexity=perplexity,
            length_p99_tokens=length,
            window_tokens=tokens,
        )
        states.append(state)
    return states


def windows(growth: WindowGrowth, steps) -> list[int]:
    return [window_tokens(growth, state, FIRST) for state in play(growth, steps)]


def test_it_grows_once_perplexity_has_converged_and_lengths_are_near():
    assert windows(GROWTH, [(2.0, 39.0)] * 4) == [40, 40, 40, 48]


def test_short_replies_need_no_larger_window():
    assert windows(GROWTH, [(2.0, 35.9)] * 20) == [40] * 20
    assert windows(GROWTH, [(2.0, 36.0)] * 4)[-1] == 48


def test_a_perplexity_that_still_moves_keeps_the_window():
    falling = [(4.0 * 0.95**step, 39.0) for step in range(20)]
    assert windows(GROWTH, falling) == [40] * 20
    # Once it stands still, half a horizon of old values has to leave the means first.
    still = [*falling, *[(falling[-1][0], 39.0)] * 4]
    assert windows(GROWTH, still)[20:].index(48) >= 1
    rising = [(4.0 * 1.05**step, 39.0) for step in range(20)]
    assert windows(GROWTH, rising) == [40] * 20


def test_each_window_starts_anew_and_the_last_one_stays():
    steps = [(2.0, 60.0)] * 12
    assert windows(GROWTH, steps) == [40] * 3 + [48] * 4 + [56] * 5
    assert not play(GROWTH, steps)[3].late


def test_a_window_is_late_from_when_lengths_first_come_near():
    lengths = [10.0, 39.0, 10.0, 10.0]
    states = play(GROWTH, [(2.0, length) for length in lengths])
    assert [state.late for state in states] == [False, True, True, True]


def test_late_in_a_window_the_clips_are_lower():
    growth = replace(GROWTH, late_max_grad_norm=0.3, late_eps_is_high=1.0)
    early, late = WindowState(), WindowState(late=True)
    for loss in (CISPO(), Unified(eps_is_high=4.0, eps_low=0.3)):
        assert late_loss(growth, early, loss) == loss
        assert late_loss(growth, late, loss) == replace(loss, eps_is_high=1.0)
    assert late_grad_norm(growth, early, 1.0) == 1.0
    assert late_grad_norm(growth, late, 1.0) == 0.3
    # It lowers: a clip that is lower anyway stays.
    assert late_grad_norm(growth, late, 0.1) == 0.1


def test_without_late_values_nothing_changes_late():
    late = WindowState(late=True)
    assert late_loss(GROWTH, late, DAPO()) == DAPO()
    assert late_grad_norm(GROWTH, late, 1.0) == 1.0


@pytest.mark.parametrize("stop", range(1, 30, 4))
def test_a_state_read_back_goes_on_as_if_nothing_had_happened(stop: int):
    rng = Random(5)
    steps = [(2.0 + rng.random() * 0.05, rng.uniform(30, 60)) for _ in range(30)]
    whole = play(GROWTH, steps)
    assert {state.index for state in whole} == {0, 1, 2}
    text = json.dumps(whole[stop - 1].to_dict())
    again = WindowState.from_dict(json.loads(text))
    assert play(GROWTH, steps[stop:], again) == whole[stop:]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("near_share", 0.0),
        ("near_share", 1.5),
        ("horizon_steps", 1),
        ("perplexity_tolerance", -0.1),
        ("perplexity_tolerance", math.nan),
        ("late_max_grad_norm", 0.0),
        ("late_eps_is_high", -1.0),
    ],
)
def test_impossible_growth_is_refused(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name} is {value}; allowed"):
        WindowGrowth(**{name: value})


def test_a_run_refuses_windows_that_shrink_and_late_clips_it_cannot_lower():
    with pytest.raises(ValueError, match=r"windows are \(50, 48, 56\); allowed are ones that grow"):
        RLConfig(max_response_tokens=50, growth=GROWTH)
    growth = replace(GROWTH, late_eps_is_high=1.0)
    with pytest.raises(ValueError, match=r"late_eps_is_high is 1.0 with DAPO, which clips no"):
        RLConfig(max_response_tokens=40, growth=growth, loss=DAPO())
    with pytest.raises(ValueError, match=r"late_eps_is_high is 1.0; allowed is at most the loss's"):
        RLConfig(max_response_tokens=40, growth=growth, loss=CISPO(eps_is_high=0.5))
    assert RLConfig(max_response_tokens=40, growth=growth).growth == growth
