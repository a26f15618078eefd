from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openm1.rl.losses import CISPO, DAPO, GRPO, REINFORCE, Loss, policy_loss, unified_weights

# The same three factors multiplied in another order: one rounding of fp64 each.
ROUNDING = 1e-15

ALL = [CISPO(), DAPO(), GRPO(), REINFORCE()]
LENGTHS = [7, 1, 12, 30]


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Ratios from about 0.2 to 5, both signs of advantage, four samples."""
    count = sum(LENGTHS)
    old = -torch.rand(count, dtype=torch.float64) * 3
    logprobs = old + torch.randn(count, dtype=torch.float64) * 0.6
    index = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    advantages = torch.randn(len(LENGTHS), dtype=torch.float64)[index]
    advantages[::3] *= -1
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": old,
        "advantages": advantages,
        "sample_index": index,
    }


def gradient(config: Loss, batch: dict[str, Tensor]) -> Tensor:
    result = policy_loss(config, **batch, num_tokens=sum(LENGTHS), num_samples=len(LENGTHS))
    return torch.autograd.grad(result.loss, batch["logprobs"])[0]


def ppo_gradient(batch: dict[str, Tensor], low: float, high: float, normalisation: str) -> Tensor:
    """Of -mean(min(r A, clip(r) A)), differentiated through the ratio."""
    ratio = (batch["logprobs"] - batch["old_logprobs"]).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    terms = torch.minimum(ratio * batch["advantages"], clipped * batch["advantages"])
    if normalisation == "token":
        objective = terms.mean()
    else:
        objective = torch.stack([part.mean() for part in terms.split(LENGTHS)]).mean()
    return torch.autograd.grad(-objective, batch["logprobs"])[0]


@pytest.mark.parametrize("normalisation", ["token", "sample"])
@pytest.mark.parametrize(
    "config", [DAPO(), GRPO(), DAPO(eps_low=0.05, eps_high=1.0), GRPO(eps_low=0.0, eps_high=0.0)]
)
def test_without_the_weights_clip_the_gradient_is_that_of_ppo(batch, config, normalisation):
    config = type(config)(
        eps_low=config.eps_low, eps_high=config.eps_high, normalisation=normalisation
    )
    ours = gradient(config, batch)
    theirs = ppo_gradient(batch, config.eps_low, config.eps_high, normalisation)
    assert 0 < int((theirs == 0).sum()) < len(theirs)
    assert float((ours - theirs).abs().max()) <= ROUNDING


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


def test_all_four_numbers_act_at_once():
    ratio, advantages = torch.tensor([0.1, 0.1, 3.0, 3.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    weights = unified_weights(
        ratio, advantages, eps_is_low=0.5, eps_is_high=0.25, eps_low=0.2, eps_high=0.2
    )
    assert weights.tolist() == [0.5, 0.0, 0.0, 1.25]


@pytest.mark.parametrize("config", ALL, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("normalisation", ["token", "sample"])
def test_on_the_policy_every_loss_is_the_plain_policy_gradient(batch, config, normalisation):
    batch["old_logprobs"] = batch["logprobs"].detach().clone()
    ours = gradient(type(config)(normalisation=normalisation), batch)
    plain = gradient(REINFORCE(normalisation=normalisation), batch)
    assert float(plain.norm()) > 0
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("normalisation", ["token", "sample"])
def test_the_loss_is_a_mean_over_tokens_or_over_samples(batch, normalisation):
    config = CISPO(normalisation=normalisation)
    loss = policy_loss(config, **batch, num_tokens=sum(LENGTHS), num_samples=len(LENGTHS)).loss
    terms: list[list[float]] = [[] for _ in LENGTHS]
    for logprob, old, advantage, sample in zip(
        *(tensor.tolist() for tensor in batch.values()), strict=True
    ):
        weight = min(math.exp(logprob - old), 5.0)
        terms[sample].append(-weight * advantage * logprob)
    if normalisation == "token":
        expected = sum(map(sum, terms)) / sum(LENGTHS)
    else:
        expected = sum(sum(row) / len(row) for row in terms) / len(LENGTHS)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("config", ALL, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("normalisation", ["token", "sample"])
def test_micro_batches_of_whole_samples_add_up(batch, config, normalisation):
    config = type(config)(normalisation=normalisation)
    total = torch.zeros_like(batch["logprobs"])
    for samples in ((0, 1), (2, 3)):
        rows = (batch["sample_index"] >= samples[0]) & (batch["sample_index"] <= samples[1])
        part = {name: tensor[rows] for name, tensor in batch.items()}
        part["sample_index"] = part["sample_index"] - samples[0]
        result = policy_loss(config, **part, num_tokens=sum(LENGTHS), num_samples=len(LENGTHS))
        total += torch.autograd.grad(result.loss, batch["logprobs"])[0]
    torch.testing.assert_close(total, gradient(config, batch), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(CISPO, "eps_is_low"), (CISPO, "eps_is_high"), (DAPO, "eps_high"), (GRPO, "eps_low")],
)
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_impossible_clips_are_refused(kind: type, name: str, value: float):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        kind(**{name: value})
