"""From rollouts to numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from openm1.envs.base import majority_accuracy
from openm1.types import Rollout

Z_95 = 1.959963984540054


class EvaluationError(RuntimeError):
    """Rollouts failed, so that there is no honest accuracy; the message carries the first error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskMetrics:
    """One family's result."""

    accuracy: float
    """pass@1: mean reward over the samples, which is 0 or 1 each."""
    accuracy_low: float
    """Lower end of the 95 % interval."""
    accuracy_high: float
    num_samples: int
    majority_accuracy: float
    """What always giving the commonest answer would score."""
    mean_reasoning_tokens: float
    mean_completion_tokens: float
    cut_share: float
    """Share of replies that ran into max_tokens."""


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, JASA 1927); unlike the normal one it holds near 0 and 1."""
    square = Z_95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    spread = math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    half = Z_95 * spread / (1 + square / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def task_metrics(rollouts: Sequence[Rollout]) -> TaskMetrics:
    """Raises EvaluationError if any rollout failed: a failure is not a wrong answer."""
    failed = [rollout.error for rollout in rollouts if rollout.error is not None]
    if failed:
        raise EvaluationError(f"{len(failed)} of {len(rollouts)} rollouts failed: {failed[0]}")
    count = len(rollouts)
    completions = [rollout.turns[-1].completion for rollout in rollouts]
    accuracy = sum(rollout.reward or 0.0 for rollout in rollouts) / count
    low, high = wilson_interval(accuracy, count)
    return TaskMetrics(
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        num_samples=count,
        majority_accuracy=majority_accuracy([rollout.task for rollout in rollouts]),
        mean_reasoning_tokens=sum(c.num_reasoning_tokens for c in completions) / count,
        mean_completion_tokens=sum(r.num_completion_tokens for r in rollouts) / count,
        cut_share=sum(c.finish_reason in ("length", "repetition") for c in completions) / count,
    )
