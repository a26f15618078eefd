"""Rollouts for a step: tasks drawn until enough of them have something to teach."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Any

from openm1.chat.template import ChatFormat
from openm1.envs.base import normalise_prompt, prompt_text, stable_hash
from openm1.envs.mixture import Mixture
from openm1.protocols import Policy, Taskset
from openm1.rl.batch import has_signal, pass_rate
from openm1.rl.config import RLConfig
from openm1.rollout.run import run_group
from openm1.types import RolloutGroup, SamplingParams, Task

MAX_RETIRED_DRAWS = 10_000
"""Retired prompts in a row after which the tasks are taken to be used up."""


class NoUsableRollouts(RuntimeError):
    """Every rollout of a step failed; the message carries the first error."""


class NoTasksLeft(RuntimeError):
    """Every task that is drawn has been retired."""


class TaskStream:
    """The tasks of a run one after another, without those that are learned for good.

    Its state is part of a checkpoint: where the stream stands, and which prompts are retired, as
    hashes of their words, since an endless stream comes upon the same prompt again.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.cursor = 0
        self.retired: set[int] = set()

    def draw(self, count: int) -> list[tuple[int, Taskset, Task]]:
        """The next tasks with their places in the mixture. Raises NoTasksLeft."""
        drawn: list[tuple[int, Taskset, Task]] = []
        skipped = 0
        while len(drawn) < count:
            taskset, task = self.mixture.task(self.cursor)
            if _prompt_hash(task) not in self.retired:
                drawn.append((self.cursor, taskset, task))
                skipped = 0
            elif (skipped := skipped + 1) > MAX_RETIRED_DRAWS:
                raise NoTasksLeft(
                    f"{len(self.retired)} prompts are retired, among them the last {skipped} drawn;"
                    " give more tasks, or a higher retire_pass_rate"
                )
            self.cursor += 1
        return drawn

    def retire(self, groups: Sequence[RolloutGroup], rate: float) -> None:
        """No longer draws the prompts that passed at `rate` or above."""
        passed = [group.task for group in groups if pass_rate(group) >= rate]
        self.retired.update(map(_prompt_hash, passed))

    def state(self) -> dict[str, Any]:
        return {"cursor": self.cursor, "retired": sorted(self.retired)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.cursor, self.retired = state["cursor"], set(state["retired"])


def _prompt_hash(task: Task) -> int:
    return stable_hash(f"{task.family}/{normalise_prompt(prompt_text(task))}")


async def collect(
    policy: Policy,
    chat_format: ChatFormat,
    tasks: TaskStream,
    config: RLConfig,
    *,
    step: int,
    window_tokens: int,
) -> list[RolloutGroup]:
    """All groups sampled for a step; `tasks` moves on.

    Dynamic sampling refills what had no signal, so that about `num_prompts` groups teach.
    """
    params = SamplingParams(
        max_tokens=window_tokens,
        temperature=config.temperature,
        repetition_stop_tokens=config.repetition_stop_tokens,
    )
    groups: list[RolloutGroup] = []
    missing = config.num_prompts
    for _ in range(1 + config.max_refills * config.dynamic_sampling):
        jobs = []
        for index, taskset, task in tasks.draw(missing):
            rng = Random(f"{config.seed}/{index}/sample")
            seeds = [rng.getrandbits(63) for _ in range(config.group_size)]
            jobs.append(run_group(policy, taskset, task, chat_format, params, seeds=seeds))
        new = await asyncio.gather(*jobs)
        groups += new
        if config.retire_pass_rate is not None:
            tasks.retire(new, config.retire_pass_rate)
        errors = [r.error for g in groups for r in g.rollouts if r.error is not None]
        if len(errors) == sum(len(g.rollouts) for g in groups):
            raise NoUsableRollouts(f"all {len(errors)} rollouts of step {step} failed: {errors[0]}")
        missing = config.num_prompts - sum(has_signal(group, config.batch) for group in groups)
        if missing <= 0:
            break
    return groups
