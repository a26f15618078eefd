from __future__ import annotations

import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.train.schedule import Schedule


@given(
    st.integers(0, 30),
    st.floats(0, 1),
    st.sampled_from(["linear", "cosine"]),
    st.floats(0, 1),
    st.integers(1, 200),
)
def test_it_rises_stays_and_falls(
    warmup: int, share: float, decay: Literal["linear", "cosine"], final: float, num_steps: int
):
    schedule = Schedule(warmup_steps=warmup, decay_share=share, decay=decay, final_ratio=final)
    ratios = [schedule.ratio(step, num_steps) for step in range(num_steps)]
    assert all(0 < ratio <= 1 + 1e-12 for ratio in ratios)
    falls_from = num_steps - share * num_steps
    for step in range(1, num_steps):
        if step < min(warmup, falls_from):
            assert ratios[step] > ratios[step - 1]
        elif step >= max(warmup, 1):
            assert ratios[step] <= ratios[step - 1] + 1e-12
        if warmup <= step < falls_from:
            assert ratios[step] == 1


def test_the_decay_ends_one_stride_above_its_final_ratio():
    schedule = Schedule(decay_share=0.4, final_ratio=0.1)
    ratios = [schedule.ratio(step, 10) for step in range(10)]
    assert ratios == pytest.approx([1.0] * 6 + [1.0, 0.775, 0.55, 0.325])


def test_cosine_is_half_a_wave():
    schedule = Schedule(decay_share=1.0, decay="cosine")
    waves = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert [schedule.ratio(step, 8) for step in range(8)] == pytest.approx(waves)


def test_warm_up_starts_above_zero_and_ends_at_one():
    ratios = [Schedule(warmup_steps=4).ratio(step, 100) for step in range(5)]
    assert ratios == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("bad", [{"warmup_steps": -1}, {"decay_share": 1.5}, {"final_ratio": -0.1}])
def test_impossible_schedules_are_refused(bad: dict[str, float]):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
        Schedule(**bad)  # pyright: ignore[reportArgumentType]
