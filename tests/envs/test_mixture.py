from __future__ import annotations

from collections import Counter

import pytest

from openm1.envs.base import is_held_out, prompt_text
from openm1.envs.chain import ChainTaskset
from openm1.envs.hop import HopTaskset
from openm1.envs.mixture import Mixture

TASKSETS = [ChainTaskset(), HopTaskset()]


def test_a_task_depends_on_seed_and_number_alone():
    first, second = Mixture(TASKSETS, seed=1), Mixture(TASKSETS, seed=1)
    forwards = [first.task(i)[1] for i in range(30)]
    backwards = [second.task(i)[1] for i in reversed(range(30))]
    assert forwards == backwards[::-1]
    assert len(set(map(prompt_text, forwards))) > 25
    other = Mixture(TASKSETS, seed=2)
    assert forwards != [other.task(i)[1] for i in range(30)]


def test_families_come_by_weight():
    mixture = Mixture(TASKSETS, weights=[3.0, 1.0])
    pairs = [mixture.task(i) for i in range(800)]
    # Three standard deviations of the share are 0.046.
    assert Counter(taskset.name for taskset, _ in pairs)["chain"] / 800 == pytest.approx(
        0.75, abs=0.05
    )
    assert all(taskset.name == task.family for taskset, task in pairs)
    only = Mixture(TASKSETS, weights=[0.0, 1.0])
    assert {only.task(i)[0].name for i in range(50)} == {"hop"}


def test_no_task_is_held_out():
    mixture = Mixture(TASKSETS)
    assert not any(is_held_out(prompt_text(mixture.task(i)[1])) for i in range(500))


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 1.0, 1.0], [1.0, -1.0], [0.0, 0.0], [float("inf"), 1.0]]
)
def test_weights_that_are_no_shares_are_refused(weights: list[float]):
    with pytest.raises(ValueError, match="2 tasksets with weights"):
        Mixture(TASKSETS, weights=weights)


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 tasksets"):
        Mixture([])
