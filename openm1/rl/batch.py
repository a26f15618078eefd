"""From groups of rollouts to training samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    mismatch: tuple[float, ...] = ()
    """Beside the old log-probabilities: what corrects for the sampler's. Empty is no correction."""

    @property
    def num_loss_tokens(self) -> int:
        return len(self.old_logprobs)


def has_signal(group: RolloutGroup) -> bool:
    """Whether rewards differ: a group that is all right or all wrong teaches nothing."""
    rewards = {rollout.reward for rollout in group.rollouts if rollout.error is None}
    return len(rewards) > 1


def group_samples(group: RolloutGroup, prompt: int) -> list[Sample]:
    """Samples with group-relative advantages; `prompt` is the group's number in the batch.

    Failed rollouts are left out of mean and batch, rollouts without a token to learn of the batch.
    """
    good = [rollout for rollout in group.rollouts if rollout.error is None]
    advantages = group_advantages([r.reward for r in good if r.reward is not None])
    samples = [_sample(rollout, a, prompt) for rollout, a in zip(good, advantages, strict=True)]
    return [sample for sample in samples if sample.num_loss_tokens]


def _sample(rollout: Rollout, advantage: float, prompt: int) -> Sample:
    ids: list[int] = []
    mask: list[bool] = []
    logprobs: list[float] = []
    for turn in rollout.turns:
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


def pack_samples(samples: Sequence[Sample], device: torch.device | str = "cpu") -> PolicyBatch:
    counts = torch.tensor([sample.num_loss_tokens for sample in samples])
    advantages = torch.tensor([sample.advantage for sample in samples])
    old = [logprob for sample in samples for logprob in sample.old_logprobs]
    mismatch = [factor for sample in samples for factor in sample.mismatch]
    index = torch.repeat_interleave(torch.arange(len(samples)), counts)
    examples = [Example(token_ids=s.token_ids, loss_mask=s.loss_mask) for s in samples]
    return PolicyBatch(
        packed=pack(examples, device),
        old_logprobs=torch.tensor(old, device=device),
        advantages=advantages[index].to(device),
        sample_index=index.to(device),
        mismatch=torch.tensor(mismatch, device=device) if mismatch else None,
    )
