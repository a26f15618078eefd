"""A request's tokens depend on its prompt and seed alone, whatever runs beside it or ran before."""

from __future__ import annotations

import random

import pytest
import torch

from openm1.common.device import available_memory_bytes
from openm1.engine.config import EngineConfig
from openm1.engine.request import Request
from openm1.model.m1 import M1ForCausalLM
from openm1.types import SamplingParams

from .tiny import (
    FP32_ERROR,
    FP64_ERROR,
    LENGTHS,
    VOCAB,
    alone,
    assert_same,
    complete,
    engine_for,
    grown,
    hybrid_config,
    hybrid_model,
    mixed_params,
    poison_unused,
    random_prompts,
)


@pytest.fixture(scope="module")
def twenty():
    """A model, twenty prompts, and what each gives alone."""
    model = hybrid_model(torch.float64)
    prompts, params = random_prompts(), mixed_params(len(LENGTHS))
    return model, prompts, params, alone(model, prompts, params)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_seqs": 7},
        {"max_step_tokens": 37},
        {"max_num_seqs": 3, "max_step_tokens": 1},
    ],
    ids=str,
)
def test_twenty_prompts_in_a_batch_give_what_each_gives_alone(twenty, limits) -> None:
    model, prompts, params, expected = twenty
    # Long ones prefilled token by token take long and show nothing that short ones do not.
    longest = 20 if limits.get("max_step_tokens") == 1 else 200
    keep = [i for i, prompt in enumerate(prompts) if len(prompt) <= longest]
    for shuffled in (False, True):
        order = random.Random(3).sample(keep, len(keep)) if shuffled else keep
        engine = engine_for(model, **limits)
        batched = complete(engine, [prompts[i] for i in order], [params[i] for i in order])
        assert_same(batched, [expected[i] for i in order], FP64_ERROR)


def test_so_do_they_in_fp32() -> None:
    model, prompts, params = hybrid_model(), random_prompts(), mixed_params(len(LENGTHS))
    batched = complete(engine_for(model, max_num_seqs=12), prompts, params)
    assert_same(batched, alone(model, prompts, params), FP32_ERROR)


def test_late_comers_change_nothing(twenty) -> None:
    """Requests that arrive while others are being decoded."""
    model, prompts, params, expected = twenty
    engine = engine_for(model)
    requests = []
    for prompt, each in zip(prompts, params, strict=True):
        requests.append(engine.submit(prompt, each))
        engine.step()
    while engine.has_work:
        engine.step()
    assert_same([engine.completion(request) for request in requests], expected, FP64_ERROR)


def test_what_random_models_say_depends_on_the_prompt(twenty) -> None:
    """Otherwise the tests above would prove nothing."""
    expected = twenty[-1]
    assert len({c.token_ids for c in expected}) == len(expected)
    assert len({token for c in expected for token in c.token_ids}) > 30


def test_logprobs_are_those_of_a_full_forward_pass(twenty) -> None:
    model, prompts, params, expected = twenty
    for prompt, each, completion in zip(prompts, params, expected, strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            logits = model(ids)[0, len(prompt) - 1 : -1, :VOCAB]
        if each.temperature == 0:
            assert logits.argmax(-1).tolist() == list(completion.token_ids)
        logprobs = (logits / (each.temperature or 1.0)).log_softmax(-1)
        oracle = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
        assert completion.logprobs == pytest.approx(oracle, abs=FP64_ERROR, rel=0)


def test_poisoned_pages_and_slots_are_never_read(twenty) -> None:
    """Whatever nobody refers to is NaN before each step; the second time much is found cached."""
    model, prompts, params, expected = twenty
    engine = engine_for(model, max_num_seqs=8, max_step_tokens=100)
    for _ in range(2):
        requests = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
        while engine.has_work:
            poison_unused(engine)
            engine.step()
            engine.check_integrity()
        assert_same([engine.completion(r) for r in requests], expected, FP64_ERROR)
    assert sum(r.num_cached for r in requests) > 1000


def bytes_for(engine, num_tokens: int) -> int:
    return engine._scheduler.cache.sizes.bytes_for(num_tokens)


def test_a_tight_budget_preempts_and_changes_nothing() -> None:
    """Six grow side by side where two have room at their full length."""
    model = hybrid_model(torch.float64)
    prompts = random_prompts((8, 9, 10, 11, 12, 13))
    params = [SamplingParams(max_tokens=24, seed=i, ignore_eos=True) for i in range(6)]
    expected = alone(model, prompts, params)
    probe = engine_for(model)
    complete(probe, [[20]], [SamplingParams(max_tokens=1)])
    budget = 2 * bytes_for(probe, 40)
    engine = engine_for(model, memory_budget_bytes=budget)
    requests = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
    started: set[Request] = set()
    preempted: set[Request] = set()
    while engine.has_work:
        poison_unused(engine)
        engine.step()
        engine.check_integrity()
        assert engine.memory.in_use_bytes <= budget
        preempted |= {r for r in started if r.sequence is None and r.finish_reason is None}
        started |= {r for r in requests if r.sequence is not None}
    assert len(preempted) > 1
    assert_same([engine.completion(r) for r in requests], expected, FP64_ERROR)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_second_turn_equals_a_cold_start(temperature: float) -> None:
    model = hybrid_model(torch.float64)
    params = SamplingParams(max_tokens=9, temperature=temperature, seed=4)
    engine = engine_for(model)
    prompt = random_prompts((30,))[0]
    for turn in range(3):
        (warm,) = complete(engine, [prompt], [params])
        (cold,) = complete(engine_for(model), [prompt], [params])
        assert_same([warm], [cold], FP64_ERROR)
        assert cold.cached_tokens == 0
        # All but the newest sampled token and what the user added.
        assert warm.cached_tokens == (len(prompt) - 4 if turn else 0)
        prompt = grown(prompt, warm, 20, 21, 22)


def test_a_second_turn_computes_only_what_is_new() -> None:
    model = hybrid_model()
    engine = engine_for(model)
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    prompt = random_prompts((40,))[0]
    (first,) = complete(engine, [prompt], [params])
    counted = count_tokens(model)
    complete(engine, [grown(prompt, first, 20, 21)], [params])
    # The newest token of the first turn, two new ones, and four decoded.
    assert sum(counted) == 1 + 2 + 4


def count_tokens(model: M1ForCausalLM) -> list[int]:
    counted: list[int] = []
    model.model.register_forward_pre_hook(lambda _, inputs: counted.append(len(inputs[0])))
    return counted


# What the first turn left: a snapshot before the last token of its prompt of 30, and one of all it
# computed, 35 tokens.
@pytest.mark.parametrize(
    ("change", "cached", "cached_again"),
    [("early", 0, None), ("late", 29, 30), ("inside", 29, 34), ("same", 29, 29), ("shorter", 0, 9)],
)
def test_a_changed_history_hits_up_to_the_branch(change: str, cached, cached_again) -> None:
    """And whoever leaves it at the same place later finds a snapshot there."""
    model = hybrid_model(torch.float64)
    engine = engine_for(model)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    prompt = random_prompts((30,))[0]
    (first,) = complete(engine, [prompt], [params])
    second = grown(prompt, first, 20, 21)
    if change == "early":
        second[0] = 50 if second[0] != 50 else 51
    elif change == "late":
        second[30] = 50 if second[30] != 50 else 51
    elif change == "inside":
        second = second[:35]
    elif change == "same":
        second = prompt
    else:
        second = prompt[:10]
    (cold,) = complete(engine_for(model), [second], [params])
    (warm,) = complete(engine, [second], [params])
    assert warm.cached_tokens == cached
    assert_same([warm], [cold], FP64_ERROR)
    if cached_again is not None:
        third = [*second[:cached_again], 60 if second[cached_again] != 60 else 61]
        (warm,) = complete(engine, [third], [params])
        assert warm.cached_tokens == cached_again
        assert_same([warm], complete(engine_for(model), [third], [params]), FP64_ERROR)


def test_a_mark_of_the_caller_is_remembered() -> None:
    model = hybrid_model(torch.float64)
    engine = engine_for(model)
    params = SamplingParams(max_tokens=3, temperature=0.0)
    prompt = random_prompts((30,))[0]
    engine.submit(prompt, params, snapshot_at=(11,))
    while engine.has_work:
        engine.step()
    other = [*prompt[:11], *random_prompts((9,), seed=1)[0]]
    (warm,) = complete(engine, [other], [params])
    assert warm.cached_tokens == 11
    assert_same([warm], complete(engine_for(model), [other], [params]), FP64_ERROR)


def test_the_prefix_used_longest_ago_makes_room() -> None:
    model = hybrid_model(torch.float64)
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    prompts = dict(zip("abc", random_prompts((40, 40, 40)), strict=True))
    engine = engine_for(model)
    (first,) = complete(engine, [prompts["a"]], [params])
    one = engine.memory.in_use_bytes
    assert engine.memory.cached_bytes == one
    engine = engine_for(model, memory_budget_bytes=int(2.5 * one))
    for name in "abc":
        complete(engine, [prompts[name]], [params])
    cached = {}
    for name in "cba":
        (second,) = complete(engine, [grown(prompts[name], first)[:41]], [params])
        (cold,) = complete(engine_for(model), [grown(prompts[name], first)[:41]], [params])
        assert_same([second], [cold], FP64_ERROR)
        cached[name] = second.cached_tokens > 0
    assert cached == {"c": True, "b": True, "a": False}


def test_equal_prompts_are_prefilled_once() -> None:
    model = hybrid_model(torch.float64)
    prompt, other = random_prompts((50, 20))
    prompts = [prompt, other, prompt, prompt]
    params = [SamplingParams(max_tokens=6, seed=i, ignore_eos=True) for i in range(4)]
    expected = alone(model, prompts, params)
    counted = count_tokens(model)
    assert_same(complete(engine_for(model), prompts, params), expected, FP64_ERROR)
    # The last token of a prompt is run by each, since each samples after it.
    assert sum(counted) == 49 + 19 + 4 * 6
    assert len({c.token_ids for c in expected}) == 4


def test_sixteen_samples_of_a_prompt_prefill_once() -> None:
    model = hybrid_model(torch.float64)
    prompt = random_prompts((100,))[0]
    params = [SamplingParams(max_tokens=4, seed=i, ignore_eos=True) for i in range(16)]
    expected = alone(model, [prompt] * 16, params)
    counted = count_tokens(model)
    group = complete(engine_for(model, max_step_tokens=32), [prompt] * 16, params)
    assert sum(counted) == 99 + 16 * 4
    assert [c.cached_tokens for c in group] == [0] + 15 * [99]
    assert_same(group, expected, FP64_ERROR)


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    engine = engine_for(hybrid_model(), max_step_tokens=16)
    short = engine.submit([20, 21], SamplingParams(max_tokens=100, ignore_eos=True))
    engine.step()
    engine.submit(random_prompts((160,))[0], SamplingParams(max_tokens=1))
    for _ in range(8):
        before = len(short.output_ids)
        engine.step()
        assert len(short.output_ids) == before + 1
    engine.abort(short)


def test_the_better_priority_goes_first() -> None:
    engine = engine_for(hybrid_model(), max_num_seqs=1)
    params = [SamplingParams(max_tokens=3, priority=p, seed=0) for p in (0, 2, 1, 2)]
    requests = [
        engine.submit(*each) for each in zip(random_prompts((5, 6, 7, 8)), params, strict=True)
    ]
    done = []
    while engine.has_work:
        done += engine.step()
    assert [requests.index(r) for r in done] == [1, 3, 2, 0]


@pytest.fixture(scope="module")
def four():
    model = hybrid_model(torch.float64)
    prompts, params = random_prompts((5, 30, 44, 44)), mixed_params(4)
    return model, prompts, params, alone(model, prompts, params)


@pytest.mark.parametrize("where", ["prefill", "decode", "apply", "release", "start", "advance"])
@pytest.mark.parametrize(("error", "goes_on"), [(RuntimeError, False), (KeyboardInterrupt, True)])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_error_in_a_step_leaves_the_engine_usable(
    four, where: str, error, goes_on: bool, steps_before: int
) -> None:
    """In the model, and in the middle of the books: what was submitted can be aborted or go on."""
    model, prompts, params, expected = four
    engine = engine_for(model, max_step_tokens=16)
    complete(engine, prompts[:1], params[:1])
    requests = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
    for _ in range(steps_before):
        engine.step()
    owner = {
        "release": engine._runner.pools,
        "start": engine._scheduler.cache,
        "advance": engine._scheduler.cache,
    }.get(where, engine._runner)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(error, match="broken"):
        fail_at(patch, owner, where, error)
        while engine.has_work:
            engine.step()
    engine.check_integrity()
    poison_unused(engine)
    if goes_on:
        while engine.has_work:
            engine.step()
            engine.check_integrity()
        assert_same([engine.completion(r) for r in requests], expected, FP64_ERROR)
        return
    for request in requests:
        engine.abort(request)
    engine.check_integrity()
    assert not engine.has_work
    assert engine.memory.cached_bytes == engine.memory.in_use_bytes
    assert_same(complete(engine, prompts, params), expected, FP64_ERROR)


def fail_at(patch: pytest.MonkeyPatch, owner: object, name: str, error: type) -> None:
    """The method works and then fails: what it was to do is done and nobody knows."""
    real = getattr(owner, name)

    def broken(*args: object) -> None:
        real(*args)
        raise error("broken")

    patch.setattr(owner, name, broken)


def test_ctrl_c_inside_the_model_frees_all_pages() -> None:
    model = hybrid_model(torch.float64)
    engine = engine_for(model, max_step_tokens=16)
    prompt = random_prompts((100,))[0]
    params = SamplingParams(max_tokens=4, temperature=0.0)
    request = engine.submit(prompt, params)
    engine.step()
    assert engine.memory.in_use_bytes > 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # In the third layer: the states of the first two have moved on.
    hook = model.model.layers[2].register_forward_pre_hook(interrupt)
    with hook, pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.abort(request)
    engine.check_integrity()
    assert engine.memory.in_use_bytes == 0 and not engine.has_work
    poison_unused(engine)
    assert_same(complete(engine, [prompt], [params]), alone(model, [prompt], [params]), FP64_ERROR)


@pytest.mark.parametrize("attn_type_list", [(0, 0, 0), (1, 1, 1)])
def test_models_of_one_kind_of_layer(attn_type_list) -> None:
    """Without softmax layers there are no pages, without lightning layers no slots."""
    sizes = {"num_hidden_layers": 3, "attn_type_list": attn_type_list}
    model = M1ForCausalLM(hybrid_config(**sizes), dtype=torch.float64, seed=1).eval()
    prompts, params = random_prompts((3, 20, 20, 50)), mixed_params(4)
    expected = alone(model, prompts, params)
    engine = engine_for(model, max_step_tokens=16)
    for turn in range(2):
        again = complete(engine, prompts, params)
        assert_same(again, expected, FP64_ERROR)
        if turn:
            assert [c.cached_tokens for c in again] == [2, 19, 19, 49]
        poison_unused(engine)


def test_a_request_that_could_never_fit_is_refused() -> None:
    model = hybrid_model()
    engine = engine_for(model)
    complete(engine, [[20]], [SamplingParams(max_tokens=1)])
    budget = bytes_for(engine, 64)
    engine = engine_for(model, memory_budget_bytes=budget)
    with pytest.raises(ValueError, match="memory budget"):
        engine.submit([20] * 60, SamplingParams(max_tokens=6))
    assert not engine.has_work
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    (reply,) = complete(engine, [[20] * 60], [params])
    assert len(reply.token_ids) == 5


def test_without_a_budget_half_of_what_is_available_is_taken() -> None:
    engine = engine_for(hybrid_model(), memory_budget_bytes=None)
    complete(engine, [[20]], [SamplingParams(max_tokens=1)])
    available = available_memory_bytes(torch.device("cpu"))
    assert 0.4 * available < engine.memory.budget_bytes < 0.6 * available


def test_the_last_position_can_be_used() -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    (completion,) = complete(engine_for(hybrid_model()), [[20] * 500], [params])
    assert len(completion.token_ids) == 12


@pytest.mark.parametrize("name", ["max_num_seqs", "max_step_tokens", "page_tokens"])
def test_bad_limits_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        EngineConfig(**{name: 0})


def test_bad_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="memory_budget_bytes is 0"):
        EngineConfig(memory_budget_bytes=0)
    with pytest.raises(ValueError, match="kernels is 'gpu'; allowed are auto, torch, cpu"):
        EngineConfig(kernels="gpu")  # pyright: ignore
