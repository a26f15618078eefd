from __future__ import annotations

import json
from collections import Counter

import pytest

from openm1.envs.base import prompt_text
from openm1.envs.catalog import make_levels
from openm1.envs.chain import ChainConfig, ChainTaskset
from openm1.envs.curriculum import Course, Curriculum, CurriculumConfig
from openm1.envs.hop import HopTaskset
from openm1.types import Message, Task

LEVELS = [ChainTaskset(ChainConfig(min_operations=n, max_operations=n)) for n in (2, 4, 6)]
CONFIG = CurriculumConfig(
    general_from_step=10, general_until_step=30, general_share=0.4, horizon_groups=4
)


def curriculum(seed: int = 0) -> Curriculum:
    courses = [Course(levels=LEVELS), Course(levels=[HopTaskset()], verifier="general")]
    return Curriculum(courses, CONFIG, seed=seed)


def drawn(mixture: Curriculum, count: int = 600) -> Counter[str]:
    """How many operations, or "hop"."""
    kinds = Counter[str]()
    for i in range(count):
        _, task = mixture.task(i)
        length = str(len(prompt_text(task).split()) - 1)
        kinds[length if task.family == "chain" else "hop"] += 1
    return kinds


def pass_all(mixture: Curriculum, rate: float, count: int = 4) -> None:
    task = Task(family="chain", prompt=(Message(role="user", content="?"),), answer="")
    for _ in range(count):
        mixture.observe(task, rate)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (9, 0.0), (20, 0.2), (30, 0.4), (1000, 0.4)])
def test_general_tasks_are_mixed_in_step_by_step(step: int, share: float):
    mixture = curriculum()
    mixture.begin_step(step)
    assert mixture.metrics()["curriculum/general_share"] == pytest.approx(share)
    # Three standard deviations of the share are 0.06.
    assert drawn(mixture)["hop"] / 600 == pytest.approx(share, abs=0.06)


def test_a_course_gets_harder_when_it_is_passed_and_old_levels_are_reviewed():
    mixture = curriculum()
    assert set(drawn(mixture)) == {"2"}
    pass_all(mixture, 0.7, 50)
    mixture.begin_step(1)
    assert set(drawn(mixture)) == {"2"}
    # 0.7, 0.7, 0.7 and 1 are 0.775: passed. The new level starts with nothing seen.
    pass_all(mixture, 1.0, 1)
    assert mixture.metrics()["curriculum/level_chain"] == 1
    pass_all(mixture, 1.0, 3)
    assert mixture.metrics()["curriculum/level_chain"] == 1
    mixture.begin_step(2)
    kinds = drawn(mixture)
    assert set(kinds) == {"2", "4"}
    assert kinds["2"] / 600 == pytest.approx(0.2, abs=0.05)
    pass_all(mixture, 1.0, 50)
    assert mixture.metrics()["curriculum/level_chain"] == 2
    mixture.begin_step(3)
    kinds = drawn(mixture)
    assert kinds["6"] / 600 == pytest.approx(0.8, abs=0.05)
    assert kinds["2"] > 20 < kinds["4"]


def test_a_curriculum_goes_on_where_it_was_saved():
    first, second, other = curriculum(), curriculum(), curriculum(seed=1)
    pass_all(first, 1.0, 6)
    second.load_state(json.loads(json.dumps(first.state())))
    for mixture in (first, second, other):
        mixture.begin_step(25)
    tasks = [first.task(i)[1] for i in range(50)]
    assert tasks == [second.task(i)[1] for i in range(50)]
    assert tasks != [other.task(i)[1] for i in range(50)]
    pass_all(first, 1.0, 2)
    pass_all(second, 1.0, 2)
    assert first.metrics() == second.metrics()
    assert first.metrics()["curriculum/level_chain"] == 2


def test_what_is_no_curriculum_is_refused():
    with pytest.raises(ValueError, match="at least one with a rule"):
        Curriculum([Course(levels=[HopTaskset()], verifier="general")])
    with pytest.raises(ValueError, match="different families"):
        Curriculum([Course(levels=LEVELS[:1]), Course(levels=LEVELS[1:])])
    with pytest.raises(ValueError, match="no levels"):
        Course(levels=[])
    with pytest.raises(ValueError, match="0 <= from <= until"):
        CurriculumConfig(general_from_step=5, general_until_step=4)
    with pytest.raises(ValueError, match="raise_at is 0"):
        CurriculumConfig(raise_at=0)


def test_levels_of_the_catalog_get_harder_and_keep_their_family():
    chain, hop, other = (make_levels(name) for name in ("chain", "hop", "count_bits"))
    assert len(other) == 1
    longest = [
        max(len(prompt_text(task).split()) - 1 for task in level.test(0, 40)) for level in chain
    ]
    assert longest == [2, 3, 4, 5, 6]
    assert {level.name for level in chain + hop} == {"chain", "hop"}
    assert len(hop) == 5
