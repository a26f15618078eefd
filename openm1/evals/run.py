"""Held-out tasks through any `Policy`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from openm1.chat.template import ChatFormat
from openm1.envs.catalog import make_taskset
from openm1.evals.metrics import TaskMetrics, task_metrics
from openm1.protocols import Policy, Taskset
from openm1.rollout.run import run_group
from openm1.types import Rollout, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """What is asked and how it is sampled; greedy by default."""

    tasks: tuple[str, ...]
    num_samples: int = 100
    """Distinct held-out prompts per family."""
    seed: int = 0
    max_tokens: int = 1024
    temperature: float = 0.0
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty; name at least one family")
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; allowed is at least 1")

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            thinking_budget=self.thinking_budget,
        )


def evaluate(policy: Policy, chat_format: ChatFormat, config: EvalConfig) -> dict[str, TaskMetrics]:
    """Metrics by family. Raises EvaluationError when rollouts failed."""
    tasksets = {name: make_taskset(name) for name in config.tasks}
    return {
        name: evaluate_taskset(policy, chat_format, taskset, config)
        for name, taskset in tasksets.items()
    }


def evaluate_taskset(
    policy: Policy, chat_format: ChatFormat, taskset: Taskset, config: EvalConfig
) -> TaskMetrics:
    """One taskset, whatever `config.tasks` says. Raises EvaluationError when rollouts failed."""
    return task_metrics(asyncio.run(play(policy, chat_format, taskset, config)))


async def play(
    policy: Policy, chat_format: ChatFormat, taskset: Taskset, config: EvalConfig
) -> Sequence[Rollout]:
    """One rollout for each of the held-out tasks that `config.seed` picks."""
    tasks = taskset.test(config.seed, config.num_samples)
    groups = await asyncio.gather(
        *(
            run_group(policy, taskset, task, chat_format, config.params, seeds=[config.seed + i])
            for i, task in enumerate(tasks)
        )
    )
    return [group.rollouts[0] for group in groups]
