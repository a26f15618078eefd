from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy
import pytest

from openm1.envs.genrm import Judge, JudgedTaskset, Judgement
from openm1.envs.mixture import Mixture
from openm1.model.m1 import M1ForCausalLM
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.rl.config import RLConfig
from openm1.rl.length_bias import (
    LengthBias,
    LengthBiasConfig,
    LengthBiasMonitor,
    length_bias,
)
from openm1.rl.loop import train_rl
from openm1.train.checkpoint import RunFolder
from openm1.types import Message, Task
from tests.envs.judges import WrittenJudge, graded

from .play import TINY, OneDigit, WrittenPolicy, nano_format

NUM_STEPS = 20
FILLER = " indeed"


class WordyDigit(OneDigit):
    """7 is right, however many words follow."""

    def grade(self, task: Task, answer: str) -> float:
        return float(answer.split()[0] == task.answer)


def pays_for_brevity(answer: str, noise: Random) -> int:
    return (3 if answer[0] == "7" else 1) + max(0, 2 - answer.count(FILLER) // 3)


def fair(answer: str, noise: Random) -> int:
    """Goes by what is right, and is a grade off now and then."""
    return (5 if answer[0] == "7" else 1) + (noise.random() < 0.3) * (-1 if answer[0] == "7" else 1)


def pays_for_length(answer: str, noise: Random) -> int:
    """The planted one: up to two grades for more words, whether right or wrong."""
    return (3 if answer[0] == "7" else 1) + min(2, answer.count(FILLER) // 3)


class Run:
    """A policy that writes right answers at more length than wrong ones, judged step by step."""

    def __init__(
        self, verdict: Callable[[str, Random], int], config: LengthBiasConfig | None = None
    ) -> None:
        self.rng, noise = Random(0), Random(1)
        policy = WrittenJudge(lambda text: f"Verdict: {verdict(graded(text)[1], noise)}")
        self.alarms: list[tuple[int, LengthBias]] = []
        self.monitor = LengthBiasMonitor(config or LengthBiasConfig(), self.recalibrate)
        judge = Judge(policy, policy.chat_format)
        self.taskset = JudgedTaskset(WordyDigit(), judge, watcher=self.monitor.observe)
        self.step = 0

    def recalibrate(self, bias: LengthBias) -> None:
        self.alarms.append((self.step, bias))
        self.taskset.charge_for_length(bias.reward_per_char, bias.mean_chars)

    def reply(self) -> str:
        right = self.rng.random() < 0.5
        words = self.rng.randrange(3, 9) if right else self.rng.randrange(0, 6)
        return ("7" if right else "4") + FILLER * words

    async def play(self) -> list[LengthBias]:
        found = []
        tasks = self.taskset.train(0)
        for self.step in range(1, NUM_STEPS + 1):
            for task in (next(tasks) for _ in range(4)):
                for _ in range(8):
                    env = self.taskset.make_env(task)
                    await env.start()
                    await env.step(Message(role="assistant", content=self.reply()))
            found.append(self.monitor.end_step())
        return found


@pytest.mark.parametrize(("verdict", "sign"), [(pays_for_length, 1), (pays_for_brevity, -1)])
def test_a_judge_that_pays_for_length_is_caught_within_20_steps_and_set_right(verdict, sign: int):
    run = Run(verdict)
    found = asyncio.run(run.play())
    ((step, bias),) = run.alarms
    assert step < NUM_STEPS
    assert sign * bias.correlation > 0.5
    assert sign * bias.reward_per_char > 0
    # By the end as many steps have been seen under the new rewards as raised the alarm.
    assert step + LengthBiasConfig().horizon_steps <= NUM_STEPS
    assert abs(found[-1].correlation) < LengthBiasConfig().alarm_correlation


def test_a_fair_judge_raises_no_alarm_though_long_answers_earn_more():
    run = Run(fair)
    watched: list[Judgement] = []
    observe = run.monitor.observe
    run.taskset.watcher = lambda judgement: (watched.append(judgement), observe(judgement))
    asyncio.run(run.play())
    assert run.alarms == []
    lengths = [judgement.length_chars for judgement in watched]
    rewards = [judgement.reward for judgement in watched]
    assert numpy.corrcoef(lengths, rewards)[0, 1] > 0.4


def judgement(length: int, reward: float, *, rule: float = 1.0, question: str = "?") -> Judgement:
    return Judgement(question=question, reward=reward, rule_reward=rule, length_chars=length)


def test_correlation_and_slope_are_within_groups():
    # Each group has its own level of reward and length; within, reward rises by 0.01 a character.
    groups = [("a", 1.0, 10, 0.9), ("a", 0.0, 200, 0.1), ("b", 1.0, 50, 0.5)]
    noise = Random(0)
    step = [
        judgement(
            start + extra,
            level + 0.01 * extra + noise.gauss(0, 0.01),
            rule=rule,
            question=question,
        )
        for question, rule, start, level in groups
        for extra in range(0, 30, 3)
    ]
    bias = length_bias([step])
    assert bias.reward_per_char == pytest.approx(0.01, rel=0.1)
    centred = numpy.array([[j.length_chars, j.reward] for j in step]).reshape(3, 10, 2)
    centred = (centred - centred.mean(1, keepdims=True)).reshape(30, 2)
    expected = float(numpy.corrcoef(centred.T)[0, 1])
    assert bias.correlation == pytest.approx(expected)
    # 30 judgements lose three degrees of freedom to the means and two to the transform.
    assert bias.deviations == pytest.approx(math.atanh(expected) * math.sqrt(25))
    assert bias.metrics()["genrm/length_corr"] == bias.correlation
    assert bias.mean_chars == pytest.approx(sum(j.length_chars for j in step) / 30)


def test_the_same_question_in_two_steps_is_two_groups():
    # Between the steps the policy got longer and the judge kinder; within them nothing goes on.
    steps = [[judgement(10, 0.2), judgement(12, 0.2)], [judgement(90, 0.8), judgement(92, 0.8)]]
    assert length_bias(steps).correlation == 0.0


def test_nothing_to_compare_is_no_bias():
    for step in ([], [judgement(10, 1.0)], [judgement(10, 1.0), judgement(10, 0.0)]):
        bias = length_bias([step])
        assert (bias.correlation, bias.deviations) == (0.0, 0.0)


def test_two_judgements_are_too_few_and_an_alarm_forgets():
    alarms: list[LengthBias] = []
    monitor = LengthBiasMonitor(LengthBiasConfig(horizon_steps=1), alarms.append)
    for length in range(10, 50, 4):
        monitor.observe(judgement(length, length / 100))
    assert monitor.end_step().correlation == pytest.approx(1.0)
    assert len(alarms) == 1
    monitor.observe(judgement(10, 0.2))
    monitor.observe(judgement(20, 0.4))
    bias = monitor.end_step()
    assert bias.correlation == pytest.approx(1.0) and bias.deviations == 0.0
    assert len(alarms) == monitor.num_alarms == 1


def test_a_training_run_is_watched_step_by_step(tmp_path: Path):
    run = Run(pays_for_length, LengthBiasConfig(horizon_steps=2))
    policy = WrittenPolicy(lambda _, seed: "74"[seed % 2] + FILLER * (seed % 7))
    config = RLConfig(
        num_steps=3,
        num_prompts=6,
        group_size=8,
        max_refills=0,
        max_response_tokens=100,
        retire_pass_rate=None,
    )
    seen: list[LengthBias] = []
    model = M1ForCausalLM(TINY.config(nano_tokenizer()))
    folder = RunFolder.open(tmp_path, config)
    asyncio.run(
        train_rl(
            model,
            nano_format(),
            Mixture([run.taskset]),
            policy,
            policy,
            config,
            folder,
            on_step=lambda step, metrics: seen.append(run.monitor.end_step()),
        )
    )
    assert len(seen) == config.num_steps
    assert run.alarms and run.taskset.shaping.cost_per_char > 0
    # The judge's verdicts are the rewards that the run learns from.
    lines = (tmp_path / "rollouts" / "step-000000.jsonl").read_text().splitlines()
    rewards = {json.loads(line)["reward"] for line in lines}
    assert rewards == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_there_is_no_alarm_before_the_horizon_is_full():
    monitor = LengthBiasMonitor(LengthBiasConfig(horizon_steps=3), lambda _: None)
    for alarms in (0, 0, 1, 1, 1, 2):
        for length in range(10, 50, 4):
            monitor.observe(judgement(length, length / 100))
        monitor.end_step()
        assert monitor.num_alarms == alarms


def test_old_steps_are_forgotten():
    monitor = LengthBiasMonitor(LengthBiasConfig(horizon_steps=2), lambda _: None)
    for reward in (0.2, 0.9):
        monitor.observe(judgement(int(reward * 100), reward))
    assert monitor.end_step().correlation == pytest.approx(1.0)
    assert monitor.end_step().correlation == pytest.approx(1.0)
    assert monitor.end_step().correlation == 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("horizon_steps", 0), ("alarm_correlation", 1.0), ("alarm_deviations", 0.0)],
)
def test_impossible_thresholds_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name} is {value}; allowed"):
        LengthBiasConfig(**{name: value})
