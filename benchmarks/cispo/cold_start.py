"""The weights every arm starts from: looking up is known, the wish to do so is planted at 3 %."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cispo.lockstep import (
    FORK,
    TURN_TOKENS,
    VALUE,
    Chains,
    Words,
    draw_chains,
    draw_hints,
    pack_rows,
)
from openm1.model.m1 import M1ForCausalLM
from openm1.train.optim import AdamWConfig, make_optimizer
from openm1.train.schedule import Schedule
from openm1.train.step import optimizer_step


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdStart:
    """Supervised steps on chains whose forks are soft labels: each trace goes one way, but what is
    learned at a fork is how likely each way is."""

    num_steps: int = 500
    rows: int = 128
    recheck_probability: float = 0.03
    """Of the mark that checks."""
    stray_probability: float = 0.002
    """Of each other kind's mark."""
    learning_rate: float = 4e-3
    seed: int = 0


def written_rows(words: Words, chains: Chains, rng: torch.Generator) -> Tensor:
    """Tokens [R, 1 + 4 turns]: half of the forks check, a few carry another kind's mark."""
    rows, most = chains.operations.shape
    tokens = torch.zeros(rows, 1 + TURN_TOKENS * most, dtype=torch.int64)
    tokens[:, 0] = value = chains.start
    for turn in range(most):
        column = 1 + TURN_TOKENS * turn
        operation = chains.operations[:, turn]
        result = words.tables[operation, value]
        hint = draw_hints(words, result, rng)
        mark = words.recheck(operation)
        way = torch.rand(rows, generator=rng)
        stray = torch.randint(0, words.config.num_kinds, (rows,), generator=rng)
        fork = torch.where(way < 0.5, mark, torch.full_like(mark, words.skip))
        fork = torch.where(way > 0.9, words.first_recheck + stray, fork)
        value = torch.where(fork == mark, result, hint)
        for offset, ids in enumerate((words.first_operation + operation, hint, fork, value)):
            tokens[:, column + offset] = ids
    return tokens


def fork_targets(words: Words, operations: Tensor, config: ColdStart) -> Tensor:
    """[N, V] probabilities at forks of these operations [N]."""
    targets = torch.zeros(len(operations), len(words.text))
    targets[:, words.first_recheck :] = config.stray_probability
    targets.scatter_(1, words.recheck(operations)[:, None], config.recheck_probability)
    targets[:, words.skip] = 1 - targets.sum(1)
    return targets


def train_cold_start(
    model: M1ForCausalLM, words: Words, lengths: tuple[int, int], config: ColdStart
) -> dict[str, float]:
    """Trains in place; returns the last losses at forks and at values, nats a token."""
    optimizer = make_optimizer(model, AdamWConfig(learning_rate=config.learning_rate))
    schedule = Schedule(warmup_steps=20, decay_share=0.5)
    losses: dict[str, float] = {}
    for step in range(config.num_steps):
        rng = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        chains = draw_chains(words, lengths, config.rows, 1, rng)
        tokens = written_rows(words, chains, rng)
        column = torch.arange(tokens.shape[1]).expand_as(tokens)
        is_fork = (column % TURN_TOKENS == 1 + FORK) & (column > 0)
        marks = torch.roll(tokens, 1, 1)
        # The value after a check; values that the environment writes are not learned.
        operations = torch.roll(tokens, 3, 1) - words.first_operation
        checked = marks == words.recheck(operations.clamp(min=0))
        is_value = (column % TURN_TOKENS == (1 + VALUE) % TURN_TOKENS) & (column > 0) & checked
        batch = pack_rows(tokens, is_fork | is_value, chains.num_turns)
        output = model.model(batch.input_ids, batch.layout)
        scores = model.logits(output.hidden[batch.loss_mask])[:, : len(words.text)].log_softmax(-1)
        targets = batch.targets[batch.loss_mask]
        at_fork = targets >= words.skip
        # Two places before a fork's target stands the operation.
        at = batch.loss_mask.nonzero()[:, 0][at_fork] - 1
        fork_operations = batch.input_ids[at] - words.first_operation
        soft = fork_targets(words, fork_operations, config)
        fork_loss = -(soft * scores[at_fork]).sum(-1).mean()
        value_loss = -scores[~at_fork].gather(1, targets[~at_fork, None]).mean()
        loss = fork_loss + value_loss + model.config.router_aux_loss_coef * output.aux_loss
        loss.backward()
        rate = config.learning_rate * schedule.ratio(step, config.num_steps)
        optimizer_step(model, optimizer, learning_rate=rate, max_grad_norm=1.0)
        losses = {"fork": float(fork_loss.detach()), "value": float(value_loss.detach())}
    return losses
