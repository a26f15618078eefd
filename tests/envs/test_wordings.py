"""Other words, the honest no, and the calculator."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from itertools import islice
from random import Random

import pytest

from openm1.envs.base import prompt_text
from openm1.envs.calculator import (
    CALCULATOR,
    CalculatorTaskset,
    calculate,
    calculator_conversation,
    draw_expression,
)
from openm1.envs.catalog import make_taskset
from openm1.envs.unknown import DONT_KNOW, GREETING, UnknownTaskset
from openm1.envs.wordings import WORDINGS, reword
from openm1.types import Message, StepResult, Task, ToolCall


@pytest.mark.parametrize("family", WORDINGS)
def test_a_question_keeps_its_numbers_and_its_answer_in_other_words(family: str):
    rng = Random(0)
    texts = set()
    for task in make_taskset(family).test(0, 40):
        other = reword(task, rng)
        assert other.answer == task.answer and other.metadata == task.metadata
        texts.add(prompt_text(other))
        if family in ("count_bits", "gcd", "lcm", "prime_factorization", "chain_sum", "products"):
            numbers = re.findall(r"\d+", prompt_text(task).split("Write")[0])
            asked = re.findall(r"\d+", prompt_text(other))
            # "how many 1 bits" brings a number of its own.
            assert set(numbers) - {"1"} <= set(asked)
    assert len(texts) == 40


@pytest.mark.parametrize("family", WORDINGS)
def test_each_family_has_five_wordings_at_least(family: str):
    # One task, many draws: what is left after case, opening and closing words are taken off.
    task = make_taskset(family).test(0, 3)[0]
    rng = Random(1)
    texts = {WORDINGS[family](task, rng) for _ in range(300)}
    least = 1 if family == "aiw" else 5
    assert len(texts) >= least


def test_the_siblings_question_has_other_words_and_the_longer_ones_keep_theirs():
    rng = Random(2)
    counts = Counter(
        prompt_text(reword(task, rng)).lower().find(prompt_text(task).lower()) >= 0
        for task in make_taskset("aiw").test(0, 200)
    )
    assert counts[True] > 20 and counts[False] > 20


def test_a_family_without_other_words_is_refused():
    task = UnknownTaskset().test(0, 1)[0]
    with pytest.raises(ValueError, match="no other words for 'unknown'; there are chain"):
        reword(task, Random(0))


def test_what_is_unknown_is_said_so_and_a_greeting_greets():
    tasks = UnknownTaskset().test(0, 200)
    answers = Counter(task.answer for task in tasks)
    assert set(answers) == {DONT_KNOW, GREETING} and answers[DONT_KNOW] > answers[GREETING] > 5
    for task in tasks[:20]:
        UnknownTaskset().validate(task)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12+3", "15"),
        ("2*(3-10)", "-14"),
        ("7/2", "3.5"),
        ("8/2", "4"),
        ("-3+1", "-2"),
        ("7%4", "3"),
    ],
)
def test_the_calculator_calculates(expression: str, value: str):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["__import__('os')", "1+", "2**9", "a+1", "1/0", "'a'*3", "9" * 300, "True + 1j", "[1]"],
)
def test_the_calculator_refuses_what_is_no_arithmetic(expression: str):
    with pytest.raises(ValueError, match=r"expression|evaluate"):
        calculate(expression)


def test_a_calculator_conversation_is_a_call_its_result_and_the_answer():
    rng = Random(3)
    for _ in range(50):
        (question, call, result, answer), (tool,) = calculator_conversation(rng)
        assert tool.name == CALCULATOR.name and tool.parameters == CALCULATOR.parameters
        assert question.role == "user" and [call.role, answer.role] == ["assistant"] * 2
        expression = re.search(r'"expression": "([^"]+)"', call.tool_calls[0].arguments)
        assert expression is not None
        assert result.content == answer.content == calculate(expression[1])
    assert all(2 <= len(re.findall(r"\d+", draw_expression(rng))) <= 4 for _ in range(50))


def play(replies: list[Message]) -> list[StepResult]:
    taskset = CalculatorTaskset()
    task = Task(
        family="calculator",
        prompt=(Message(role="user", content="calculate 12*34"),),
        answer="408",
    )

    async def steps() -> list[StepResult]:
        env = taskset.make_env(task)
        await env.start()
        return [await env.step(reply) for reply in replies]

    return asyncio.run(steps())


def calling(arguments: str, name: str = "calculator") -> Message:
    call = ToolCall(name=name, arguments=arguments, id="call_0")
    return Message(role="assistant", tool_calls=(call,))


def test_the_calculator_answers_calls_until_the_model_answers():
    called, answered = play(
        [calling('{"expression": "12*34"}'), Message(role="assistant", content="408")]
    )
    assert not called.done and called.messages[0].content == "408"
    assert called.messages[0].name == "calculator"
    assert answered.done and answered.reward == 1.0
    assert play([Message(role="assistant", content="400")])[0].reward == 0.0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [('{"expression": "1/0"}', "calculator"), ("{}", "calculator"), ('{"expression": "1"}', "sum")],
)
def test_a_bad_call_is_told_so_and_the_question_stays_open(arguments: str, name: str):
    (result,) = play([calling(arguments, name)])
    assert not result.done and result.messages[0].content.startswith("error: ")


def test_a_question_in_other_words_is_a_taskset_by_name():
    words, plain = make_taskset("gcd:words"), make_taskset("gcd")
    for own, other in zip(plain.test(3, 10), words.test(3, 10), strict=True):
        assert own.answer == other.answer and prompt_text(own) != prompt_text(other)
    assert [t.answer for t in islice(words.train(0), 5)] == [
        t.answer for t in islice(plain.train(0), 5)
    ]
    assert words.name == "gcd:words"
    with pytest.raises(ValueError, match="gcd:words has no worked thoughts"):
        words.solution(words.test(0, 1)[0], Random(0))
    with pytest.raises(ValueError, match="taskset is 'unknown:words'; allowed are"):
        make_taskset("unknown:words")
