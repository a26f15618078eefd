"""Several off-policy optimizer steps on one generation batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from random import Random
from statistics import fmean

import torch

from openm1.data.packing import split_by_tokens
from openm1.model.m1 import M1ForCausalLM
from openm1.rl.batch import PolicyBatch, Sample, pack_samples
from openm1.rl.losses import Loss, RatioAnchor, policy_loss, sample_shares
from openm1.rl.monitor import agreement_metrics
from openm1.train.loss import TokenScores, score_tokens
from openm1.train.step import NonFiniteGradient, optimizer_step


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
    anchor: RatioAnchor
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
    log-probabilities are recomputed, else on the first mini-batch. Where samples are stale, it
    holds what has been learned since. An update whose gradient is not finite is skipped and
    counted; if all are, NonFiniteGradient is raised.
    """
    order = list(samples)
    rng.shuffle(order)
    metrics: dict[str, float] = {}
    if plan.anchor.at == "old":
        trainer = recompute_logprobs(model, order, plan)
        metrics = agreement_metrics(torch.cat(trainer), _old_logprobs(order))
        rows = zip(order, trainer, strict=True)
        order = [_anchored(s, t, plan.anchor.mismatch_cap) for s, t in rows]
    count = min(plan.num_updates, len(order))
    bounds = [len(order) * i // count for i in range(count + 1)]
    steps: list[dict[str, float]] = []
    num_skipped = 0
    for start, end in pairwise(bounds):
        mini_batch = order[start:end]
        step, logprobs = _mini_batch_step(model, optimizer, mini_batch, plan)
        if step is None:
            num_skipped += 1
            continue
        steps.append(step)
        if not metrics:
            metrics = agreement_metrics(logprobs, _old_logprobs(mini_batch))
    if not steps:
        raise NonFiniteGradient(
            f"none of a step's {num_skipped} updates had a finite gradient; the weights are those "
            "from before it"
        )
    means = {name: fmean(step[name] for step in steps) for name in steps[0]}
    extremes = {
        "rl/ratio_max": max(step["rl/ratio_max"] for step in steps),
        "rl/weight_max": max(step["rl/weight_max"] for step in steps),
        "rl/weight_min": min(step["rl/weight_min"] for step in steps),
    }
    counts = {"rl/num_updates": len(steps)}
    if num_skipped:
        counts["errors/nonfinite_update"] = num_skipped
    return metrics | means | extremes | _allowed_weights(plan) | counts


def measure_agreement(
    model: M1ForCausalLM, samples: Sequence[Sample], plan: UpdatePlan
) -> dict[str, float]:
    """For a step without an update: agreement on one forward pass of samples."""
    first = split_by_tokens(samples, plan.max_tokens)[0]
    trainer = torch.cat(recompute_logprobs(model, first, plan))
    return agreement_metrics(trainer, _old_logprobs(first))


def _allowed_weights(plan: UpdatePlan) -> dict[str, float]:
    """The interval that clip and mismatch leave to a weight; an upper end that is not there is not
    given.

    It stands beside what occurred so that a clip that means something else than was thought is
    seen: 0.2 read as a cap instead of an offset makes every weight 0.2.
    """
    floor, cap = plan.loss.weight_interval
    if plan.anchor.mismatch_cap is not None:
        floor, cap = 0.0, cap * plan.anchor.mismatch_cap
    given = {"rl/weight_floor": floor}
    return given if math.isinf(cap) else given | {"rl/weight_cap": cap}


def _anchored(sample: Sample, trainer: torch.Tensor, mismatch_cap: float | None) -> Sample:
    """The sample with the trainer's log-probabilities as its old ones."""
    mismatch: tuple[float, ...] = ()
    if mismatch_cap is not None:
        ratio = torch.exp(trainer - torch.tensor(sample.old_logprobs))
        mismatch = tuple(ratio.clamp(max=mismatch_cap).tolist())
    return replace(sample, old_logprobs=tuple(trainer.tolist()), mismatch=mismatch)


def _score(model: M1ForCausalLM, batch: PolicyBatch, plan: UpdatePlan) -> TokenScores:
    """As the sampler saw it: the same temperature, vocabulary and, where recorded, experts."""
    return score_tokens(
        model,
        batch.packed,
        temperature=plan.temperature,
        vocab_size=plan.vocab_size,
        experts=batch.experts,
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
) -> tuple[dict[str, float] | None, torch.Tensor]:
    """One optimizer step; its metrics, and the log-probabilities from before it. A gradient that
    is not finite changes nothing, and there are no metrics."""
    counts = [sample.num_loss_tokens for sample in samples]
    num_tokens = sum(counts)
    prompts = [sample.prompt for sample in samples]
    shares = iter(sample_shares(plan.loss.aggregation, counts, prompts))
    entropy = clipped = loss_sum = 0.0
    logprobs, weights, ratios = [], [], []
    for group in split_by_tokens(samples, plan.max_tokens):
        batch = pack_samples(group, model.device)
        share_of_sample = torch.tensor(list(islice(shares, len(group))), device=model.device)
        scores = _score(model, batch, plan)
        result = policy_loss(
            plan.loss,
            scores.logprobs,
            batch.old_logprobs,
            batch.advantages,
            share_of_sample[batch.sample_index],
            batch.mismatch,
        )
        share = len(scores.logprobs) / num_tokens
        aux = model.config.router_aux_loss_coef * share * scores.aux_loss
        (result.loss + aux).backward()
        logprobs.append(scores.logprobs.detach().cpu())
        loss_sum += float(result.loss.detach())
        entropy += float(scores.entropy.sum()) / num_tokens
        clipped += float((result.weights != result.ratio).sum()) / num_tokens
        mismatch = 1.0 if batch.mismatch is None else batch.mismatch
        weights.append(result.weights * mismatch)
        ratios.append(result.ratio)
    try:
        grad_norm = optimizer_step(
            model,
            optimizer,
            learning_rate=plan.learning_rate,
            max_grad_norm=plan.max_grad_norm,
        )
    except NonFiniteGradient:
        return None, torch.cat(logprobs)
    metrics = {
        "train/grad_norm": grad_norm,
        "rl/loss": loss_sum,
        "rl/entropy_nats": entropy,
        "rl/clipped_share": clipped,
        "rl/ratio_max": float(torch.cat(ratios).max()),
        "rl/weight_min": float(torch.cat(weights).min()),
        "rl/weight_max": float(torch.cat(weights).max()),
    }
    return metrics, torch.cat(logprobs)
