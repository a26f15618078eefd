"""What is watched: the rollouts, and whether trainer and sampler agree on probabilities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from openm1.types import Rollout, RolloutGroup


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Reward and length over all rollouts of a step, the groups without signal included.

    Perplexity is the sampler's, over the tokens that it chose.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    good = [rollout for rollout in rollouts if rollout.error is None]
    lengths = torch.tensor([float(r.num_completion_tokens) for r in good])
    longest = torch.tensor([float(max(len(t.completion.token_ids) for t in r.turns)) for r in good])
    rewards = torch.tensor([float(r.reward or 0.0) for r in good])
    ends = [r.turns[-1].completion.finish_reason for r in good]
    return {
        "rollout/reward": float(rewards.mean()),
        "rollout/accuracy": float((rewards >= 1).float().mean()),
        "rollout/perplexity": _perplexity(good),
        "rollout/length_mean_tokens": float(lengths.mean()),
        "rollout/length_p99_tokens": float(lengths.quantile(0.99)),
        "rollout/longest_reply_p99_tokens": float(longest.quantile(0.99)),
        "rollout/truncated_share": ends.count("length") / len(good),
        "rollout/repetition_share": ends.count("repetition") / len(good),
        "rollout/error_share": 1 - len(good) / len(rollouts),
        **error_counts(groups),
    }


def staleness_metrics(groups: Sequence[RolloutGroup], version: int) -> dict[str, float]:
    """How many versions ago the tokens were written, which are learned from at `version`.

    Tokens of a policy that gives no versions do not count.
    """
    ages = [
        float(version - written)
        for group in groups
        for rollout in group.rollouts
        for turn in rollout.turns
        for written in turn.completion.policy_versions
    ]
    return {"rl/staleness_mean": fmean(ages or [0.0]), "rl/staleness_max": max(ages or [0.0])}


def error_counts(groups: Sequence[RolloutGroup]) -> dict[str, int]:
    """Failed rollouts by the border at which they failed, where there are some."""
    sources = [
        r.error_source or "unknown" for g in groups for r in g.rollouts if r.error is not None
    ]
    return {f"errors/{source}": count for source, count in sorted(Counter(sources).items())}


def _perplexity(rollouts: Sequence[Rollout]) -> float:
    chosen = [
        logprob
        for rollout in rollouts
        for completion in (turn.completion for turn in rollout.turns)
        for i, logprob in enumerate(completion.logprobs)
        if not (completion.forced and completion.forced[i])
    ]
    return math.exp(-fmean(chosen))


def agreement_metrics(trainer: Tensor, sampler: Tensor) -> dict[str, float]:
    """Trainer against sampler log-probabilities [M] of the same tokens under the same weights.

    Correlation and greatest difference are of probabilities, as in the report (section 3.2: 0.987
    before the fp32 head, 0.997 after); the KL is the sampler's estimate E[log p_s - log p_t].
    """
    p, q = trainer.double().exp(), sampler.double().exp()
    centred_p, centred_q = p - p.mean(), q - q.mean()
    spread = centred_p.norm() * centred_q.norm()
    # Without spread there is nothing to correlate; equal constants agree.
    correlation = float(centred_p @ centred_q / spread) if float(spread) > 0 else 1.0
    return {
        "rl/probability_corr": correlation,
        "rl/probability_max_difference": float((p - q).abs().max()),
        "rl/sampler_kl_nats": float((sampler.double() - trainer.double()).mean()),
    }
