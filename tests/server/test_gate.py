"""Who runs, who waits and who is sent away, in all orders of coming and leaving."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

from openm1.server.config import ServerConfig
from openm1.server.errors import ApiError
from openm1.server.gate import Gate


def gate_of(running: int, queued: int, per_key: int | None = None) -> Gate:
    return Gate(
        ServerConfig(
            max_running_requests=running, max_queued_requests=queued, max_requests_per_key=per_key
        )
    )


def run(work):
    return asyncio.run(asyncio.wait_for(work, 30))


def test_the_best_priority_goes_first_and_equals_in_order() -> None:
    gate = gate_of(1, 9)
    order: list[str] = []

    async def ask(name: str, priority: int) -> None:
        with gate.admit("key", 1):
            async with gate.turn(priority):
                order.append(name)
                await asyncio.sleep(0.001)

    async def work() -> None:
        asked = {"first": 0, "a": 0, "b": 0, "urgent": 5, "last": -1}
        await asyncio.gather(*[ask(*each) for each in asked.items()])

    run(work())
    assert order == ["first", "urgent", "a", "b", "last"]
    assert gate.num_running == gate.num_waiting == 0


def test_a_crowd_that_comes_waits_and_leaves() -> None:
    """Whoever leaves at whatever moment, no place is lost and none is given twice."""
    gate, draw = gate_of(3, 4), random.Random(0)
    most = 0
    refused = 0

    async def ask() -> None:
        nonlocal most, refused
        try:
            with gate.admit(draw.choice("ab"), 1):
                async with gate.turn(draw.randrange(3)):
                    most = max(most, gate.num_running)
                    assert gate.num_running <= 3
                    await asyncio.sleep(draw.random() / 50)
        except ApiError as error:
            assert (error.status, error.code) == (503, "queue_full")
            assert 1 <= (error.retry_after_s or 0) <= 60
            refused += 1

    async def work() -> None:
        tasks = []
        for _ in range(400):
            tasks.append(asyncio.create_task(ask()))
            if draw.random() < 0.3:
                draw.choice(tasks).cancel()
            await asyncio.sleep(draw.random() / 2000)
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task

    run(work())
    assert most == 3 and refused > 0
    assert gate.num_running == gate.num_waiting == 0


def test_draining_waits_for_the_last_one() -> None:
    gate = gate_of(1, 9)
    ended: list[str] = []

    async def ask(name: str) -> None:
        with gate.admit("key", 1):
            async with gate.turn(0):
                await asyncio.sleep(0.005)
                ended.append(name)

    async def work() -> None:
        tasks = [asyncio.create_task(ask(name)) for name in "ab"]
        await asyncio.sleep(0)
        draining = asyncio.create_task(gate.drain())
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="shutting down"), gate.admit("key", 1):
            pass
        await draining
        assert ended == ["a", "b"]
        await asyncio.gather(*tasks)

    run(work())
