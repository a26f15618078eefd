"""One run: an arm, a learning rate and a seed, on one task, from given weights."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

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
    began = time.perf_counter()
    optimizer = make_optimizer(
        model.parameters(), AdamWConfig(learning_rate=plan.learning_rate)
    )
    curves, level = Curves(), 0
    for step in range(plan.num_steps):
        rng = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        lengths, kinds = plan.lengths, None
        if plan.curriculum is not None:
            lengths, kinds = plan.curriculum.lengths[level], plan.curriculum.kinds[level]
        chains = draw_chains(words, lengths, plan.num_prompts, plan.group_size, rng, kinds)
        play = play_chains(model, words, chains, rng)
        reward = float(play.reward.mean())
        try:
            learned = learn(model, optimizer, words, play, plan, rng)
        except NonFiniteGradient:
            # The run has broken: it stays where it is, which its curves show.
            learned = {}
        curves.add(reward=reward, level=level, **_of_play(play), **learned)
        if (
            plan.curriculum is not None
            and reward >= plan.curriculum.passed
            and level + 1 < len(plan.curriculum.kinds)
        ):
            level += 1
    return {"curves": curves.steps, "seconds": round(time.perf_counter() - began, 2), "cpu_s": round(time.process_time(), 2)}


def _of_play(play: Play) -> dict[str, float]:
    played = play.played
    checked = play.chosen[:, TURN_TOKENS::TURN_TOKENS] & played
    return {
        "checked_right": float((play.right & checked).sum() / checked.sum().clamp(min=1)),
        "recheck": float(play.recheck_probability[played].mean()),
        "fork_entropy": float(play.fork_entropy[played].mean()),
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
    rare, clipped, norms, count = RareTokens(), 0.0, [], 0
    for part in rows.tensor_split(min(plan.num_updates, max(len(rows), 1))):
        if not len(part):
            continue
        chosen = play.chosen[part]
        batch = pack_rows(play.tokens[part], chosen, play.chains.num_turns[part])
        # In packed order: row by row, what the model wrote.
        counts = chosen.sum(1)
        old = play.logprobs[part][chosen]
        shares = torch.tensor(
            sample_shares(
                plan.loss.aggregation, counts.tolist(), play.chains.group[part].tolist()
            )
        )
        scores = score_tokens(model, batch, vocab_size=len(words.text))
        at = advantages[part].repeat_interleave(counts)
        result = policy_loss(
            plan.loss, scores.logprobs, old, at, shares.repeat_interleave(counts)
        )
        (result.loss + model.config.router_aux_loss_coef * scores.aux_loss).backward()
        norms.append(
            optimizer_step(
                model, optimizer, learning_rate=plan.learning_rate, max_grad_norm=1.0
            )
        )
        is_rare = batch.targets[batch.loss_mask] >= words.first_recheck
        rare.add(result.ratio, result.weights, at, is_rare)
        clipped += float((result.weights != result.ratio).sum())
        count += len(old)
    return {
        "clipped": clipped / max(count, 1),
        "grad_norm": sum(norms) / max(len(norms), 1),
        "learned_rows": len(rows),
        **{f"rare_{name}": value for name, value in rare.metrics().items()},
    }
