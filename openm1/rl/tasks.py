"""The tasks of a run one after another, without those that are learned for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openm1.common.errors import RunStopped
from openm1.envs.base import normalise_prompt, prompt_text, stable_hash
from openm1.envs.mixture import Mixture
from openm1.protocols import Taskset
from openm1.rl.batch import pass_rate
from openm1.types import RolloutGroup, Task

MAX_RETIRED_DRAWS = 10_000
"""Retired prompts in a row after which the tasks are taken to be used up."""


class NoTasksLeft(RunStopped):
    """Every task that is drawn has been retired."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A task and where it came from."""

    index: int
    """Its place in the stream."""
    taskset: Taskset
    task: Task


class TaskStream:
    """Its state is part of a checkpoint: where the stream stands, what the mixture remembers, and
    which prompts are retired, as hashes of their words, since an endless stream comes upon the same
    prompt again.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.cursor = 0
        self.retired: set[int] = set()

    def draw(self, count: int) -> list[Drawn]:
        """Raises NoTasksLeft."""
        drawn: list[Drawn] = []
        skipped = 0
        while len(drawn) < count:
            taskset, task = self.mixture.task(self.cursor)
            if _prompt_hash(task) not in self.retired:
                drawn.append(Drawn(index=self.cursor, taskset=taskset, task=task))
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

    def begin_step(self, step: int) -> None:
        """What is drawn from now on is for that step or a later one."""
        self.mixture.begin_step(step)

    def observe(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Tells the mixture how a step's tasks were passed; returns its metrics."""
        for group in groups:
            if any(rollout.error is None for rollout in group.rollouts):
                self.mixture.observe(group.task, pass_rate(group))
        return self.mixture.metrics()

    def state(self) -> dict[str, Any]:
        return {
            "cursor": self.cursor,
            "retired": sorted(self.retired),
            "mixture": self.mixture.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.cursor, self.retired = state["cursor"], set(state["retired"])
        self.mixture.load_state(state["mixture"])


def _prompt_hash(task: Task) -> int:
    return stable_hash(f"{task.family}/{normalise_prompt(prompt_text(task))}")
