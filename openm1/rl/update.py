"""Several off-policy optimizer steps on one generation batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from statistics import fmean

import torch

from openm1.data.packing import split_by_tokens
from openm1.model.m1 import M1ForCausalLM
from openm1.rl.batch import PolicyBatch, Sample, pack_samples
from openm1.rl.losses import Loss, policy_loss
from openm1.rl.monitor import agreement_metrics
from openm1.train.loss import TokenScores, score_tokens
from openm1.train.step import optimizer_step


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdatePlan:
    """How one generation batch is learned from."""

    loss: Loss
    num_updates: int
    max_tokens: int
    """Tokens per forward pass."""
    temperature: float
    learning_rate: float
    max_grad_norm: float
    recompute_old: bool
    """Anchor the ratio at the trainer's own log-probabilities instead of the sampler's."""
    vocab_size: int | None = None
    """Ids from here on pad the model's vocabulary; the sampler never draws them. None: no such."""


def update_policy(
    model: M1ForCausalLM,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    plan: UpdatePlan,
    rng: Random,
) -> dict[str, float]:
    """Shuffles the samples into `num_updates` mini-batches, one optimizer step each.

    Their sizes differ by one sample at most; fewer samples than updates make fewer updates. With
    one update the ratio is 1 and every loss is the plain policy gradient. Agreement with the
    sampler is measured where the weights are still the sampler's: on all samples when their
    log-probabilities are recomputed, else on the first mini-batch.
    """
    order = list(samples)
    rng.shuffle(order)
    metrics: dict[str, float] = {}
    if plan.recompute_old:
        trainer = recompute_logprobs(model, order, plan)
        metrics = agreement_metrics(torch.cat(trainer), _old_logprobs(order))
        rows = zip(order, trainer, strict=True)
        order = [replace(s, old_logprobs=tuple(t.tolist())) for s, t in rows]
    count = min(plan.num_updates, len(order))
    bounds = [len(order) * i // count for i in range(count + 1)]
    steps: list[dict[str, float]] = []
    for start, end in pairwise(bounds):
        mini_batch = order[start:end]
        step, logprobs = _mini_batch_step(model, optimizer, mini_batch, plan)
        steps.append(step)
        if not metrics:
            metrics = agreement_metrics(logprobs, _old_logprobs(mini_batch))
    means = {name: fmean(step[name] for step in steps) for name in steps[0]}
    ratio_max = max(step["rl/ratio_max"] for step in steps)
    return metrics | means | {"rl/ratio_max": ratio_max, "rl/num_updates": len(steps)}


def _score(model: M1ForCausalLM, batch: PolicyBatch, plan: UpdatePlan) -> TokenScores:
    """As the sampler saw it: the same temperature, the same vocabulary."""
    return score_tokens(
        model, batch.packed, temperature=plan.temperature, vocab_size=plan.vocab_size
    )


def _old_logprobs(samples: Sequence[Sample]) -> torch.Tensor:
    return torch.tensor([p for sample in samples for p in sample.old_logprobs])


@torch.no_grad()
def recompute_logprobs(
    model: M1ForCausalLM, samples: Sequence[Sample], plan: UpdatePlan
) -> list[torch.Tensor]:
    """The trainer's log-probabilities of each sample's chosen tokens, before any update."""
    parts: list[torch.Tensor] = []
    for group in split_by_tokens(samples, plan.max_tokens):
        batch = pack_samples(group, model.device)
        scores = _score(model, batch, plan)
        parts.extend(scores.logprobs.cpu().split([s.num_loss_tokens for s in group]))
    return parts


def _mini_batch_step(
    model: M1ForCausalLM,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    plan: UpdatePlan,
) -> tuple[dict[str, float], torch.Tensor]:
    """One optimizer step; its metrics, and the log-probabilities from before it."""
    num_tokens = sum(sample.num_loss_tokens for sample in samples)
    entropy = clipped = ratio_max = loss_sum = 0.0
    logprobs = []
    for group in split_by_tokens(samples, plan.max_tokens):
        batch = pack_samples(group, model.device)
        scores = _score(model, batch, plan)
        result = policy_loss(
            plan.loss,
            scores.logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.sample_index,
            num_tokens=num_tokens,
            num_samples=len(samples),
        )
        share = len(scores.logprobs) / num_tokens
        aux = model.config.router_aux_loss_coef * share * scores.aux_loss
        (result.loss + aux).backward()
        logprobs.append(scores.logprobs.detach().cpu())
        loss_sum += float(result.loss.detach())
        entropy += float(scores.entropy.sum()) / num_tokens
        clipped += float((result.weights != result.ratio).sum()) / num_tokens
        ratio_max = max(ratio_max, float(result.ratio.max()))
    grad_norm = optimizer_step(
        model,
        optimizer,
        learning_rate=plan.learning_rate,
        max_grad_norm=plan.max_grad_norm,
    )
    metrics = {
        "train/grad_norm": grad_norm,
        "rl/loss": loss_sum,
        "rl/entropy_nats": entropy,
        "rl/clipped_share": clipped,
        "rl/ratio_max": ratio_max,
    }
    return metrics, torch.cat(logprobs)
