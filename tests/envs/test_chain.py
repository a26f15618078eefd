"""Chain thoughts are re-read here by code that shares nothing with the taskset."""

import random
from collections import Counter
from itertools import islice

import pytest

from openm1.envs.base import majority_accuracy, prompt_text
from openm1.envs.chain import CHAIN_WORDS, ChainConfig, ChainTaskset


def evaluate(expression: list[str]) -> int:
    text = expression[0]
    for operation in expression[1:]:
        text = f"({text}){operation}"
    return eval(text) % 10


def check_thought(thought: str, prompt: str) -> int:
    """Checks every `=d` against the operations before it; returns how many there are."""
    operations = []
    for item in thought.split(" "):
        if item.startswith("="):
            assert item == f"={evaluate(operations)}"
        else:
            operations.append(item)
    assert " ".join(operations) == prompt
    return thought.count("=")


def test_the_example_of_the_docstring():
    taskset = ChainTaskset()
    task = next(taskset.train(0))
    example = type(task)(
        family="chain",
        prompt=(type(task.prompt[0])(role="user", content="4 -9 +8 *9 +1"),),
        answer="8",
    )
    assert taskset.think(example) == "4 -9 =5 +8 =3 *9 =7 +1 =8"


def test_full_thoughts_compute_after_each_operation():
    taskset = ChainTaskset()
    for task in islice(taskset.train(1), 300):
        thought = taskset.think(task)
        num_operations = len(prompt_text(task).split()) - 1
        assert check_thought(thought, prompt_text(task)) == num_operations
        assert thought.endswith(f"={task.answer}")
        assert 2 <= num_operations <= 6


def test_short_thoughts_are_right_and_skip_a_fork():
    taskset = ChainTaskset(ChainConfig(short_compute_share=0.5))
    rng = random.Random(0)
    for task in islice(taskset.train(2), 300):
        message = taskset.trace(task, rng, share_full=0.0)
        num_operations = len(prompt_text(task).split()) - 1
        assert 1 <= check_thought(message.reasoning, prompt_text(task)) < num_operations
        assert message.reasoning.endswith(f"={task.answer}")
        assert message.content == task.answer


def test_share_full_is_the_share_of_full_thoughts():
    taskset, rng = ChainTaskset(), random.Random(0)
    tasks = list(islice(taskset.train(3), 2000))
    full = [
        taskset.trace(task, rng, share_full=0.3) == taskset.solution(task, rng) for task in tasks
    ]
    assert abs(sum(full) / len(full) - 0.3) < 0.04
    assert all(
        taskset.trace(task, rng, share_full=1.0).reasoning == taskset.think(task) for task in tasks
    )
    with pytest.raises(ValueError, match=r"share_full is 1\.5"):
        taskset.trace(tasks[0], rng, share_full=1.5)


def test_answers_are_uniform_so_chance_is_one_in_ten():
    tasks = list(islice(ChainTaskset().train(4), 10_000))
    counts = Counter(task.answer for task in tasks)
    assert set(counts) == set("0123456789")
    # Five standard deviations of a share of 10 % in 10,000 draws.
    assert all(abs(count / 10_000 - 0.1) < 0.015 for count in counts.values())
    assert majority_accuracy(tasks) < 0.115


def test_every_item_but_the_first_is_a_word():
    taskset = ChainTaskset()
    for task in islice(taskset.train(5), 300):
        first, *items = taskset.think(task).split(" ")
        assert first.isdigit() and len(first) == 1
        assert {f" {item}" for item in items} <= set(CHAIN_WORDS)
    assert len(CHAIN_WORDS) == len(set(CHAIN_WORDS)) == 33


def test_impossible_lengths_are_refused():
    with pytest.raises(ValueError, match="operations are 1 to 6"):
        ChainConfig(min_operations=1)
    with pytest.raises(ValueError, match="operations are 5 to 4"):
        ChainConfig(min_operations=5, max_operations=4)
