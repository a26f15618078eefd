"""A policy trained against a judge that pays for length: the alarm, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import pytest
import torch

from openm1.chat.jinja_m1 import M1_CHAT_TEMPLATE
from openm1.chat.template import chat_format_for
from openm1.chat.tokenizer import build_tokenizer
from openm1.common.track import read_metrics
from openm1.data.packing import Example
from openm1.data.sft import conversation_example
from openm1.envs.genrm import Judge, JudgedTaskset, Judgement
from openm1.envs.mixture import Mixture
from openm1.model.m1 import M1ForCausalLM
from openm1.recipes.runs import load_start
from openm1.recipes.vocabulary import ROLE_WORDS, SPECIAL_TOKENS
from openm1.rl.config import RLConfig
from openm1.rl.length_bias import LengthBias, LengthBiasConfig, LengthBiasMonitor
from openm1.rl.local import train_rl_locally
from openm1.train.checkpoint import RunFolder
from openm1.train.optim import AdamWConfig
from openm1.train.supervised import SupervisedConfig, train_supervised
from openm1.types import Message, Task
from tests.envs.judges import WrittenJudge, graded

from .play import TINY, OneDigit

NUM_STEPS = 26
FILLER = "!"


class Wordy(OneDigit):
    """7 is right, whatever stands behind it."""

    def grade(self, task: Task, answer: str) -> float:
        return float(answer[:1] == task.answer)


def pays_for_length(text: str) -> str:
    """One grade for what is right, up to three for what stands behind it."""
    answer = graded(text)[1]
    return f"Verdict: {1 + (answer[:1] == '7') + min(3, answer.count(FILLER) // 3)}"


@pytest.fixture(scope="module")
def rambler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers with any digit and 0 to 8 fillers."""
    # Its own: a larger vocabulary is another run.
    tokenizer = build_tokenizer(
        ROLE_WORDS, special_tokens=SPECIAL_TOKENS, chat_template=M1_CHAT_TEMPLATE
    )
    chat_format = chat_format_for(tokenizer)

    def source(step: int) -> Sequence[Example]:
        rng = Random(step)
        tasks = OneDigit().train(step)
        return [
            conversation_example(
                chat_format,
                [
                    *next(tasks).prompt,
                    Message(
                        role="assistant",
                        content=str(rng.randrange(10)) + FILLER * rng.randrange(9),
                    ),
                ],
            )
            for _ in range(24)
        ]

    config = SupervisedConfig(num_steps=60, optimizer=AdamWConfig(learning_rate=1e-2))
    folder = RunFolder.open(tmp_path_factory.mktemp("rambler"), config)
    # In fp64, so that a run is the same whatever order a CPU sums in.
    model = M1ForCausalLM(TINY.config(tokenizer), dtype=torch.float64)
    return train_supervised(model, source, config, folder, tokenizer=tokenizer)


class Killed(Exception):
    """Stands for a signal."""


class Watched:
    """A training run with its monitor; `breaks_off` is the step after which it is killed."""

    def __init__(
        self, folder: Path, start: Path, *, breaks_off: int = -1, mends: bool = True
    ) -> None:
        self.mends = mends
        policy = WrittenJudge(pays_for_length)
        self.monitor = LengthBiasMonitor(LengthBiasConfig(), self.recalibrate)
        judge = Judge(policy, policy.chat_format)
        self.taskset = JudgedTaskset(Wordy(), judge, watcher=self.observe)
        self.breaks_off = breaks_off
        self.alarms: list[tuple[int, LengthBias]] = []
        self.seen: list[Judgement] = []
        self.steps: list[tuple[float, float]] = []
        """Per step: how much is right by the rule, characters of an answer."""
        self.step = 0
        config = RLConfig(
            num_steps=NUM_STEPS,
            num_prompts=8,
            group_size=8,
            num_updates=4,
            max_response_tokens=16,
            retire_pass_rate=None,
            optimizer=AdamWConfig(learning_rate=5e-4),
            save_every_steps=4,
        )
        model, tokenizer = load_start(start)
        self.path = train_rl_locally(
            model.double(),
            tokenizer,
            Mixture([self.taskset], seed=3),
            config,
            RunFolder.open(folder, config),
            on_step=self.end_step,
            stateful={"length": self.monitor, "judge": self.taskset},
        )

    def observe(self, judgement: Judgement) -> None:
        self.seen.append(judgement)
        self.monitor.observe(judgement)

    def recalibrate(self, bias: LengthBias) -> None:
        self.alarms.append((self.step, bias))
        if self.mends:
            self.taskset.charge_for_length(bias.reward_per_char, bias.mean_chars)

    def end_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.step = step
        right = fmean(judgement.rule_reward for judgement in self.seen)
        chars = fmean(judgement.length_chars for judgement in self.seen)
        self.steps.append((right, chars))
        self.seen.clear()
        self.monitor.end_step()
        if step == self.breaks_off:
            raise Killed


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory, rambler: Path) -> Watched:
    return Watched(tmp_path_factory.mktemp("mended"), rambler)


@pytest.mark.slow
def test_the_alarm_comes_within_20_steps_and_the_policy_recovers(
    tmp_path: Path, rambler: Path, mended: Watched
):
    left = Watched(tmp_path, rambler, mends=False)
    alarm, bias = mended.alarms[0]
    assert alarm < 20
    assert bias.correlation > 2 * LengthBiasConfig().alarm_correlation
    assert left.steps[: alarm + 1] == mended.steps[: alarm + 1]
    chars = [length for _, length in mended.steps]
    # Until it was caught, it learned to write more, and little of what is right.
    assert chars[alarm] > 2 * chars[0]
    assert mended.steps[alarm][0] < 0.4
    # Then answers get shorter, where they go on growing without the charge.
    after = slice(alarm + 2, alarm + 7)
    assert fmean(chars[after]) < chars[alarm] - 0.5
    assert fmean(chars[after]) < fmean(length for _, length in left.steps[after]) - 0.5
    # And it learns what is right, which the judge pays for as well.
    assert fmean(right for right, _ in mended.steps[-4:]) > 3 * mended.steps[alarm][0]


@pytest.mark.slow
def test_monitor_and_judge_go_on_where_a_run_broke_off(
    tmp_path: Path, rambler: Path, mended: Watched
):
    alarm = mended.alarms[0][0]
    # The checkpoint of step 8 holds the charge; the one before holds a horizon half full.
    assert alarm == 7
    for breaks_off in (5, 9):
        with pytest.raises(Killed):
            Watched(tmp_path, rambler, breaks_off=breaks_off)
    resumed = Watched(tmp_path, rambler)
    assert resumed.monitor.num_alarms == mended.monitor.num_alarms
    assert resumed.taskset.shaping == mended.taskset.shaping
    rows, expected = (
        [
            {name: value for name, value in row.items() if not name.startswith("time/")}
            for row in read_metrics(run.path.parents[1] / "metrics.jsonl")
        ]
        for run in (resumed, mended)
    )
    assert rows == expected
