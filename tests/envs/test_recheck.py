"""Recheck: chains are followed here by hand, through the taskset's own tables."""

import asyncio
from itertools import islice
from random import Random

import pytest

from openm1.envs.base import prompt_text
from openm1.envs.recheck import RECHECKS, SKIP, RecheckConfig, RecheckTaskset
from openm1.types import Message, Task


def play(taskset: RecheckTaskset, task: Task, replies: list[str]) -> tuple[float, list[str]]:
    """The reward, and what the environment asked turn by turn."""

    async def whole() -> tuple[float, list[str]]:
        env = taskset.make_env(task)
        asked = [(await env.start())[-1].content]
        for number, reply in enumerate(replies):
            result = await env.step(Message(role="assistant", content=reply))
            assert result.done == (number == len(replies) - 1)
            asked += [message.content for message in result.messages]
        await env.close()
        return result.reward, asked

    return asyncio.run(whole())


@pytest.fixture
def taskset() -> RecheckTaskset:
    return RecheckTaskset(RecheckConfig(num_kinds=2))


def test_the_tables_are_permutations(taskset):
    assert len(taskset.tables) == 16
    assert len(set(taskset.tables.values())) == 16
    for table in taskset.tables.values():
        assert sorted(table) == list("abcdefghijklmnop")


def test_values_follow_the_operations(taskset):
    lengths = set()
    for task in islice(taskset.train(0), 200):
        operations, value = prompt_text(task).split()
        for operation, expected in zip(operations, task.answer, strict=True):
            value = taskset.tables[operation]["abcdefghijklmnop".index(value)]
            assert value == expected
        lengths.add(len(operations))
    assert lengths == {3, 4, 5, 6}


def test_checking_every_turn_is_right_and_the_wrong_mark_checks_nothing(taskset):
    for task in islice(taskset.train(1), 50):
        right = taskset.think(task).split()
        assert play(taskset, task, right)[0] == 1.0
        wrong = [RECHECKS[1 - RECHECKS.index(mark)] + value for mark, value in right]
        reward, asked = play(taskset, task, wrong)
        # The hints stood: right only if all of them were.
        hints = "".join(question[1] for question in asked)
        assert reward == float(hints == task.answer)


def test_a_skipped_hint_becomes_the_value_that_the_next_hint_goes_by():
    taskset = RecheckTaskset(RecheckConfig(hint_right=1.0))
    for task in islice(taskset.train(2), 20):
        reward, asked = play(taskset, task, [SKIP] * len(task.answer))
        assert reward == 1.0
        assert "".join(question[1] for question in asked) == task.answer
    # A wrong value of one's own is what a right hint then follows from.
    first, *rest = taskset.think(task).split()
    off = first[0] + ("a" if first[1] != "a" else "b")
    reward, asked = play(taskset, task, [off] + [SKIP] * len(rest))
    assert reward == 0.0
    assert asked[1][1] == taskset.apply(asked[1][0], off[1])


def test_hints_are_right_as_often_as_said_and_differ_between_plays(taskset):
    task = next(taskset.train(3))
    played = []
    for _ in range(600):
        _, asked = play(taskset, task, taskset.think(task).split())
        played.append("".join(question[1] for question in asked))
    right = sum(h == v for hints in played for h, v in zip(hints, task.answer, strict=True))
    count = 600 * len(task.answer)
    # Four standard deviations.
    assert abs(right / count - 0.7) < 4 * (0.21 / count) ** 0.5
    assert len(set(played)) > 10
    again = RecheckTaskset(taskset.config)
    assert "".join(q[1] for q in play(again, task, again.think(task).split())[1]) == played[0]


def test_a_reply_that_is_no_symbol_ends_the_chain_as_wrong(taskset):
    task = next(taskset.train(4))
    mark = taskset.config.recheck(prompt_text(task)[0])
    assert play(taskset, task, [mark + "Z"])[0] == 0.0
    assert play(taskset, task, [mark])[0] == 0.0


def test_a_chain_that_has_ended_takes_no_reply(taskset):
    async def once_too_often() -> None:
        task = next(taskset.train(5))
        env = taskset.make_env(task)
        await env.start()
        for reply in [*taskset.think(task).split(), SKIP]:
            await env.step(Message(role="assistant", content=reply))

    with pytest.raises(ValueError, match="ended already"):
        asyncio.run(once_too_often())


def test_the_taskset_checks_itself(taskset):
    for task in taskset.test(0, 20):
        taskset.validate(task)
    assert taskset.hint(Random(0), "Z", "a") in taskset.config.symbols


@pytest.mark.parametrize(
    "settings",
    [{"num_symbols": 27}, {"num_kinds": 9}, {"min_turns": 0}, {"hint_right": 1.5},
     {"operations_per_kind": 37}],
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RecheckConfig(**settings)
