"""A request whose logits are no distribution fails alone."""

from __future__ import annotations

import asyncio

import pytest
import torch

from openm1.engine.client import EnginePolicy
from openm1.engine.engine import Engine
from openm1.engine.request import Request, RequestFailed
from openm1.engine.sampler import choose
from openm1.model.m1 import M1ForCausalLM
from openm1.types import Completion, SamplingParams

from .test_cpu_runner import WHOLE
from .tiny import (
    FP32_ERROR,
    FP64_ERROR,
    assert_same,
    engine_for,
    hybrid_model,
    mixed_params,
    poison_unused,
    random_prompts,
)

# Above the tokenizer's ids, so that no model writes it.
POISON = 95
KINDS = {
    "torch fp64": (torch.float64, "torch", FP64_ERROR),
    "cpu fp32": (torch.float32, "cpu", FP32_ERROR),
}
# The tile unit takes rows together, and what they are read with rounds more than they may differ:
# here the batches are the same up to the failure.
TILES = {"cpu bf16": (torch.bfloat16, "cpu", FP32_ERROR)}


def sound_prompts(count: int) -> list[list[int]]:
    prompts = random_prompts(tuple(5 + 3 * i for i in range(count)), seed=4)
    return [[token if token != POISON else POISON - 1 for token in prompt] for prompt in prompts]


def poisoned_model(kind: str) -> tuple[M1ForCausalLM, str, float]:
    """A model that one token of the prompt makes NaN of all that follows."""
    dtype, kernels, error = (KINDS | TILES)[kind]
    model = hybrid_model(dtype, **WHOLE)
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = torch.nan
    return model, kernels, error


def run(engine: Engine, requests: list[Request]) -> list[Completion]:
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    memory = engine.memory
    assert memory.in_use_bytes == memory.cached_bytes
    assert memory.num_states_in_use == memory.num_states_cached
    return [engine.completion(request) for request in requests]


@pytest.mark.parametrize("kind", KINDS)
def test_others_in_the_batch_are_unchanged(kind: str) -> None:
    model, kernels, error = poisoned_model(kind)
    prompts, params = sound_prompts(8), mixed_params(8)

    def engine() -> Engine:
        return engine_for(model, kernels=kernels)

    expected = []
    for each in zip(prompts, params, strict=True):
        one = engine()
        expected += run(one, [one.submit(*each)])
    together = engine()
    bad: list[Request] = []
    requests = []
    for index, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        if index % 3 == 1:  # Rows that are adjusted or cut fail elsewhere in the sampler.
            poisoned = [*prompt[:4], POISON, *prompt[4:]]
            bad += [
                together.submit(poisoned, SamplingParams(max_tokens=9, seed=1, **more))
                for more in ({}, {"top_p": 0.5}, {"presence_penalty": 1.0, "temperature": 0.0})
            ]
        requests.append(together.submit(prompt, each))
    assert_same(run(together, requests), expected, error)
    assert all(request.finish_reason == "abort" and request.error for request in bad)
    assert {str(request.error).partition(" the")[0] for request in bad} == {"after 0 tokens"}
    assert all(request.error is None for request in requests)


@torch.inference_mode()
def poison(engine: Engine, request: Request) -> None:
    """As if a step had gone wrong for this request alone."""
    assert request.sequence is not None
    pools = engine._runner.pools
    pools.states[request.sequence.slot] = torch.nan


@pytest.mark.parametrize("kind", KINDS | TILES)
def test_one_that_fails_midway_leaves_no_prefix_behind(kind: str) -> None:
    model, kernels, error = poisoned_model(kind)
    prompts = sound_prompts(4)
    params = [SamplingParams(max_tokens=30, seed=i, ignore_eos=True) for i in range(4)]
    fresh = engine_for(model, kernels=kernels)
    expected = run(fresh, [fresh.submit(*each) for each in zip(prompts, params, strict=True)])
    engine = engine_for(model, kernels=kernels)
    requests = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
    while len(requests[2].output_ids) < 10:
        engine.step()
    poison(engine, requests[2])
    for _ in range(3):
        poison_unused(engine)
        engine.step()
    assert requests[2].error is not None and len(requests[2].output_ids) == 10
    assert list(expected[2].token_ids[:10]) == requests[2].output_ids
    found = run(engine, requests)
    assert_same(found[:2] + found[3:], expected[:2] + expected[3:], error)
    if kind in KINDS:
        # Against one that was alone as well: beside others it is summed in another order.
        fresh = engine_for(model, kernels=kernels)
        alone = run(fresh, [fresh.submit(prompts[2], params[2])])
        assert_same(run(engine, [engine.submit(prompts[2], params[2])]), alone, error)


def test_rows_that_fail_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler names the rows that it came to; what is left is tried until nothing fails."""
    model, *_ = poisoned_model("torch fp64")
    engine = engine_for(model)
    tries = []

    def counted(logits, rows, **more):
        tries.append(len(rows))
        return choose(logits, rows, **more)

    monkeypatch.setattr("openm1.engine.engine.choose", counted)
    wishes = ({"presence_penalty": 1.0}, {}, {"top_k": 3}, {"temperature": 0.0})
    requests = [
        engine.submit([POISON, 20 + i], SamplingParams(max_tokens=4, seed=i, **wish))
        for i, wish in enumerate(wishes)
    ]
    good = engine.submit([20, 21], SamplingParams(max_tokens=4, seed=1, ignore_eos=True))
    run(engine, [good])
    assert all(request.error is not None for request in requests)
    assert len(good.output_ids) == 4
    assert tries[0] > tries[1] > 0 and 1 in tries


def test_all_of_a_batch_may_fail() -> None:
    model, *_ = poisoned_model("torch fp64")
    engine = engine_for(model)
    requests = [engine.submit([POISON, 20 + i], SamplingParams(max_tokens=4)) for i in range(3)]
    run(engine, requests)
    assert all(request.error is not None for request in requests)


def test_only_its_own_caller_is_told() -> None:
    model, *_ = poisoned_model("torch fp64")
    policy = EnginePolicy(engine_for(model))
    prompts = [*sound_prompts(3), [20, POISON]]
    params = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)

    async def work() -> list:
        asked = [policy.generate(prompt, params) for prompt in prompts]
        return await asyncio.gather(*asked, return_exceptions=True)

    *fine, failed = asyncio.run(asyncio.wait_for(work(), 30))
    assert all(isinstance(reply, Completion) and len(reply.token_ids) == 12 for reply in fine)
    with pytest.raises(RequestFailed, match="NaN"):
        raise failed
    policy.engine.check_integrity()
    assert not policy.engine.has_work
