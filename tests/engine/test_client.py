"""The engine as a `Policy`: callers that come, wait, leave and fail side by side."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import suppress

import pytest
import torch

from openm1.engine.client import EnginePolicy, TokenEvent
from openm1.types import Completion, SamplingParams

from .tiny import complete, engine_for, hybrid_model

PROMPTS = [[20, 30, 40], [21], [22, 23, 24, 25, 26]]
PARAMS = [SamplingParams(max_tokens=5 + i, seed=i, ignore_eos=True) for i in range(3)]
LONG = SamplingParams(max_tokens=100, seed=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=500, seed=0, ignore_eos=True)
# Nothing here takes long; this only keeps a test that hangs from hanging.
PATIENCE_S = 30


def run(work):
    return asyncio.run(asyncio.wait_for(work, PATIENCE_S))


def generate_all(policy: EnginePolicy):
    return [policy.generate(p, s) for p, s in zip(PROMPTS, PARAMS, strict=True)]


@pytest.fixture
def policy() -> EnginePolicy:
    return EnginePolicy(engine_for(hybrid_model(torch.float64)))


@pytest.fixture(scope="module")
def expected() -> list[Completion]:
    return complete(engine_for(hybrid_model(torch.float64)), PROMPTS, PARAMS)


def same_tokens(ours: list[Completion], expected: list[Completion]) -> bool:
    return [c.token_ids for c in ours] == [c.token_ids for c in expected]


def count_passes(policy: EnginePolicy) -> list[int]:
    passes: list[int] = []
    body = policy.engine.model.model
    body.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[1].lengths)))
    return passes


def check_idle(policy: EnginePolicy) -> None:
    policy.engine.check_integrity()
    assert not policy.engine.has_work
    assert policy.engine.memory.in_use_bytes == policy.engine.memory.cached_bytes


def test_callers_share_a_batch(policy: EnginePolicy, expected: list[Completion]) -> None:
    passes = count_passes(policy)

    async def work() -> list[Completion]:
        return await asyncio.gather(*generate_all(policy))

    assert same_tokens(run(work()), expected)
    # Two prompts have something to prefill; the third's first token comes in the same step.
    assert passes == [2, 1, 3, 3, 3, 3, 3, 1, 1]


def test_a_policy_outlives_its_event_loop(policy: EnginePolicy, expected: list[Completion]) -> None:
    for _ in range(2):
        assert same_tokens([run(policy.generate(PROMPTS[0], PARAMS[0]))], expected[:1])


def test_callers_may_come_while_others_wait(policy, expected: list[Completion]) -> None:
    async def late(index: int) -> Completion:
        await asyncio.sleep(0.003 * index)
        return await policy.generate(PROMPTS[index], PARAMS[index])

    async def work() -> list[Completion]:
        return await asyncio.gather(*map(late, range(3)))

    assert same_tokens(run(work()), expected)


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("tokens_before", [None, 0, 2])
def test_a_cancelled_caller_frees_its_memory(policy, expected, tokens_before, paused: bool) -> None:
    async def work() -> list[Completion]:
        first = [
            asyncio.create_task(policy.generate(*each))
            for each in zip(PROMPTS[:2], PARAMS[:2], strict=True)
        ]
        seen = asyncio.Event()

        async def consume() -> None:
            if tokens_before == 0:
                seen.set()
            number = 0
            async for _ in policy.stream(PROMPTS[2], ENDLESS):
                number += 1
                if number == tokens_before:
                    seen.set()

        consumer = asyncio.create_task(consume())
        if tokens_before is not None:
            await seen.wait()
        if paused:
            await policy.pause()
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        if paused:
            # Leaving does not wait for steps to go on.
            while any(r.params is ENDLESS for r in policy.engine._live):
                await asyncio.sleep(0.001)
            policy.resume()
        return await asyncio.gather(*first)

    assert same_tokens(run(work()), expected[:2])
    check_idle(policy)


def test_a_shut_down_loop_leaves_nothing_behind(policy, expected: list[Completion]) -> None:
    async def work() -> None:
        asyncio.create_task(policy.generate(PROMPTS[2], ENDLESS))  # noqa: RUF006
        await asyncio.sleep(0.02)

    run(work())
    check_idle(policy)
    assert same_tokens([run(policy.generate(PROMPTS[0], PARAMS[0]))], expected[:1])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_closed_under_its_callers_leaves_nothing_behind(policy, expected) -> None:
    loop = asyncio.new_event_loop()
    task = loop.create_task(policy.generate(PROMPTS[2], ENDLESS))
    loop.run_until_complete(asyncio.sleep(0.02))
    left = asyncio.all_tasks(loop)
    assert task in left and len(left) == 2
    loop.close()

    async def work() -> Completion:
        reply = asyncio.create_task(policy.generate(PROMPTS[0], PARAMS[0]))
        await asyncio.sleep(0)
        # The old tasks end here, as when Python finds them, and must not take the new caller along.
        for old in left:
            old._log_destroy_pending = False  # pyright: ignore
            with suppress(RuntimeError):
                old.get_coro().close()  # pyright: ignore
        return await reply

    assert same_tokens([run(work())], expected[:1])
    check_idle(policy)
    # What Python has to say about it, it should say here.
    del task, left
    gc.collect()


def test_a_stream_gives_each_token_and_then_the_completion(policy, expected) -> None:
    async def work() -> list[TokenEvent | Completion]:
        params = SamplingParams(max_tokens=7, seed=2, ignore_eos=True, top_logprobs=2)
        return [event async for event in policy.stream(PROMPTS[2], params)]

    *tokens, completion = run(work())
    assert isinstance(completion, Completion)
    assert completion.token_ids == expected[2].token_ids
    assert all(isinstance(event, TokenEvent) for event in tokens)
    for name, field in [
        ("token_id", "token_ids"),
        ("logprob", "logprobs"),
        ("forced", "forced"),
        ("policy_version", "policy_versions"),
        ("top_logprobs", "top_logprobs"),
    ]:
        assert tuple(getattr(event, name) for event in tokens) == getattr(completion, field)


def test_tokens_of_a_stream_come_one_by_one(policy: EnginePolicy) -> None:
    async def work() -> int:
        longest = 0
        async for event in policy.stream(PROMPTS[0], LONG):
            if isinstance(event, TokenEvent):
                (request,) = policy.engine._live or [None]
                if request is not None:
                    longest = max(longest, len(request.output_ids))
                if longest > 5:
                    return longest
        return 0

    assert 5 < run(work()) < 100


def test_many_streams_share_the_time_to_hand_over(policy: EnginePolicy) -> None:
    assert policy._burst_s_for(1000) == 0, "whoever wants each token gets each token"
    slow = EnginePolicy(policy.engine, burst_s=0.05)
    assert [slow._burst_s_for(count) for count in (1, 20, 32, 1000)] == [0.05, 0.05, 0.08, 0.25]


def test_the_event_loop_stays_free_during_a_step(policy, monkeypatch) -> None:
    step = policy.engine.step

    def slow() -> list:
        time.sleep(0.1)
        return step()

    monkeypatch.setattr(policy.engine, "step", slow)

    async def work() -> float:
        task = asyncio.create_task(policy.generate(PROMPTS[0], PARAMS[0]))
        longest = 0.0
        while not task.done():
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - began)
        return longest

    assert run(work()) < 0.09


def test_what_a_prompt_extends_is_found_without_a_session(policy: EnginePolicy) -> None:
    first = run(policy.generate(PROMPTS[0], PARAMS[0], session="talk"))
    grown = [*PROMPTS[0], *first.token_ids, 20]
    second = run(policy.generate(grown, PARAMS[1]))
    assert second.cached_tokens == len(grown) - 2


@pytest.mark.parametrize("failing_pass", [0, 2])
def test_an_error_of_the_engine_reaches_every_caller(policy, expected, failing_pass) -> None:
    body = policy.engine.model.model
    count = 0

    def fail(*_: object) -> None:
        nonlocal count
        count += 1
        if count == failing_pass + 1:
            raise RuntimeError("broken")

    async def work() -> list[Completion | BaseException]:
        return await asyncio.gather(*generate_all(policy), return_exceptions=True)

    with body.register_forward_pre_hook(fail):
        failed = run(work())
    assert [str(error) for error in failed] == ["broken"] * 3
    check_idle(policy)
    # And the next callers are served.
    assert same_tokens(run(work()), expected)


def test_a_bad_request_fails_alone(policy: EnginePolicy, expected: list[Completion]) -> None:
    async def work() -> list[Completion | BaseException]:
        bad = policy.generate([], PARAMS[0])
        return await asyncio.gather(bad, *generate_all(policy), return_exceptions=True)

    error, *rest = run(work())
    assert isinstance(error, ValueError)
    assert same_tokens(rest, expected)  # pyright: ignore


def test_stop_strings_need_a_tokenizer(policy: EnginePolicy) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0, stop="b")
    with pytest.raises(ValueError, match="no tokenizer"):
        run(policy.generate(PROMPTS[0], params))


def test_two_policies_may_share_an_engine(policy, expected: list[Completion]) -> None:
    other = EnginePolicy(policy.engine)

    async def work() -> list[Completion]:
        return await asyncio.gather(
            policy.generate(PROMPTS[0], PARAMS[0]),
            other.generate(PROMPTS[1], PARAMS[1]),
            policy.generate(PROMPTS[2], PARAMS[2]),
        )

    assert same_tokens(run(work()), expected)


@pytest.mark.parametrize("way", ["load_weights", "update_weights"])
def test_weights_change_between_two_tokens(policy: EnginePolicy, way: str) -> None:
    """The same weights, so that the reply stays; each token says which version wrote it."""
    weights = list(policy.engine.model.named_parameters())
    (expected,) = complete(engine_for(policy.engine.model), PROMPTS[:1], [LONG])

    async def work() -> Completion:
        number = 0
        async for event in policy.stream(PROMPTS[0], LONG):
            if isinstance(event, Completion):
                return event
            number += 1
            if number == 3:
                if way == "load_weights":
                    policy.load_weights(weights, version=1)
                else:
                    await policy.update_weights(weights, version=1, in_flight="keep")
        raise AssertionError

    reply = run(work())
    assert reply.token_ids == expected.token_ids
    switch = reply.policy_versions.index(1)
    assert 3 <= switch < 100
    assert reply.policy_versions == (0,) * switch + (1,) * (100 - switch)


def test_bad_weights_are_refused_by_the_caller(policy: EnginePolicy) -> None:
    with pytest.raises(ValueError, match="unknown weight"):
        policy.load_weights([("nonsense", torch.zeros(1))], version=1)
    with pytest.raises(ValueError, match="unknown weight"):
        run(policy.update_weights([("nonsense", torch.zeros(1))], version=1))


def test_a_paused_policy_keeps_everything(policy, expected: list[Completion]) -> None:
    async def work() -> list[Completion]:
        tasks = [asyncio.create_task(each) for each in generate_all(policy)]
        await asyncio.sleep(0.003)
        await policy.pause()
        before = [len(r.output_ids) for r in policy.engine._live]
        late = asyncio.create_task(policy.generate(PROMPTS[0], PARAMS[0]))
        await asyncio.sleep(0.03)
        assert [len(r.output_ids) for r in policy.engine._live][: len(before)] == before
        policy.resume()
        return await asyncio.gather(*tasks, late)

    assert same_tokens(run(work()), [*expected, expected[0]])


def test_the_better_priority_is_served_first() -> None:
    policy = EnginePolicy(engine_for(hybrid_model(), max_num_seqs=1))
    order: list[int] = []

    async def ask(priority: int) -> None:
        params = SamplingParams(max_tokens=5, seed=0, ignore_eos=True, priority=priority)
        await policy.generate([20 + priority, 21], params)
        order.append(priority)

    async def work() -> None:
        await asyncio.gather(*map(ask, (0, 2, 1)))

    run(work())
    assert order == [2, 1, 0]
