from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openm1.rl.losses import (
    CISPO,
    DAPO,
    GRPO,
    PPO,
    REINFORCE,
    Loss,
    Praise,
    RatioAnchor,
    Unified,
    policy_loss,
    sample_shares,
)

# The same three factors multiplied in another order: one rounding of fp64 each.
ROUNDING = 1e-15

ALL = [
    CISPO(),
    DAPO(),
    GRPO(),
    PPO(),
    Praise(blame=1.0),
    REINFORCE(),
    Unified(eps_is_high=1.0, eps_high=0.5),
]
AGGREGATIONS = ["token", "sample", "prompt", "combined"]
LENGTHS = [7, 1, 12, 30]
PROMPTS = [4, 4, 9, 4]
INDEX = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Ratios from about 0.2 to 5, both signs of advantage, four samples."""
    count = sum(LENGTHS)
    old = -torch.rand(count, dtype=torch.float64) * 3
    logprobs = old + torch.randn(count, dtype=torch.float64) * 0.6
    advantages = torch.randn(len(LENGTHS), dtype=torch.float64)[INDEX]
    advantages[::3] *= -1
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": old,
        "advantages": advantages,
    }


def token_shares(config: Loss) -> Tensor:
    shares = sample_shares(config.aggregation, LENGTHS, PROMPTS)
    return torch.tensor(shares, dtype=torch.float64)[INDEX]


def gradient(config: Loss, batch: dict[str, Tensor]) -> Tensor:
    result = policy_loss(config, **batch, shares=token_shares(config))
    return torch.autograd.grad(result.loss, batch["logprobs"])[0]


def ppo_gradient(batch: dict[str, Tensor], low: float, high: float, aggregation: str) -> Tensor:
    """Of -mean(min(r A, clip(r) A)), differentiated through the ratio."""
    ratio = (batch["logprobs"] - batch["old_logprobs"]).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    terms = torch.minimum(ratio * batch["advantages"], clipped * batch["advantages"])
    if aggregation == "token":
        objective = terms.mean()
    else:
        objective = torch.stack([part.mean() for part in terms.split(LENGTHS)]).mean()
    return torch.autograd.grad(-objective, batch["logprobs"])[0]


@pytest.mark.parametrize("aggregation", ["token", "sample"])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.2, 0.2), (0.05, 1.0), (0.0, 0.0)])
def test_without_the_weights_clip_the_gradient_is_exactly_that_of_ppo(
    batch, low: float, high: float, aggregation
):
    theirs = ppo_gradient(batch, low, high, aggregation)
    assert 0 < int((theirs == 0).sum()) < len(theirs)
    configs: list[Loss] = [
        Unified(eps_low=low, eps_high=high, aggregation=aggregation),
        DAPO(eps_low=low, eps_high=high, aggregation=aggregation),
        GRPO(eps_low=low, eps_high=high, aggregation=aggregation),
    ]
    if low == high:
        configs.append(PPO(eps=low, aggregation=aggregation))
    for config in configs:
        assert torch.equal(gradient(config, batch), theirs)


def test_the_unified_loss_without_a_mask_is_cispo(batch):
    unified = Unified(eps_is_low=1.0, eps_is_high=0.5)
    assert torch.equal(gradient(unified, batch), gradient(CISPO(eps_is_high=0.5), batch))


def test_cispo_is_what_trl_calls_cispo(batch):
    """An oracle in numpy on padded rows, as TRL's GRPOTrainer has them with loss_type="cispo": the
    ratio has an absolute cap and no floor, and the sum is over the number of completion tokens."""
    cap = 1.5
    shape = (len(LENGTHS), max(LENGTHS))
    mask = numpy.arange(shape[1])[None] < numpy.array(LENGTHS)[:, None]
    rows = {name: numpy.zeros(shape) for name in batch}
    for name, padded in rows.items():
        padded[mask] = batch[name].detach().numpy()
    capped = numpy.minimum(numpy.exp(rows["logprobs"] - rows["old_logprobs"]), cap)
    derivative = -capped * rows["advantages"] * mask / mask.sum()
    config = CISPO(eps_is_high=cap - 1)
    loss = policy_loss(config, **batch, shares=token_shares(config)).loss
    expected = float((derivative * rows["logprobs"]).sum())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    ours = gradient(config, batch).numpy()
    assert abs(ours - derivative[mask]).max() <= ROUNDING


def test_ppo_and_the_policy_gradient_differ():
    # Guards the oracle above: it must be able to tell losses apart.
    torch.manual_seed(0)
    batch = {
        "logprobs": torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True),
        "old_logprobs": torch.tensor([-2.0, -0.5], dtype=torch.float64),
        "advantages": torch.tensor([1.0, 1.0], dtype=torch.float64),
    }
    assert ppo_gradient(batch, 0.2, 0.2, "token")[0] == 0
    assert ppo_gradient(batch, 0.2, 0.2, "token")[1] < 0


def test_cispo_weighs_log_probabilities_by_the_clipped_ratio(batch):
    ratio = (batch["logprobs"] - batch["old_logprobs"]).exp().detach()
    config = CISPO(eps_is_high=0.5)
    assert bool((ratio > 1.5).any())
    expected = -ratio.clamp(0, 1.5) * batch["advantages"] / sum(LENGTHS)
    assert float((gradient(config, batch) - expected).abs().max()) <= ROUNDING


@given(st.floats(1e-6, 1e6), st.sampled_from([-2.0, -0.1, 0.1, 2.0]))
def test_cispo_drops_no_token_and_has_no_floor(ratio: float, advantage: float):
    tensor = torch.tensor([ratio], dtype=torch.float64)
    weight = CISPO().token_weights(tensor, torch.tensor([advantage], dtype=torch.float64))
    assert float(weight) == min(ratio, 5.0)


def test_clips_are_offsets_from_one():
    ratio = torch.tensor([0.01, 0.5, 0.79, 0.81, 1.0, 1.19, 1.27, 1.29, 4.9, 5.1])
    up, down = torch.ones_like(ratio), -torch.ones_like(ratio)

    def weights(config: Loss, advantages: Tensor) -> list[float]:
        return [round(w, 4) for w in config.token_weights(ratio, advantages).tolist()]

    plain = [round(r, 4) for r in ratio.tolist()]
    for advantages in (up, down):
        assert weights(CISPO(), advantages) == [*plain[:-1], 5.0]
        assert weights(CISPO(eps_is_low=0.2, eps_is_high=0.2), advantages) == (
            [0.8, 0.8, 0.8, 0.81, 1.0, 1.19, 1.2, 1.2, 1.2, 1.2]
        )
        assert weights(REINFORCE(), advantages) == [1.0] * len(plain)
    # PPO's mask is one-sided: what moved the way its advantage asks for is left alone.
    assert weights(DAPO(), up) == [*plain[:7], 0.0, 0.0, 0.0]
    assert weights(DAPO(), down) == [0.0, 0.0, 0.0, *plain[3:]]
    assert weights(GRPO(), up) == [*plain[:6], 0.0, 0.0, 0.0, 0.0]
    assert weights(GRPO(), down) == weights(DAPO(), down)


def test_praise_is_cispo_where_the_advantage_is_positive_and_a_share_of_it_elsewhere():
    ratio = torch.tensor([0.1, 1.0, 3.0, 9.0])
    up, down = torch.ones_like(ratio), -torch.ones_like(ratio)
    cispo = CISPO().token_weights(ratio, up)
    for blame in (0.0, 0.25, 1.0):
        config = Praise(blame=blame)
        assert torch.equal(config.token_weights(ratio, up), cispo)
        assert torch.equal(config.token_weights(ratio, down), blame * cispo)
    assert Praise(eps_is_high=1.0).token_weights(ratio, up).tolist() == pytest.approx(
        [0.1, 1.0, 2.0, 2.0]
    )


def test_more_blame_than_praise_is_refused():
    with pytest.raises(ValueError, match=r"blame is 1\.5; allowed is 0 to 1"):
        Praise(blame=1.5)


def test_without_blame_the_tokens_of_worse_replies_are_left_alone(batch):
    worse = batch["advantages"] < 0
    ours = gradient(Praise(blame=0.0), batch)
    assert 0 < int(worse.sum()) < len(worse)
    assert bool((ours[worse] == 0).all())
    assert torch.equal(ours[~worse], gradient(CISPO(), batch)[~worse])


def test_all_four_numbers_act_at_once():
    ratio, advantages = torch.tensor([0.1, 0.1, 3.0, 3.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    config = Unified(eps_is_low=0.5, eps_is_high=0.25, eps_low=0.2, eps_high=0.2)
    weights = config.token_weights(ratio, advantages)
    assert weights.tolist() == [0.5, 0.0, 0.0, 1.25]


@pytest.mark.parametrize("config", ALL, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_on_the_policy_every_loss_is_the_plain_policy_gradient(batch, config, aggregation):
    batch["old_logprobs"] = batch["logprobs"].detach().clone()
    ours = gradient(replace(config, aggregation=aggregation), batch)
    plain = gradient(REINFORCE(aggregation=aggregation), batch)
    assert float(plain.norm()) > 0
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_loss_is_the_mean_its_aggregation_names(batch, aggregation):
    config = CISPO(aggregation=aggregation)
    loss = policy_loss(config, **batch, shares=token_shares(config)).loss
    terms: list[list[float]] = [[] for _ in LENGTHS]
    columns = (tensor.tolist() for tensor in (*batch.values(), INDEX))
    for logprob, old, advantage, sample in zip(*columns, strict=True):
        weight = min(math.exp(logprob - old), 5.0)
        terms[sample].append(-weight * advantage * logprob)
    by_token = fmean(term for row in terms for term in row)
    by_sample = fmean(fmean(row) for row in terms)
    first, second = terms[0] + terms[1] + terms[3], terms[2]
    expected = {
        "token": by_token,
        "sample": by_sample,
        "prompt": (fmean(first) + fmean(second)) / 2,
        "combined": (by_token + by_sample) / 2,
    }
    assert float(loss.detach()) == pytest.approx(expected[aggregation], rel=1e-12)
    others = [value for name, value in expected.items() if name != aggregation]
    assert all(abs(value - expected[aggregation]) > 1e-6 for value in others)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_shares_of_all_tokens_sum_to_one(aggregation):
    shares = sample_shares(aggregation, LENGTHS, PROMPTS)
    assert sum(s * n for s, n in zip(shares, LENGTHS, strict=True)) == pytest.approx(1.0)


def test_a_mismatch_scales_each_token(batch):
    mismatch = torch.rand(sum(LENGTHS), dtype=torch.float64)
    result = policy_loss(CISPO(), **batch, shares=token_shares(CISPO()), mismatch=mismatch)
    scaled = torch.autograd.grad(result.loss, batch["logprobs"])[0]
    torch.testing.assert_close(scaled, gradient(CISPO(), batch) * mismatch, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("config", "interval"),
    [
        (CISPO(), (0.0, 5.0)),
        (CISPO(eps_is_low=math.inf), (0.0, 5.0)),
        (CISPO(eps_is_low=0.2, eps_is_high=0.2), (0.8, 1.2)),
        (Unified(eps_is_high=3.0), (0.0, 4.0)),
        (DAPO(), (0.0, math.inf)),
        (GRPO(), (0.0, math.inf)),
        (PPO(), (0.0, math.inf)),
        (Praise(), (0.0, 5.0)),
        (Praise(eps_is_high=1.0, blame=0.5), (0.0, 2.0)),
        (REINFORCE(), (1.0, 1.0)),
    ],
)
def test_the_interval_of_a_loss_holds_its_weights_and_is_no_wider(config: Loss, interval):
    assert config.weight_interval == interval
    # No advantage: nothing is dropped, so every weight is that of the clip alone.
    ratio = torch.logspace(-9, 9, 400, dtype=torch.float64)
    weights = config.token_weights(ratio, torch.zeros_like(ratio))
    assert float(weights.min()) == pytest.approx(interval[0], abs=1e-8)
    assert float(weights.max()) == pytest.approx(min(interval[1], 1e9), rel=1e-8)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (CISPO, "eps_is_low"),
        (CISPO, "eps_is_high"),
        (DAPO, "eps_high"),
        (GRPO, "eps_low"),
        (PPO, "eps"),
        (Praise, "blame"),
        (Unified, "eps_high"),
    ],
)
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_impossible_clips_are_refused(kind: type, name: str, value: float):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        kind(**{name: value})


@pytest.mark.parametrize("config", ALL, ids=lambda config: type(config).__name__)
def test_an_unknown_aggregation_is_refused(config: Loss):
    with pytest.raises(ValueError, match="aggregation is 'batch'; allowed are token, sample"):
        replace(config, aggregation="batch")


def test_the_mismatch_is_never_corrected_twice():
    with pytest.raises(ValueError, match=r"mismatch_cap is 2.0 with anchor 'sampler', whose ratio"):
        RatioAnchor(at="sampler", mismatch_cap=2.0)
    assert RatioAnchor(at="old", mismatch_cap=2.0).mismatch_cap == 2.0


def test_impossible_anchors_are_refused():
    with pytest.raises(ValueError, match="anchor is 'reference'; allowed are old, sampler"):
        RatioAnchor(at="reference")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"mismatch_cap is 0.0; allowed is above 0"):
        RatioAnchor(at="old", mismatch_cap=0.0)
