from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
import torch

from openm1.model.m1 import M1ForCausalLM
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.rl.batch import Sample
from openm1.rl.losses import CISPO, GRPO, REINFORCE, RatioAnchor
from openm1.rl.update import UpdatePlan, recompute_logprobs, update_policy

from .play import TINY

PLAN = UpdatePlan(
    loss=CISPO(),
    num_updates=1,
    max_tokens=10_000,
    temperature=1.0,
    learning_rate=0.1,
    max_grad_norm=1e9,
    anchor=RatioAnchor(),
)


def model_without_balance_loss(seed: int = 0) -> M1ForCausalLM:
    """The balance loss of a micro-batch is its own: it is no sum over samples."""
    config = replace(TINY.config(nano_tokenizer()), router_aux_loss_coef=0.0)
    return M1ForCausalLM(config, dtype=torch.float64, seed=seed)


def make_samples(model: M1ForCausalLM, count: int, plan: UpdatePlan = PLAN) -> list[Sample]:
    """Random replies to random prompts, with the model's own log-probabilities."""
    rng = Random(0)
    samples = []
    for i in range(count):
        length = rng.randrange(2, 9)
        samples.append(
            Sample(
                token_ids=tuple(rng.randrange(100) for _ in range(3 + length)),
                loss_mask=(False,) * 3 + (True,) * length,
                old_logprobs=(0.0,) * length,
                advantage=1.0 if i % 2 else -1.0,
                prompt=i // 2,
            )
        )
    parts = recompute_logprobs(model, samples, plan)
    rows = zip(samples, parts, strict=True)
    return [replace(sample, old_logprobs=tuple(part.tolist())) for sample, part in rows]


def update(model: M1ForCausalLM, samples: list[Sample], plan: UpdatePlan):
    """SGD, as AdamW would blow up differences between gradients that are nearly zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = update_policy(model, optimizer, samples, plan, Random(1))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), metrics


@pytest.mark.parametrize(
    ("num_samples", "num_updates", "sizes"),
    [(8, 4, [2, 2, 2, 2]), (10, 4, [2, 3, 2, 3]), (3, 16, [1, 1, 1]), (17, 16, [1] * 15 + [2])],
)
def test_the_batch_is_dealt_out_evenly(
    monkeypatch: pytest.MonkeyPatch, num_samples: int, num_updates: int, sizes: list[int]
):
    model = model_without_balance_loss()
    samples = make_samples(model, num_samples)
    seen: list[list[Sample]] = []

    def note(model, optimizer, mini_batch, plan):
        seen.append(list(mini_batch))
        metrics = dict.fromkeys(("rl/ratio_max", "rl/weight_max", "rl/weight_min"), 1.0)
        return metrics, torch.zeros(sum(s.num_loss_tokens for s in mini_batch))

    monkeypatch.setattr("openm1.rl.update._mini_batch_step", note)
    _, metrics = update(model, samples, replace(PLAN, num_updates=num_updates))
    assert [len(mini_batch) for mini_batch in seen] == sizes
    assert metrics["rl/num_updates"] == len(sizes)
    dealt = [sample for mini_batch in seen for sample in mini_batch]
    assert sorted(dealt, key=samples.index) == samples
    if num_samples == 17:
        assert dealt != samples


@pytest.mark.parametrize(
    "loss", [CISPO(), GRPO(), CISPO(aggregation="prompt"), CISPO(aggregation="combined")]
)
def test_micro_batches_make_the_step_of_one_batch(loss):
    results = []
    for max_tokens in (10_000, 15):
        model = model_without_balance_loss()
        samples = make_samples(model, 6)
        results.append(update(model, samples, replace(PLAN, loss=loss, max_tokens=max_tokens)))
    (whole, a), (split, b) = results
    moved = whole - update(model_without_balance_loss(), samples, replace(PLAN, learning_rate=0))[0]
    assert float((whole - split).norm()) < 1e-6 * float(moved.norm())
    for name, value in a.items():
        assert b[name] == pytest.approx(value, rel=1e-4, abs=1e-7)


def test_replies_that_did_well_become_likelier():
    model = model_without_balance_loss()
    samples = make_samples(model, 6)
    update(model, samples, replace(PLAN, num_updates=2))
    after = recompute_logprobs(model, samples, PLAN)
    for sample, logprobs in zip(samples, after, strict=True):
        change = float(logprobs.sum()) - sum(sample.old_logprobs)
        assert change * sample.advantage > 0


def test_one_update_is_the_plain_policy_gradient_and_several_are_not():
    for num_updates, equal in ((1, True), (3, False)):
        results = []
        for loss in (CISPO(), REINFORCE()):
            model = model_without_balance_loss()
            plan = replace(PLAN, loss=loss, num_updates=num_updates, learning_rate=1.0)
            results.append(update(model, make_samples(model, 6), plan))
        (cispo, metrics), (plain, _) = results
        assert torch.allclose(cispo, plain, rtol=0, atol=1e-6) is equal
        assert (metrics["rl/ratio_max"] < 1.001) is equal


def shifted_samples(model: M1ForCausalLM) -> list[Sample]:
    """As if the sampler had thought every token half a nat less likely than the trainer does."""
    return [
        replace(sample, old_logprobs=tuple(p - 0.5 for p in sample.old_logprobs))
        for sample in make_samples(model, 4)
    ]


@pytest.mark.parametrize("at", ["old", "sampler"])
def test_the_ratio_is_anchored_where_the_plan_says(at):
    model = model_without_balance_loss()
    plan = replace(PLAN, anchor=RatioAnchor(at=at))
    _, metrics = update(model, shifted_samples(model), plan)
    expected = 1.0 if at == "old" else math.exp(0.5)
    assert metrics["rl/ratio_max"] == pytest.approx(expected, rel=1e-3)
    # Whatever the anchor, the sampler is what the trainer is compared with.
    assert metrics["rl/sampler_kl_nats"] == pytest.approx(-0.5, abs=1e-4)


def test_at_one_update_with_anchor_old_cispo_is_inert():
    moves = []
    # A cap of 1.01 would clip every ratio of the sampler's anchor.
    for loss in (CISPO(eps_is_high=0.01), REINFORCE()):
        model = model_without_balance_loss()
        plan = replace(PLAN, loss=loss, anchor=RatioAnchor(at="old"))
        moves.append(update(model, shifted_samples(model), plan)[0])
    before = torch.cat([p.detach().flatten() for p in model_without_balance_loss().parameters()])
    moved = float((moves[1] - before).norm())
    # The old log-probabilities are kept in fp32, the model computes in fp64.
    assert float((moves[0] - moves[1]).norm()) < 1e-6 * moved
    assert moved > 0


def test_a_truncated_correction_scales_the_step_by_the_mismatch_up_to_its_cap():
    moves = {}
    before = torch.cat([p.detach().flatten() for p in model_without_balance_loss().parameters()])
    for cap in (None, 1.2, 10.0):
        model = model_without_balance_loss()
        plan = replace(PLAN, anchor=RatioAnchor(at="old", mismatch_cap=cap))
        moves[cap] = update(model, shifted_samples(model), plan)[0] - before
    assert float(moves[None].norm()) > 0
    for cap, factor in ((1.2, 1.2), (10.0, math.exp(0.5))):
        torch.testing.assert_close(moves[cap], moves[None] * factor, rtol=0, atol=1e-6)


def test_the_weights_that_occur_and_those_that_are_allowed_are_logged():
    model = model_without_balance_loss()
    plan = replace(PLAN, loss=CISPO(eps_is_low=0.1, eps_is_high=0.25))
    _, metrics = update(model, shifted_samples(model), plan)
    assert metrics["rl/weight_floor"] == 0.9
    assert metrics["rl/weight_cap"] == metrics["rl/weight_max"] == 1.25
    model = model_without_balance_loss()
    _, metrics = update(model, shifted_samples(model), replace(PLAN, loss=GRPO()))
    assert (metrics["rl/weight_floor"], metrics["rl/weight_min"]) == (0.0, 0.0)
    assert "rl/weight_cap" not in metrics
    # A correction is part of the weight: exp(0.5) of mismatch, cut at 1.5, on a ratio of 1.
    model = model_without_balance_loss()
    corrected = replace(PLAN, anchor=RatioAnchor(at="old", mismatch_cap=1.5))
    _, metrics = update(model, shifted_samples(model), corrected)
    assert metrics["rl/weight_max"] == pytest.approx(1.5, rel=1e-5)
    assert (metrics["rl/weight_floor"], metrics["rl/weight_cap"]) == (0.0, 7.5)


def test_probabilities_are_taken_at_the_plans_temperature_and_vocabulary():
    model = model_without_balance_loss()
    plan = replace(PLAN, temperature=0.7, vocab_size=300)
    (sample,) = make_samples(model, 1, plan)
    logits = model(torch.tensor([sample.token_ids]))[0, 2:-1, :300] / 0.7
    expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids[3:])[:, None])[:, 0]
    torch.testing.assert_close(
        torch.tensor(sample.old_logprobs, dtype=torch.float64), expected, rtol=0, atol=1e-6
    )
