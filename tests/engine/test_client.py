"""The engine as a `Policy`: callers that come, wait, leave and fail side by side."""

from __future__ import annotations

import asyncio

import pytest
import torch

from openm1.engine.client import EnginePolicy
from openm1.types import Completion, SamplingParams

from .tiny import complete, engine_for, hybrid_model

PROMPTS = [[20, 30, 40], [21], [22, 23, 24, 25, 26]]
PARAMS = [SamplingParams(max_tokens=5 + i, seed=i, ignore_eos=True) for i in range(3)]


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


def test_callers_share_a_batch(policy: EnginePolicy, expected: list[Completion]) -> None:
    passes = count_passes(policy)

    async def run() -> list[Completion]:
        return await asyncio.gather(*generate_all(policy))

    assert same_tokens(asyncio.run(run()), expected)
    # One prefill of three prompts, then six decodes for the longest.
    assert passes == [3, 3, 3, 3, 3, 2, 1]


def test_a_policy_outlives_its_event_loop(policy: EnginePolicy, expected: list[Completion]) -> None:
    for _ in range(2):
        assert same_tokens([asyncio.run(policy.generate(PROMPTS[0], PARAMS[0]))], expected[:1])


def test_callers_may_come_while_others_wait(policy, expected: list[Completion]) -> None:
    async def late(index: int) -> Completion:
        for _ in range(2 * index):
            await asyncio.sleep(0)
        return await policy.generate(PROMPTS[index], PARAMS[index])

    async def run() -> list[Completion]:
        return await asyncio.gather(*map(late, range(3)))

    assert same_tokens(asyncio.run(run()), expected)


@pytest.mark.parametrize("passes", [0, 1, 4])
def test_a_cancelled_caller_frees_its_slot(policy, expected, passes: int) -> None:
    async def run() -> list[Completion]:
        tasks = [asyncio.create_task(each) for each in generate_all(policy)]
        for _ in range(passes):
            await asyncio.sleep(0)
        # The one that would go on longest.
        tasks[2].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[2], asyncio.CancelledError)
        return done[:2]  # pyright: ignore

    assert same_tokens(asyncio.run(run()), expected[:2])
    policy.engine.check_integrity()
    assert not policy.engine.has_work


def test_sessions_reach_the_engine(policy: EnginePolicy) -> None:
    first = asyncio.run(policy.generate(PROMPTS[0], PARAMS[0], session="talk"))
    grown = [*PROMPTS[0], *first.token_ids, 20]
    second = asyncio.run(policy.generate(grown, PARAMS[1], session="talk"))
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

    async def run() -> list[Completion | BaseException]:
        return await asyncio.gather(*generate_all(policy), return_exceptions=True)

    with body.register_forward_pre_hook(fail):
        failed = asyncio.run(asyncio.wait_for(run(), 20))
    assert [str(error) for error in failed] == ["broken"] * 3
    policy.engine.check_integrity()
    assert not policy.engine.has_work
    # And the next callers are served.
    assert same_tokens(asyncio.run(run()), expected)


def test_a_bad_request_fails_alone(policy: EnginePolicy, expected: list[Completion]) -> None:
    async def run() -> list[Completion | BaseException]:
        bad = policy.generate([], PARAMS[0])
        return await asyncio.gather(bad, *generate_all(policy), return_exceptions=True)

    error, *rest = asyncio.run(run())
    assert isinstance(error, ValueError)
    assert same_tokens(rest, expected)  # pyright: ignore


def test_two_policies_may_share_an_engine(policy, expected: list[Completion]) -> None:
    other = EnginePolicy(policy.engine)

    async def run() -> list[Completion]:
        return await asyncio.gather(
            policy.generate(PROMPTS[0], PARAMS[0]),
            other.generate(PROMPTS[1], PARAMS[1]),
            policy.generate(PROMPTS[2], PARAMS[2]),
        )

    assert same_tokens(asyncio.run(asyncio.wait_for(run(), 20)), expected)


def test_weights_are_loaded_between_requests_only(policy: EnginePolicy) -> None:
    weights = list(policy.engine.model.named_parameters())

    async def run() -> Completion:
        task = asyncio.create_task(policy.generate(PROMPTS[0], PARAMS[0]))
        for _ in range(3):
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="while requests run"):
            policy.load_weights(weights, version=1)
        return await task

    assert asyncio.run(run()).policy_version == 0
    policy.load_weights(weights, version=1)
    assert asyncio.run(policy.generate(PROMPTS[0], PARAMS[0])).policy_version == 1
