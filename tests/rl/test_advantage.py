from __future__ import annotations

from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.rl.advantage import group_advantages


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0]), min_size=2, max_size=16))
def test_a_group_has_mean_0_and_deviation_1_and_keeps_its_order(rewards: list[float]):
    advantages = group_advantages(rewards)
    if len(set(rewards)) == 1:
        assert advantages == [0.0] * len(rewards)
        return
    assert fmean(advantages) == pytest.approx(0.0, abs=1e-12)
    assert pstdev(advantages) == pytest.approx(1.0)
    for a, reward in zip(advantages, rewards, strict=True):
        for b, other in zip(advantages, rewards, strict=True):
            assert (a < b) == (reward < other)


def test_one_right_of_four():
    assert group_advantages([1, 0, 0, 0]) == pytest.approx([3**0.5, *[-(3**-0.5)] * 3])


def test_an_empty_group_has_none():
    assert group_advantages([]) == []
