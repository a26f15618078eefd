from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch

from openm1.model.m1 import M1ForCausalLM
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.rl.batch import Sample
from openm1.rl.losses import CISPO, GRPO, REINFORCE
from openm1.rl.update import UpdatePlan, recompute_logprobs, update_policy

from .play import TINY

PLAN = UpdatePlan(
    loss=CISPO(),
    num_updates=1,
    max_tokens=10_000,
    temperature=1.0,
    learning_rate=0.1,
    max_grad_norm=1e9,
    recompute_old=False,
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
        return {"rl/ratio_max": 1.0}, torch.zeros(sum(s.num_loss_tokens for s in mini_batch))

    monkeypatch.setattr("openm1.rl.update._mini_batch_step", note)
    _, metrics = update(model, samples, replace(PLAN, num_updates=num_updates))
    assert [len(mini_batch) for mini_batch in seen] == sizes
    assert metrics["rl/num_updates"] == len(sizes)
    dealt = [sample for mini_batch in seen for sample in mini_batch]
    assert sorted(dealt, key=samples.index) == samples
    if num_samples == 17:
        assert dealt != samples


@pytest.mark.parametrize("loss", [CISPO(), GRPO()])
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


@pytest.mark.parametrize("recompute", [True, False])
def test_the_ratio_is_anchored_where_the_plan_says(recompute: bool):
    model = model_without_balance_loss()
    samples = [
        replace(sample, old_logprobs=tuple(p - 0.5 for p in sample.old_logprobs))
        for sample in make_samples(model, 4)
    ]
    _, metrics = update(model, samples, replace(PLAN, recompute_old=recompute))
    assert metrics["rl/ratio_max"] == pytest.approx(1.0 if recompute else 2.718**0.5, rel=1e-3)
    # Whatever the anchor, the sampler is what the trainer is compared with.
    assert metrics["rl/sampler_kl_nats"] == pytest.approx(-0.5, abs=1e-4)


def test_probabilities_are_taken_at_the_plans_temperature_and_vocabulary():
    model = model_without_balance_loss()
    plan = replace(PLAN, temperature=0.7, vocab_size=300)
    (sample,) = make_samples(model, 1, plan)
    logits = model(torch.tensor([sample.token_ids]))[0, 2:-1, :300] / 0.7
    expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids[3:])[:, None])[:, 0]
    torch.testing.assert_close(
        torch.tensor(sample.old_logprobs, dtype=torch.float64), expected, rtol=0, atol=1e-6
    )
