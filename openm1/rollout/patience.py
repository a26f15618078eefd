"""A limit on what a call of somebody else's code may take, whether it waits or computes."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class OutOfPatience(TimeoutError):
    """A call took too long."""


async def within(seconds: float | None, call: Coroutine[Any, Any, T], name: str) -> T:
    """What `call` returns. Raises OutOfPatience after `seconds`; None waits for ever.

    A call that waits is cancelled. One that computes or sleeps without giving the event loop its
    turn stops everything else as long as it does; in the main thread an alarm ends that too.
    """
    if seconds is None:
        return await call
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await _Stepwise(call, seconds)
    except TimeoutError as error:
        # The call's own TimeoutError is its own affair.
        if limit.expired() or isinstance(error, OutOfPatience):
            raise OutOfPatience(f"{name} took longer than {seconds:g} s") from error
        raise


class _Stepwise:
    """A coroutine with an alarm over each stretch between two waits."""

    def __init__(self, call: Coroutine[Any, Any, Any], seconds: float) -> None:
        self.call, self.seconds = call, seconds

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self.call.__await__()
        step, value = steps.send, None
        while True:
            try:
                with _alarm(self.seconds):
                    waited = step(value)  # pyright: ignore
            except StopIteration as end:
                return end.value
            try:
                step, value = steps.send, (yield waited)
            except BaseException as error:
                step, value = steps.throw, error


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises OutOfPatience inside after `seconds`, in the main thread of systems with SIGALRM.

    An alarm that somebody else has set goes on; one that comes earlier stays in charge.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or not hasattr(signal, "setitimer")
        or 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= seconds
    ):
        yield
        return
    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, _ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        rest = max(left - (time.monotonic() - began), 1e-3) if left else 0.0
        signal.setitimer(signal.ITIMER_REAL, rest, interval)
        signal.signal(signal.SIGALRM, handler)


def _ring(*_: object) -> None:
    raise OutOfPatience
