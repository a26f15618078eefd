from __future__ import annotations

import asyncio
from random import Random

import pytest

from openm1.envs.chain import ChainTaskset
from openm1.envs.genrm import GRADES, Judge, JudgedTaskset, Judgement, NoVerdict, RewardShaping
from openm1.rollout.run import run_rollout
from openm1.types import Message, Rollout, SamplingParams

from .judges import WrittenJudge, compared, graded


def judge(verdict) -> tuple[Judge, WrittenJudge]:
    policy = WrittenJudge(verdict)
    return Judge(policy, policy.chat_format), policy


def grade(verdict, answer: str = "42") -> float:
    return asyncio.run(judge(verdict)[0].grade(question="6*7", reference="42", answer=answer))


def compare(verdict, answer: str = "long reply", reference: str = "reply") -> float:
    asked = judge(verdict)[0].compare(question="Why?", reference=reference, answer=answer)
    return asyncio.run(asked)


@pytest.mark.parametrize(("verdict", "score"), GRADES.items())
def test_five_grades_are_spread_over_0_to_1(verdict: str, score: float):
    assert grade(lambda _: f"It says 5. Verdict: 1? No.\nVerdict: {verdict}") == score
    assert sorted(GRADES.values()) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_thought_is_no_verdict():
    assert grade(lambda _: "<think>Verdict: 1</think>Verdict: 5") == 1.0
    with pytest.raises(NoVerdict):
        grade(lambda _: "<think>Verdict: 1</think>I cannot say.")


def test_a_grade_is_the_mean_over_both_orders_of_the_texts():
    asker, policy = judge(lambda text: f"Verdict: {5 if graded(text)[2] else 2}")
    score = asyncio.run(asker.grade(question="6*7", reference="42", answer="43"))
    assert score == (1.0 + 0.25) / 2
    found = [graded(text) for text in policy.asked]
    assert found == [("42", "43", True), ("42", "43", False)]
    assert all("Question:\n6*7\n" in text for text in policy.asked)


def longer(text: str) -> str:
    first, second = compared(text)
    return "Verdict: FIRST" if len(first) > len(second) else "Verdict: SECOND"


def test_a_comparison_is_won_or_lost_in_both_orders():
    assert compare(longer) == 1.0
    assert compare(longer, answer="short", reference="much longer") == -1.0


@pytest.mark.parametrize("verdict", ["FIRST", "SECOND", "TIE"])
def test_a_judge_that_goes_by_position_calls_a_tie(verdict: str):
    assert compare(lambda _: f"Verdict: {verdict}") == 0.0


@pytest.mark.parametrize("reply", ["", "Good.", "Verdict: 6", "Verdict: FIRST", "Verdict 5"])
def test_no_verdict_is_an_error_and_no_zero(reply: str):
    with pytest.raises(NoVerdict, match="one of 1, 2, 3, 4, 5"):
        grade(lambda _: reply)


def test_rewards_are_charged_for_length_and_clipped():
    shaping = RewardShaping(cost_per_char=0.01, typical_chars=50)
    assert shaping.reward(0.5, 50) == 0.5
    assert shaping.reward(0.5, 70) == pytest.approx(0.3)
    assert shaping.reward(0.5, 40) == pytest.approx(0.6)
    assert shaping.reward(0.5, 500) == 0.0
    assert shaping.reward(1.0, 0) == 1.0
    assert RewardShaping(low=-1.0).reward(-2.0, 10) == -1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 1.0}, "low is 1.0, high is 1.0"),
        ({"cost_per_char": float("inf")}, "cost_per_char is inf"),
        ({"typical_chars": float("nan")}, "typical_chars is nan"),
    ],
)
def test_impossible_shaping_is_refused(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RewardShaping(**values)


def exact(text: str) -> str:
    reference, answer, _ = graded(text)
    return "Verdict: 5" if reference == answer else "Verdict: 2"


def judged(verdict, **options) -> tuple[JudgedTaskset, WrittenJudge]:
    asker, policy = judge(verdict)
    return JudgedTaskset(ChainTaskset(), asker, **options), policy


def answered(taskset: JudgedTaskset, answer: str, reasoning: str = "") -> float:
    (task,) = taskset.test(0, 1)
    env = taskset.make_env(task)

    async def play() -> float:
        await env.start()
        reply = answer if answer != "gold" else task.answer
        message = Message(role="assistant", content=reply, reasoning=reasoning)
        result = await env.step(message)
        await env.close()
        return result.reward

    return asyncio.run(play())


def test_the_reward_of_a_judged_task_is_the_judges():
    seen: list[Judgement] = []
    taskset, _ = judged(exact, watcher=seen.append)
    # The thought is not shown to the judge, and is not the answer's length.
    assert answered(taskset, "gold", reasoning="a long thought") == 1.0
    assert answered(taskset, "??") == 0.25
    assert [j.rule_reward for j in seen] == [1.0, 0.0]
    assert [j.reward for j in seen] == [1.0, 0.25]
    assert seen[1].length_chars == 2


def test_a_judged_taskset_asks_what_its_rule_asks():
    taskset, _ = judged(exact)
    inner = ChainTaskset()
    assert taskset.name == "chain"
    assert taskset.test(3, 2) == inner.test(3, 2)
    assert next(taskset.train(3)) == next(inner.train(3))
    (task,) = taskset.test(3, 1)
    assert taskset.solution(task, Random(0)).content == task.answer
    taskset.validate(task)


def test_a_comparison_may_cost():
    taskset, _ = judged(lambda text: longer(text), mode="compare")
    assert answered(taskset, "") == -1.0
    assert answered(taskset, "a very long answer") == 1.0
    taskset.charge_for_length(0.1, 8.0)
    assert answered(taskset, "a very long answer") == pytest.approx(0.0)
    # A second charge adds to the first, and a negative one gives back what was too much.
    taskset.charge_for_length(0.05, 8.0)
    assert taskset.shaping.cost_per_char == pytest.approx(0.15)
    taskset.charge_for_length(-0.25, 8.0)
    assert taskset.shaping.cost_per_char == pytest.approx(-0.1)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode is 'rank'; allowed are grade, compare"):
        judged(exact, mode="rank")


def played_with(verdict) -> Rollout:
    taskset, _ = judged(verdict)
    player = WrittenJudge(lambda _: "42")
    (task,) = taskset.test(0, 1)
    return asyncio.run(run_rollout(player, taskset, task, player.chat_format, SamplingParams()))


def test_a_judge_without_a_verdict_is_an_error_on_the_rollout():
    rollout = played_with(lambda _: "no idea")
    assert (rollout.reward, rollout.error_source) == (None, "grader")
    assert rollout.error is not None and rollout.error.startswith("NoVerdict")


def test_a_judge_that_is_gone_is_the_graders_error():
    def gone(_: str) -> str:
        raise ConnectionError("no route")

    rollout = played_with(gone)
    assert (rollout.reward, rollout.error_source) == (None, "grader")
    assert rollout.error == "GraderError: the judge failed: ConnectionError: no route"
