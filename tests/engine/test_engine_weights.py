"""New weights, between requests and in the middle of them."""

from __future__ import annotations

import pytest
import torch

from openm1.model.m1 import M1ForCausalLM
from openm1.types import SamplingParams

from .tiny import (
    FP64_ERROR,
    alone,
    assert_same,
    complete,
    engine_for,
    grown,
    hybrid_model,
    poison_unused,
    random_prompts,
)


def other_model() -> M1ForCausalLM:
    other = hybrid_model(torch.float64, initializer_range=0.21)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    return other


def test_new_weights_change_the_reply_and_forget_prefixes() -> None:
    model, other = hybrid_model(torch.float64), other_model()
    engine = engine_for(model)
    params = SamplingParams(max_tokens=6, temperature=0.0)
    prompt = random_prompts((20,))[0]
    (first,) = complete(engine, [prompt], [params])
    assert set(first.policy_versions) == {0}
    assert len(first.policy_versions) == len(first.token_ids)
    engine.load_weights(other.named_parameters(), version=7)
    engine.check_integrity()
    assert engine.memory.in_use_bytes == 0
    second = grown(prompt, first, 20)
    (warm,) = complete(engine, [second], [params])
    (cold,) = complete(engine_for(other), [second], [params])
    assert warm.cached_tokens == 0 and set(warm.policy_versions) == {7}
    assert_same([warm], [cold], FP64_ERROR)
    # A trainer that shares its model: its own tensors are not copied.
    engine.load_weights(model.named_parameters(), version=8)
    assert engine.policy_version == 8


@pytest.mark.parametrize("in_flight", ["recompute", "keep"])
def test_weights_may_change_in_the_middle_of_a_reply(in_flight) -> None:
    model, before, other = hybrid_model(torch.float64), hybrid_model(torch.float64), other_model()
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = random_prompts((20, 33))
    old = alone(before, prompts, [params] * 2)
    engine = engine_for(model)
    requests = [engine.submit(prompt, params) for prompt in prompts]
    while len(requests[1].output_ids) < 5:
        engine.step()
    written = [len(request.output_ids) for request in requests]
    engine.load_weights(other.named_parameters(), version=3, in_flight=in_flight)
    engine.check_integrity()
    poison_unused(engine)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    for request, prompt, count, was in zip(requests, prompts, written, old, strict=True):
        reply = engine.completion(request)
        assert reply.policy_versions == (0,) * count + (3,) * (12 - count)
        assert reply.token_ids[:count] == was.token_ids[:count]
        # What it would say under the new weights to all that stood before.
        rest = SamplingParams(max_tokens=12 - count, temperature=0.0, ignore_eos=True)
        (new,) = complete(engine_for(other), [[*prompt, *reply.token_ids[:count]]], [rest])
        if in_flight == "recompute":
            assert reply.token_ids[count:] == new.token_ids
            assert reply.logprobs[count:] == pytest.approx(new.logprobs, abs=FP64_ERROR)
        else:
            # The cache is of the old weights: the first token already is scored differently.
            assert abs(reply.logprobs[count] - new.logprobs[0]) > 1e-3
    # Of mixed caches nothing is kept for others.
    again = complete(engine, prompts, [params] * 2)
    assert [c.cached_tokens for c in again] == ([0, 0] if in_flight == "keep" else [19, 32])
    assert_same(again, alone(other, prompts, [params] * 2), FP64_ERROR)


def test_bad_weights_are_refused_and_nothing_is_lost() -> None:
    model = hybrid_model(torch.float64)
    engine = engine_for(model)
    prompt = random_prompts((20,))[0]
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    (expected,) = complete(engine, [prompt], [params])
    request = engine.submit(prompt, params)
    engine.step()
    good = ("lm_head.weight", torch.zeros_like(model.lm_head.weight))
    for bad, message in [
        (("nonsense", torch.zeros(1)), "unknown weight 'nonsense'"),
        (("lm_head.weight", torch.zeros(32)), r"has shape \[32\]; expected \[96, 32\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.load_weights([good, bad], version=1)
    with pytest.raises(ValueError, match="in_flight is 'drop'; allowed are recompute, keep"):
        engine.load_weights([good], version=1, in_flight="drop")  # pyright: ignore
    while engine.has_work:
        engine.step()
    reply = engine.completion(request)
    assert reply.token_ids == expected.token_ids and reply.cached_tokens == 19
    assert set(reply.policy_versions) == {0}
