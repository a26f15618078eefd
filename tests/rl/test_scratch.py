"""The example without the framework computes what the framework does."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from openm1.rl.advantage import group_advantages
from openm1.rl.losses import CISPO, policy_loss, sample_shares

EXAMPLE = Path(__file__).parents[2] / "examples" / "03_cispo_from_scratch.py"
LENGTHS = [5, 1, 8, 3]


@pytest.fixture(scope="module")
def scratch() -> dict:
    return runpy.run_path(str(EXAMPLE))


def test_it_learns(scratch: dict):
    assert scratch["history"][0] < 0.2
    assert scratch["history"][-1] > 0.9


def test_its_loss_and_gradient_are_the_frameworks(scratch: dict):
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    old = -torch.rand(mask.shape, dtype=torch.float64) * 3
    logprobs = (old + torch.randn_like(old)).requires_grad_()
    advantages = torch.randn(len(LENGTHS), dtype=torch.float64)
    theirs = scratch["cispo_loss"](logprobs, old, advantages, mask, eps_is_high=0.5)
    (their_gradient,) = torch.autograd.grad(theirs, logprobs)

    rows = mask.nonzero()[:, 0]
    shares = torch.tensor(sample_shares("token", LENGTHS, LENGTHS), dtype=torch.float64)
    config = CISPO(eps_is_high=0.5)
    result = policy_loss(config, logprobs[mask], old[mask], advantages[rows], shares[rows])
    assert bool((result.weights == 1.5).any())
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    torch.testing.assert_close(theirs, result.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(their_gradient, gradient, rtol=1e-12, atol=0)


def test_its_advantages_are_the_frameworks(scratch: dict):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.5, 0.0, 1.0, 0.25]])
    expected = torch.tensor([group_advantages(row) for row in rewards.tolist()])
    torch.testing.assert_close(scratch["group_advantages"](rewards), expected)
