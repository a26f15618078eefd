from __future__ import annotations

import math

import numpy
import pytest
import torch

from openm1.rl.monitor import agreement_metrics, rollout_metrics
from openm1.types import Completion, Message, Rollout, RolloutGroup, Task, Turn

TASK = Task(family="any", prompt=(Message(role="user", content="?"),), answer="!")


def rollout(reward: float | None, length: int, *, cut: bool = False) -> Rollout:
    completion = Completion(
        token_ids=(5,) * length,
        logprobs=(-math.log(2),) * length,
        finish_reason="length" if cut else "stop",
    )
    error = "broken" if reward is None else None
    turns = (Turn(prompt_ids=(1,), completion=completion),)
    source = None if error is None else "env"
    return Rollout(task=TASK, turns=turns, reward=reward, error=error, error_source=source)


def test_failed_rollouts_count_as_errors_and_nothing_else():
    groups = [
        RolloutGroup(task=TASK, rollouts=[rollout(1.0, 10), rollout(None, 900)]),
        RolloutGroup(task=TASK, rollouts=[rollout(0.0, 20, cut=True), rollout(0.5, 30)]),
    ]
    assert rollout_metrics(groups) == pytest.approx(
        {
            "rollout/reward": 0.5,
            "rollout/accuracy": 1 / 3,
            "rollout/length_mean_tokens": 20.0,
            "rollout/length_p99_tokens": 29.8,
            "rollout/longest_reply_p99_tokens": 29.8,
            "rollout/perplexity": 2.0,
            "rollout/truncated_share": 1 / 3,
            "rollout/repetition_share": 0.0,
            "rollout/error_share": 0.25,
            "errors/env": 1,
        }
    )


def test_forced_tokens_are_not_in_the_perplexity():
    completion = Completion(
        token_ids=(5, 6, 7),
        logprobs=(-1.0, -9.0, -3.0),
        forced=(False, True, False),
        finish_reason="repetition",
    )
    turns = [Turn(prompt_ids=(1,), completion=completion)]
    turns.append(Turn(prompt_ids=(1, 5, 6, 7, 2), completion=completion))
    played = Rollout(task=TASK, turns=tuple(turns), reward=1.0)
    metrics = rollout_metrics([RolloutGroup(task=TASK, rollouts=[played])])
    assert metrics["rollout/perplexity"] == pytest.approx(math.exp(2.0))
    assert metrics["rollout/repetition_share"] == 1.0
    assert metrics["rollout/length_p99_tokens"] == 6.0
    assert metrics["rollout/longest_reply_p99_tokens"] == 3.0


def test_agreement_is_measured_on_probabilities():
    sampler = torch.tensor([-0.1, -1.0, -2.0, -0.5])
    trainer = sampler + torch.tensor([0.0, 0.2, -0.3, 0.1])
    metrics = agreement_metrics(trainer, sampler)
    p, q = trainer.exp().numpy(), sampler.exp().numpy()
    assert metrics["rl/probability_corr"] == pytest.approx(float(numpy.corrcoef(p, q)[0, 1]))
    assert metrics["rl/probability_max_difference"] == pytest.approx(float(abs(p - q).max()))
    assert metrics["rl/sampler_kl_nats"] == pytest.approx(0.0, abs=1e-7)
    assert agreement_metrics(sampler - 0.3, sampler)["rl/sampler_kl_nats"] == pytest.approx(0.3)


def test_equal_constants_agree():
    same = torch.full((3,), -0.7)
    assert agreement_metrics(same, same)["rl/probability_corr"] == 1.0
