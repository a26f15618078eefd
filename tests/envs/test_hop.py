"""Hop prompts are walked here pair by pair, and the thought has to tell the same walk."""

import re
from collections import Counter
from itertools import islice, pairwise

import pytest

from openm1.envs.base import prompt_text
from openm1.envs.hop import HOP_WORDS, HopConfig, HopTaskset


def read_prompt(prompt: str) -> tuple[str, int, dict[str, str]]:
    start, num_hops, pairs = re.fullmatch(r"(\w) (\d) hops: (.*)", prompt).groups()
    return start, int(num_hops), dict(re.findall(r"(\w)>(\w)", pairs))


@pytest.mark.parametrize("config", [HopConfig(), HopConfig(num_pairs=12, max_hops=9)])
def test_the_walk_leads_to_the_answer(config):
    taskset = HopTaskset(config)
    for task in islice(taskset.train(0), 300):
        start, num_hops, values = read_prompt(prompt_text(task))
        letters = set("abcdefghijkl"[: config.num_pairs])
        assert set(values) == set(values.values()) == letters
        walk = [start]
        for _ in range(num_hops):
            walk.append(values[walk[-1]])
        assert walk[-1] == task.answer
        assert len(set(walk)) == num_hops + 1, "a walk must not meet itself"
        thought = taskset.think(task)
        assert re.findall(r"(\w)>(\w)", thought) == list(pairwise(walk))
        assert re.findall(r"\d", thought) == [str(left) for left in range(num_hops, -1, -1)]


def test_answers_and_hops_are_uniform():
    tasks = list(islice(HopTaskset().train(1), 8000))
    answers = Counter(task.answer for task in tasks)
    hops = Counter(read_prompt(prompt_text(task))[1] for task in tasks)
    # Five standard deviations of shares of 1 in 8 and 1 in 5.
    assert all(abs(count / 8000 - 1 / 8) < 0.019 for count in answers.values())
    assert len(answers) == 8 and sorted(hops) == [1, 2, 3, 4, 5]
    assert all(abs(count / 8000 - 1 / 5) < 0.023 for count in hops.values())


def test_the_order_of_the_pairs_tells_nothing():
    hits = Counter()
    for task in islice(HopTaskset().train(2), 4000):
        *_, pairs = prompt_text(task).split(": ")
        hits[[pair[2] for pair in pairs.split()].index(task.answer)] += 1
    assert all(abs(hits[place] / 4000 - 1 / 8) < 0.027 for place in range(8))


def test_every_pair_is_a_word():
    taskset = HopTaskset()
    assert len(HOP_WORDS) == len(set(HOP_WORDS)) == 62
    for task in islice(taskset.train(3), 200):
        for text in (prompt_text(task), taskset.think(task)):
            assert set(re.findall(r" \w>\w", text)) <= set(HOP_WORDS)
            assert len(re.findall(r" \w>\w", text)) == text.count(">")


def test_walks_that_would_return_are_refused():
    with pytest.raises(ValueError, match="hops are 1 to 8"):
        HopConfig(max_hops=8)
    with pytest.raises(ValueError, match="num_pairs is 2"):
        HopConfig(num_pairs=2, max_hops=1)
