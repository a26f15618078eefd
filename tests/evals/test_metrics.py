from __future__ import annotations

import math

import pytest

from openm1.evals.metrics import EvaluationError, task_metrics, wilson_interval
from openm1.types import Completion, Message, Rollout, Task, Turn

Z = 1.959963984540054


def rollout(
    answer: str, reward: float | None, thought: int, length: int, *, cut: bool = False
) -> Rollout:
    completion = Completion(
        token_ids=(1,) * length,
        logprobs=(0.0,) * length,
        num_reasoning_tokens=thought,
        finish_reason="length" if cut else "stop",
    )
    task = Task(family="any", prompt=(Message(role="user", content="?"),), answer=answer)
    error = "OSError: broken" if reward is None else None
    turns = (Turn(prompt_ids=(1,), completion=completion),)
    return Rollout(task=task, turns=turns, reward=reward, error=error)


def test_a_family_in_numbers():
    metrics = task_metrics(
        [
            rollout("1", 1.0, 4, 10),
            rollout("1", 0.0, 0, 2),
            rollout("1", 1.0, 2, 8, cut=True),
            rollout("2", 1.0, 2, 4),
        ]
    )
    assert metrics.accuracy == 0.75
    assert metrics.num_samples == 4
    assert metrics.majority_accuracy == 0.75
    assert metrics.mean_reasoning_tokens == 2.0
    assert metrics.mean_completion_tokens == 6.0
    assert metrics.cut_share == 0.25
    assert (metrics.accuracy_low, metrics.accuracy_high) == wilson_interval(0.75, 4)


def test_failed_rollouts_make_no_accuracy():
    rollouts = [rollout("1", 1.0, 0, 1), rollout("1", None, 0, 1)]
    with pytest.raises(EvaluationError, match="1 of 2 rollouts failed: OSError: broken"):
        task_metrics(rollouts)


@pytest.mark.parametrize("count", [1, 7, 50, 400])
def test_the_interval_ends_where_the_share_is_two_deviations_away(count: int):
    # The definition: the p for which |share - p| is z standard deviations of a share under p.
    for right in {0, 1, count // 3, count - 1, count}:
        share = right / count
        low, high = wilson_interval(share, count)
        assert 0 <= low <= share + 1e-12
        assert share - 1e-12 <= high <= 1
        for end in (low, high):
            # Squared, as a root would blow up the rounding of an end at 0 or 1.
            assert (share - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / count, abs=1e-12)


@pytest.mark.parametrize("truth", [0.02, 0.1, 0.5, 0.9, 0.98])
def test_the_interval_holds_the_truth_about_19_times_in_20(truth: float):
    count, covered = 200, 0.0
    for right in range(count + 1):
        low, high = wilson_interval(right / count, count)
        if low <= truth <= high:
            covered += math.comb(count, right) * truth**right * (1 - truth) ** (count - right)
    assert 0.92 < covered < 0.98
