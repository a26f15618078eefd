"""One run: an arm, a learning rate and a seed, on one task, from given weights."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cispo.lockstep import (
    TURN_TOKENS,
    Play,
    Words,
    draw_chains,
    pack_rows,
    play_chains,
)
from benchmarks.cispo.measure import RareTokens, group_advantages
from openm1.model.m1 import M1ForCausalLM
from openm1.rl.losses import PolicyLoss, policy_loss, sample_shares
from openm1.train.loss import score_tokens
from openm1.train.optim import AdamWConfig, make_optimizer
from openm1.train.step import NonFiniteGradient, optimizer_step


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """The sizes of spec and paper: 16 updates on 512 rollouts."""

    loss: PolicyLoss
    learning_rate: float
    seed: int
    num_updates: int = 16
    num_steps: int = 30
    num_prompts: int = 32
    group_size: int = 16
    lengths: tuple[int, int] = (3, 6)
    curriculum: Curriculum | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Curriculum:
    """Levels that get harder: a level is passed when the mean reward of a batch reaches `passed`.

    Level i plays operations of the first `kinds[i]` kinds in chains of `lengths[i]` turns.
    """

    lengths: tuple[tuple[int, int], ...]
    kinds: tuple[int, ...]
    passed: float = 0.8


@dataclass
class Curves:
    """Per step, in order."""

    steps: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.steps.setdefault(name, []).append(round(float(value), 6))


def run(model: M1ForCausalLM, words: Words, plan: RunPlan) -> dict[str, Any]:
    """Trains `model` in place; the curves and the seconds it took."""
    began, began_cpu = time.perf_counter(), time.process_time()
    optimizer = make_optimizer(model, AdamWConfig(learning_rate=plan.learning_rate))
    curves, level = Curves(), 0
    for step in range(plan.num_steps):
        rng = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        lengths, kinds = plan.lengths, None
        if plan.curriculum is not None:
            lengths, kinds = plan.curriculum.lengths[level], plan.curriculum.kinds[level]
        chains = draw_chains(words, lengths, plan.num_prompts, plan.group_size, rng, kinds)
        play = play_chains(model, words, chains, rng)
        reward = float(play.reward.mean())
        learned = learn(model, optimizer, words, play, plan, rng)
        curves.add(reward=reward, level=level, **_of_play(play), **learned)
        if (
            plan.curriculum is not None
            and reward >= plan.curriculum.passed
            and level + 1 < len(plan.curriculum.kinds)
        ):
            level += 1
    return {
        "curves": curves.steps,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_s": round(time.process_time() - began_cpu, 2),
    }


def _of_play(play: Play) -> dict[str, float]:
    played = play.played
    checked = play.chosen[:, TURN_TOKENS::TURN_TOKENS] & played
    return {
        "checked_right": float((play.right & checked).sum() / checked.sum().clamp(min=1)),
        "recheck": float(play.recheck_probability[played].mean()),
        "fork_entropy": float(play.fork_entropy[played].mean()),
    }


@dataclass
class Tally:
    """What the updates of a batch did."""

    rare: RareTokens = field(default_factory=RareTokens)
    num_tokens: int = 0
    num_clipped: int = 0
    grad_norms: list[float] = field(default_factory=list)
    num_broken: int = 0
    """Updates whose gradient was not finite; they changed nothing."""

    def metrics(self) -> dict[str, float]:
        return {
            "clipped": self.num_clipped / max(self.num_tokens, 1),
            "grad_norm": sum(self.grad_norms) / max(len(self.grad_norms), 1),
            "broken": self.num_broken,
            **{f"rare_{name}": value for name, value in self.rare.metrics().items()},
        }


def learn(
    model: M1ForCausalLM,
    optimizer: torch.optim.Optimizer,
    words: Words,
    play: Play,
    plan: RunPlan,
    rng: torch.Generator,
) -> dict[str, float]:
    """The updates of a batch. Groups without spread are left out, as in dynamic sampling."""
    advantages = group_advantages(play.reward, play.chains.group)
    rows = (advantages != 0).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=rng)]
    tally = Tally()
    if len(rows):
        for part in rows.tensor_split(min(plan.num_updates, len(rows))):
            _update(model, optimizer, words, play, part, advantages[part], plan, tally)
    return tally.metrics() | {"learned_rows": len(rows)}


def _update(
    model: M1ForCausalLM,
    optimizer: torch.optim.Optimizer,
    words: Words,
    play: Play,
    part: Tensor,
    advantages: Tensor,
    plan: RunPlan,
    tally: Tally,
) -> None:
    """One optimizer step on the rows `part` [N] with their `advantages` [N]."""
    chosen = play.chosen[part]
    batch = pack_rows(play.tokens[part], chosen, play.chains.num_turns[part])
    counts = chosen.sum(1)
    groups = play.chains.group[part]
    shares = sample_shares(plan.loss.aggregation, counts.tolist(), groups.tolist())
    scores = score_tokens(model, batch, vocab_size=len(words.text))
    # What is per row, at each token that the model wrote: packed order is row by row.
    at_tokens = advantages.repeat_interleave(counts)
    result = policy_loss(
        plan.loss,
        scores.logprobs,
        play.logprobs[part][chosen],
        at_tokens,
        torch.tensor(shares).repeat_interleave(counts),
    )
    (result.loss + model.config.router_aux_loss_coef * scores.aux_loss).backward()
    try:
        norm = optimizer_step(model, optimizer, learning_rate=plan.learning_rate, max_grad_norm=1.0)
    except NonFiniteGradient:
        tally.num_broken += 1
        return
    is_rare = batch.targets[batch.loss_mask] >= words.first_recheck
    tally.rare.add(result.ratio, result.weights, at_tokens, is_rare)
    tally.num_clipped += int((result.weights != result.ratio).sum())
    tally.num_tokens += len(result.ratio)
    tally.grad_norms.append(norm)
