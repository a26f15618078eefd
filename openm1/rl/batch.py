"""From groups of rollouts to training samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, get_args

import torch
from torch import Tensor

from openm1.data.packing import Example, PackedBatch, pack
from openm1.rl.advantage import group_advantages
from openm1.types import Rollout, RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One rollout as one sequence. Old log-probabilities stand where the mask is True."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True for what the policy chose: not prompts, not the environment, not forced tokens."""
    old_logprobs: tuple[float, ...]
    advantage: float
    prompt: int
    """The same for the rollouts of one prompt."""
    reward: float = 0.0
    """What the rollout earned, its cost of length taken off."""
    advantages: tuple[float, ...] = ()
    """Of each token the policy chose, from a critic; empty is `advantage` for all of them."""
    experts: tuple[bytes, ...] = ()
    """Where they were recorded: which experts each token but the last went to, as in `Completion`;
    the trainer sends it there again."""
    mismatch: tuple[float, ...] = ()
    """Beside the old log-probabilities: what corrects for the sampler's. Empty is no correction."""

    @property
    def num_loss_tokens(self) -> int:
        return len(self.old_logprobs)


CutPolicy = Literal["keep", "mask", "drop"]
"""For a rollout that was cut short. "keep": it is learned from like any other. "mask": its reward
counts in its group, its tokens are not learned. "drop": it counts nowhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """What becomes of rollouts that ran long or were cut short."""

    truncated: CutPolicy = "keep"
    """Rollouts that ended at the window."""
    repetition: CutPolicy = "keep"
    """Rollouts that were stopped for repeating themselves."""
    overlong_share: float = 0.2
    """Last part of the window in which length costs, DAPO's 4,096 of 20,480; 0 is no cost."""
    overlong_cost: float = 0.5
    """Taken off the reward at the full window. DAPO takes 1 off rewards of 1 and -1, which is half
    of what right and wrong differ by; ours differ by 1."""

    def __post_init__(self) -> None:
        for name in ("truncated", "repetition"):
            if getattr(self, name) not in get_args(CutPolicy):
                allowed = ", ".join(get_args(CutPolicy))
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {allowed}")
        if not 0 <= self.overlong_share <= 1:
            raise ValueError(f"overlong_share is {self.overlong_share}; allowed is 0 to 1")
        if not self.overlong_cost >= 0:
            raise ValueError(f"overlong_cost is {self.overlong_cost}; allowed is 0 or more")

    def policy(self, rollout: Rollout) -> CutPolicy:
        reason = rollout.turns[-1].completion.finish_reason if rollout.turns else "stop"
        if reason == "length":
            return self.truncated
        return self.repetition if reason == "repetition" else "keep"

    def counted(self, group: RolloutGroup) -> list[Rollout]:
        """The rollouts over which the group's mean is taken; failed ones never count."""
        good = [rollout for rollout in group.rollouts if rollout.error is None]
        return [rollout for rollout in good if self.policy(rollout) != "drop"]

    def overlong_punishment(self, rollout: Rollout, window_tokens: int) -> float:
        """0 or less: DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13) of the longest
        reply, falling in a straight line over the last part of the window."""
        longest = max((len(turn.completion.token_ids) for turn in rollout.turns), default=0)
        room = self.overlong_share * window_tokens
        over = longest - (window_tokens - room)
        return -self.overlong_cost * min(1.0, over / room) if room > 0 and over > 0 else 0.0


def has_signal(group: RolloutGroup, config: BatchConfig) -> bool:
    """Whether rewards differ: a group that is all right or all wrong teaches nothing.

    The rewards are the task's, without the cost of length: short and long right answers are no
    reason to keep a group.
    """
    return len({rollout.reward for rollout in config.counted(group)}) > 1


def pass_rate(group: RolloutGroup) -> float:
    """The share of rollouts with the full reward of 1. One that failed has not passed: a group of
    which little is known is not taken for learned."""
    return sum((rollout.reward or 0.0) >= 1 for rollout in group.rollouts) / len(group.rollouts)


def signal_metrics(
    groups: Sequence[RolloutGroup], config: BatchConfig, window_tokens: int
) -> dict[str, float]:
    """Where a step's groups went: the first four shares sum to 1.

    Groups without spread are right or wrong by whether their one reward is above 0; unscored are
    those with no rollout that counts.
    """
    shares = dict.fromkeys(("signal", "all_right", "all_wrong", "unscored"), 0.0)
    for group in groups:
        rewards = {rollout.reward or 0.0 for rollout in config.counted(group)}
        if len(rewards) == 1:
            kind = "all_right" if max(rewards) > 0 else "all_wrong"
        else:
            kind = "signal" if rewards else "unscored"
        shares[kind] += 1 / len(groups)
    counted = [rollout for group in groups for rollout in config.counted(group)]
    punished = [config.overlong_punishment(rollout, window_tokens) for rollout in counted]
    metrics = {f"rollout/{kind}_share": share for kind, share in shares.items()}
    return metrics | {"rollout/overlong_punishment": fmean(punished) if punished else 0.0}


def group_samples(
    group: RolloutGroup, prompt: int, config: BatchConfig, window_tokens: int
) -> list[Sample]:
    """Samples with group-relative advantages; `prompt` is the group's number in the batch.

    Failed rollouts are left out of mean and batch, rollouts without a token to learn of the batch.
    """
    counted = config.counted(group)
    rewards = [
        rollout.reward + config.overlong_punishment(rollout, window_tokens)
        for rollout in counted
        if rollout.reward is not None
    ]
    advantages = group_advantages(rewards)
    samples = [
        _sample(rollout, advantage, reward, prompt)
        for rollout, advantage, reward in zip(counted, advantages, rewards, strict=True)
        if config.policy(rollout) == "keep"
    ]
    return [sample for sample in samples if sample.num_loss_tokens]


def _sample(rollout: Rollout, advantage: float, reward: float, prompt: int) -> Sample:
    ids: list[int] = []
    mask: list[bool] = []
    logprobs: list[float] = []
    experts: list[bytes] = []
    for turn in rollout.turns:
        # What a later turn found in its cache, an earlier one has computed.
        known, seen = len(experts), turn.completion.experts
        experts = [seen[i] or (experts[i] if i < known else b"") for i in range(len(seen))]
        new = turn.prompt_ids[len(ids) :]
        assert turn.prompt_ids[: len(ids)] == tuple(ids), "a turn does not extend the one before"
        # A policy that forces nothing may leave `forced` empty.
        forced = turn.completion.forced or (False,) * len(turn.completion.token_ids)
        chosen = [not flag for flag in forced]
        ids += [*new, *turn.completion.token_ids]
        mask += [False] * len(new) + chosen
        logprobs += [p for p, c in zip(turn.completion.logprobs, chosen, strict=True) if c]
    return Sample(
        token_ids=tuple(ids),
        loss_mask=tuple(mask),
        old_logprobs=tuple(logprobs),
        advantage=advantage,
        reward=reward,
        experts=tuple(experts),
        prompt=prompt,
    )


@dataclass(frozen=True)
class PolicyBatch:
    """Packed samples; the per-token tensors cover the M masked places in packed order."""

    packed: PackedBatch
    old_logprobs: Tensor
    """[M] fp32."""
    advantages: Tensor
    """[M] fp32."""
    sample_index: Tensor
    """[M] int64: which sample of this batch."""
    mismatch: Tensor | None
    """[M] fp32, where the samples have a correction."""
    experts: Tensor | None
    """[T, L * K] int64, where the samples have recorded ones; -1 where a token has not."""


def pack_samples(samples: Sequence[Sample], device: torch.device | str = "cpu") -> PolicyBatch:
    counts = torch.tensor([sample.num_loss_tokens for sample in samples])
    advantages = [
        advantage
        for sample in samples
        for advantage in sample.advantages or (sample.advantage,) * sample.num_loss_tokens
    ]
    old = [logprob for sample in samples for logprob in sample.old_logprobs]
    mismatch = [factor for sample in samples for factor in sample.mismatch]
    index = torch.repeat_interleave(torch.arange(len(samples)), counts)
    examples = [Example(token_ids=s.token_ids, loss_mask=s.loss_mask) for s in samples]
    return PolicyBatch(
        packed=pack(examples, device),
        old_logprobs=torch.tensor(old, device=device),
        advantages=torch.tensor(advantages, device=device),
        sample_index=index.to(device),
        mismatch=torch.tensor(mismatch, device=device) if mismatch else None,
        experts=_pack_experts(samples, device),
    )


def _pack_experts(samples: Sequence[Sample], device: torch.device | str) -> Tensor | None:
    width = max((len(row) for sample in samples for row in sample.experts), default=0)
    if not width:
        return None
    free = (-1,) * width
    rows = [
        tuple(row) or free
        for sample in samples
        for row in sample.experts or (b"",) * (len(sample.token_ids) - 1)
    ]
    return torch.tensor(rows, device=device)
