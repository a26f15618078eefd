from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openm1.common.track import read_metrics
from openm1.model.m1 import M1ForCausalLM
from openm1.recipes.runs import load_start
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.rl.batch import Sample
from openm1.rl.config import RLConfig
from openm1.rl.critic import Critic, CriticTrainer, ValueHead, gae, value_loss
from openm1.rl.local import train_rl_locally
from openm1.rl.losses import PPO
from openm1.train.checkpoint import RunFolder
from openm1.train.optim import AdamWConfig

from .play import TINY
from .test_loop import mixture


def test_generalised_advantages_by_hand():
    # gamma 1/2, lambda 1/2, reward 1 at the end. By hand, from the last token backwards:
    # d2 = 1 - .5 = .5; d1 = .5*.5 - .25 = 0; d0 = .5*.25 - 1 = -.875;
    # A2 = .5; A1 = 0 + .25*.5 = .125; A0 = -.875 + .25*.125 = -.84375.
    values = torch.tensor([1.0, 0.25, 0.5], dtype=torch.float64)
    found = gae(values, 1.0, gamma=0.5, lam=0.5)
    assert found.tolist() == [-0.84375, 0.125, 0.5]


def test_the_two_ends_of_lambda():
    values = torch.randn(7, dtype=torch.float64)
    # lambda 1: what was earned beyond what was expected.
    torch.testing.assert_close(gae(values, 0.75, gamma=1.0, lam=1.0), 0.75 - values)
    # lambda 0: one step of difference.
    after = torch.cat([values[1:], values.new_tensor([0.75])])
    torch.testing.assert_close(
        gae(values, 0.75, gamma=0.9, lam=0.0)[:-1], (0.9 * after - values)[:-1]
    )
    assert gae(values, 0.75, gamma=0.9, lam=0.0)[-1] == 0.75 - values[-1]


def test_the_value_loss_is_clipped_to_its_worse_side():
    old = torch.tensor([0.0, 0.0, 0.0])
    values = torch.tensor([0.5, 0.5, 0.1])
    targets = torch.tensor([1.0, 0.2, 1.0])
    # Clipped to 0.2 the first is worse off (.64 > .25), the second better (0 < .09).
    expected = 0.5 * (0.64 + 0.09 + 0.81) / 3
    assert float(value_loss(values, old, targets, 0.2)) == pytest.approx(expected)
    plain = 0.5 * (0.25 + 0.09 + 0.81) / 3
    assert float(value_loss(values, old, targets, None)) == pytest.approx(plain)


def samples(model: M1ForCausalLM, count: int) -> list[Sample]:
    """What is earned is told by the prompt's last token; a turn of the environment is between."""
    made = []
    for number in range(count):
        good = number % 2
        ids = (5, 6 + good, 20, 21, 30, 22)
        made.append(
            Sample(
                token_ids=ids,
                loss_mask=(False, False, True, True, False, True),
                old_logprobs=(-1.0, -1.0, -1.0),
                advantage=9.0,
                reward=float(good),
                prompt=number,
            )
        )
    return made


@pytest.mark.parametrize("max_tokens", [7, 10_000])
def test_the_head_learns_what_can_be_expected(max_tokens: int):
    model = M1ForCausalLM(TINY.config(nano_tokenizer()))
    before = [p.clone() for p in model.parameters()]
    critic = CriticTrainer(model, Critic(num_epochs=30, normalise=False, clip=None))
    batch = samples(model, 6)
    first, metrics = critic.learn(batch, max_tokens)
    # A head that says 0 makes the reward the advantage, discounted by lambda alone.
    assert first[1].advantages == pytest.approx((0.95**2, 0.95, 1.0))
    assert first[0].advantages == (0.0, 0.0, 0.0)
    assert metrics["critic/explained_variance"] == pytest.approx(0.0, abs=1e-6)
    for _ in range(5):
        later, metrics = critic.learn(batch, max_tokens)
    assert metrics["critic/explained_variance"] > 0.9
    assert all(abs(a) < 0.2 for sample in later for a in sample.advantages)
    # The policy's own weights are not the critic's to change.
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_advantages_of_a_batch_can_be_normalised():
    model = M1ForCausalLM(TINY.config(nano_tokenizer()))
    found, _ = CriticTrainer(model, Critic()).learn(samples(model, 6), 100)
    advantages = torch.tensor([a for sample in found for a in sample.advantages])
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(advantages.std()) == pytest.approx(1.0, abs=1e-6)


def test_a_critic_goes_on_where_it_was_saved():
    model = M1ForCausalLM(TINY.config(nano_tokenizer()))
    one, other = (CriticTrainer(model, Critic()) for _ in range(2))
    batch = samples(model, 6)
    one.learn(batch, 100)
    # As it comes from a file: with no tensor of the first one's in it.
    other.load_state(deepcopy(one.state()))
    assert one.learn(batch, 100) == other.learn(batch, 100)


def test_a_new_head_expects_nothing():
    assert ValueHead(8)(torch.randn(3, 8, dtype=torch.bfloat16)).tolist() == [0.0] * 3


def test_ppo_with_a_critic_learns_what_is_rewarded(tmp_path: Path, guesser: Path):
    config = RLConfig(
        num_steps=14,
        num_prompts=8,
        group_size=8,
        num_updates=4,
        max_response_tokens=6,
        loss=PPO(),
        critic=Critic(),
        dynamic_sampling=False,
        optimizer=AdamWConfig(learning_rate=3e-3),
        save_every_steps=7,
    )
    model, tokenizer = load_start(guesser)
    folder = RunFolder.open(tmp_path, config)
    train_rl_locally(model, tokenizer, mixture(), config, folder)
    rows = read_metrics(folder.metrics)
    assert rows[0]["rollout/reward"] < 0.35
    assert rows[-1]["rollout/reward"] > 0.9
    # It comes to expect what is earned.
    assert abs(rows[0]["critic/value_mean"]) < 0.1 and rows[-1]["critic/value_mean"] > 0.5
    assert folder.load_config(RLConfig) == config


@pytest.mark.parametrize(
    ("name", "value"), [("lam", 1.5), ("gamma", -1), ("num_epochs", 0), ("clip", 0.0)]
)
def test_impossible_critics_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name} is {value}; allowed"):
        replace(Critic(), **{name: value})
