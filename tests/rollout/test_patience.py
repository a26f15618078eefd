from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable

import pytest

from openm1.rollout.patience import OutOfPatience, within

SOON_S = 0.05
NEVER_S = 300.0


async def waits() -> None:
    await asyncio.sleep(NEVER_S)


async def sleeps() -> None:
    time.sleep(NEVER_S)


async def computes() -> None:
    while True:
        pass


async def waits_then_computes() -> None:
    await asyncio.sleep(0)
    await computes()


async def hangs_in_tidying_up() -> None:
    try:
        await asyncio.sleep(NEVER_S)
    finally:
        time.sleep(NEVER_S)


@pytest.mark.parametrize(
    "call", [waits, sleeps, computes, waits_then_computes, hangs_in_tidying_up]
)
def test_whatever_a_call_does_it_ends(call: Callable[[], Awaitable[None]]):
    began = time.monotonic()
    with pytest.raises(OutOfPatience, match=r"the call took longer than 0\.05 s"):
        asyncio.run(within(SOON_S, call(), "the call"))  # pyright: ignore[reportArgumentType]
    assert time.monotonic() - began < NEVER_S / 2


def test_others_go_on_while_a_call_waits():
    async def both() -> list[object]:
        hanging = within(SOON_S, waits(), "the call")
        return await asyncio.gather(hanging, asyncio.sleep(0, "on"), return_exceptions=True)

    failure, other = asyncio.run(both())
    assert isinstance(failure, OutOfPatience) and other == "on"


async def answers(value: object) -> object:
    await asyncio.sleep(0)
    return value


async def fails() -> None:
    await asyncio.sleep(0)
    raise TimeoutError("of its own")


def test_what_a_call_says_comes_through():
    for seconds in (None, 60.0):
        assert asyncio.run(within(seconds, answers(7), "the call")) == 7
        with pytest.raises(TimeoutError, match="of its own") as caught:
            asyncio.run(within(seconds, fails(), "the call"))
        assert not isinstance(caught.value, OutOfPatience)


def test_cancelling_goes_through_to_the_call():
    seen: list[str] = []

    async def told() -> None:
        try:
            await asyncio.sleep(NEVER_S)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def run() -> None:
        task = asyncio.create_task(within(60.0, told(), "the call"))
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert seen == ["cancelled"]


def test_somebody_elses_alarm_goes_on():
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        assert asyncio.run(within(0.1, answers(1), "the call")) == 1
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.2
        ends = time.monotonic() + 30
        while not rung and time.monotonic() < ends:
            time.sleep(0.01)
        assert rung == [1]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, interval)
