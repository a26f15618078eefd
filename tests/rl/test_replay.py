"""Expert choices recorded by the engine and replayed by the trainer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openm1.common.track import read_metrics
from openm1.engine.config import EngineConfig
from openm1.engine.llm import LLM
from openm1.envs.chain import ChainTaskset
from openm1.envs.mixture import Mixture
from openm1.model.m1 import M1ForCausalLM
from openm1.recipes.runs import load_start
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.rl.batch import BatchConfig, Sample, group_samples, pack_samples
from openm1.rl.config import RLConfig
from openm1.rl.local import train_rl_locally
from openm1.rollout.run import run_group
from openm1.train.checkpoint import RunFolder
from openm1.train.loss import score_tokens
from openm1.train.optim import AdamWConfig
from openm1.types import RolloutGroup, SamplingParams
from tests.model.tiny import one_expert_config

from .play import TINY, nano_format
from .test_loop import mixture

SHAPE = replace(TINY, num_local_experts=4)


def model_of(seed: int = 3) -> M1ForCausalLM:
    return M1ForCausalLM(SHAPE.config(nano_tokenizer()), seed=seed)


def sampled(model: M1ForCausalLM, page_tokens: int = 4) -> list[Sample]:
    """Rollouts of two groups, each of which shares its prompt in the cache."""
    config = EngineConfig(record_experts=True, page_tokens=page_tokens)
    llm = LLM(model, tokenizer=nano_tokenizer(), config=config)
    tasks = [Mixture([ChainTaskset()]).task(i) for i in range(2)]

    async def play() -> list[RolloutGroup]:
        params = SamplingParams(max_tokens=20, repetition_stop_tokens=0)
        jobs = [
            run_group(llm.policy, taskset, task, nano_format(), params, seeds=[1, 2, 3])
            for taskset, task in tasks
        ]
        return await asyncio.gather(*jobs)

    groups = asyncio.run(play())
    return [s for i, g in enumerate(groups) for s in group_samples(g, i, BatchConfig(), 20)]


def choices(model: M1ForCausalLM, samples: list[Sample], *, replay: bool) -> torch.Tensor:
    """[T, L * K] of the trainer's pass."""
    batch = pack_samples(samples)
    given = None
    if replay:
        assert batch.experts is not None
        given = batch.experts.unflatten(1, (4, -1))
    seen: list[torch.Tensor] = []
    model.model(batch.packed.input_ids, batch.packed.layout, experts=given, seen=seen)
    return torch.cat(seen, 1)


def test_what_is_recorded_is_what_the_trainer_would_choose():
    model = model_of()
    samples = sampled(model)
    recorded = pack_samples(samples).experts
    assert recorded is not None and recorded.shape[1] == 4 * 2
    known = recorded[:, 0] >= 0
    # Only prompts that were found in the cache are not there, and all that was written is.
    assert 0.5 < float(known.float().mean()) <= 1
    for sample in samples:
        rows = sample.experts
        assert len(rows) == len(sample.token_ids) - 1
        first = sample.loss_mask.index(True)
        assert all(len(row) == 8 for row in rows[first - 1 :])
    assert torch.equal(choices(model, samples, replay=False)[known], recorded[known])


def test_replay_sends_tokens_where_they_went_whatever_the_router_says_now():
    model = model_of()
    samples = sampled(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.block_sparse_moe.gate.weight.add_(
                0.5 * torch.randn_like(layer.block_sparse_moe.gate.weight)
            )
    batch = pack_samples(samples)
    assert batch.experts is not None
    known = batch.experts[:, 0] >= 0
    free, replayed = (choices(model, samples, replay=flag) for flag in (False, True))
    assert float((free != replayed)[known].float().mean()) > 0.1
    assert torch.equal(replayed[known], batch.experts[known])
    scores = score_tokens(model, batch.packed, experts=batch.experts)
    scores.logprobs.sum().backward()
    # The router still learns how much weight the given experts get.
    assert all(
        float(layer.block_sparse_moe.gate.weight.grad.norm()) > 0 for layer in model.model.layers
    )


def test_replay_of_its_own_choices_changes_nothing():
    model = model_of()
    samples = sampled(model)
    packed = pack_samples(samples).packed
    own = choices(model, samples, replay=False)
    with torch.no_grad():
        expected = score_tokens(model, packed).logprobs
        assert torch.equal(score_tokens(model, packed, experts=own).logprobs, expected)


def test_the_fused_kernels_cannot_record():
    with pytest.raises(ValueError, match="kernels is 'cpu' with record_experts"):
        EngineConfig(record_experts=True, kernels="cpu")
    llm = LLM(M1ForCausalLM(one_expert_config()), config=EngineConfig(record_experts=True))
    with pytest.raises(ValueError, match="record_experts with 1 experts"):
        llm.generate([[4]], SamplingParams(max_tokens=1))


def test_a_run_with_replay_learns(tmp_path: Path, guesser: Path):
    config = RLConfig(
        num_steps=8,
        num_prompts=8,
        group_size=8,
        num_updates=4,
        max_response_tokens=6,
        optimizer=AdamWConfig(learning_rate=3e-3),
        replay_experts=True,
        save_every_steps=100,
    )
    model, tokenizer = load_start(guesser)
    folder = RunFolder.open(tmp_path, config)
    train_rl_locally(model, tokenizer, mixture(), config, folder)
    rows = read_metrics(folder.metrics)
    assert rows[-1]["rollout/reward"] > 0.8
    assert rows[0]["rl/probability_max_difference"] < 1e-4
