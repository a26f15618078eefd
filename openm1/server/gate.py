"""Who may come in, who waits, and who is asked to come back later."""

from __future__ import annotations

import asyncio
import heapq
import hmac
import itertools
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

from openm1.server.config import ServerConfig
from openm1.server.errors import ApiError

ANONYMOUS = "anonymous"
MAX_RETRY_AFTER_S = 60
# How much of the mean time of a reply the newest one decides.
_NEWEST = 0.1


def key_name(headers: Mapping[str, str], config: ServerConfig) -> str:
    """The name of the key a request shows; raises ApiError 401 where it needs one and has none."""
    if not config.api_keys:
        return ANONYMOUS
    for name, key in config.api_keys.items():
        if _same(shown_key(headers), key):
            return name
    raise ApiError(
        401,
        "the API key is missing or wrong; send it as `Authorization: Bearer KEY` or `x-api-key`",
        code="invalid_api_key",
    )


def check_admin(headers: Mapping[str, str], config: ServerConfig) -> None:
    """Raises ApiError unless the request shows the admin key."""
    if config.admin_key is None:
        raise ApiError(
            403, "this server was started without an admin key", code="admin_key_not_set"
        )
    if not _same(shown_key(headers), config.admin_key):
        raise ApiError(401, "the admin key is missing or wrong", code="invalid_api_key")


def shown_key(headers: Mapping[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _same(shown: str, key: str) -> bool:
    """Takes as long for a key that is nearly right as for any other."""
    return hmac.compare_digest(shown.encode(), key.encode())


class Gate:
    """Counts replies: so many are written, so many more wait in order, the rest is refused."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._num_running = 0
        self._per_key: Counter[str] = Counter()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()
        self._mean_reply_s = 1.0
        self._empty = asyncio.Event()
        self._empty.set()
        self.is_draining = False

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_waiting(self) -> int:
        return self._per_key.total() - self._num_running

    @contextmanager
    def admit(self, key: str, num_replies: int) -> Iterator[None]:
        """Holds places for a request; raises ApiError 429 or 503 where there are none."""
        if self.is_draining:
            raise self._busy(503, "the server is shutting down", "shutting_down")
        most = self._config.max_requests_per_key
        if most is not None and self._per_key[key] + num_replies > most:
            reason = f"this key has {self._per_key[key]} replies under way; allowed are {most}"
            raise self._busy(429, reason, "too_many_requests")
        room = self._config.max_running_requests + self._config.max_queued_requests
        if self._per_key.total() + num_replies > room:
            reason = f"{self._per_key.total()} replies run or wait; there is room for {room}"
            raise self._busy(503, reason, "queue_full")
        self._per_key[key] += num_replies
        self._empty.clear()
        try:
            yield
        finally:
            self._per_key[key] -= num_replies
            if not self._per_key[key]:
                del self._per_key[key]
            if not self._per_key:
                self._empty.set()

    @asynccontextmanager
    async def turn(self, priority: int) -> AsyncIterator[float]:
        """Waits until one admitted reply may be written; gives the seconds waited."""
        came = time.monotonic()
        if self._waiting or self._num_running >= self._config.max_running_requests:
            await self._wait(priority)
        else:
            self._num_running += 1
        began = time.monotonic()
        try:
            yield began - came
            took = time.monotonic() - began
            self._mean_reply_s += _NEWEST * (took - self._mean_reply_s)
        finally:
            self._pass_on()

    async def _wait(self, priority: int) -> None:
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-priority, next(self._arrivals), ready))
        try:
            await ready
        except asyncio.CancelledError:
            # The place may have been given in the same moment.
            if ready.done() and not ready.cancelled():
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """Gives a free place to the next who still wants one."""
        while self._waiting:
            _, _, ready = heapq.heappop(self._waiting)
            if not ready.done():
                ready.set_result(None)
                return
        self._num_running -= 1

    def _busy(self, status: int, reason: str, code: str) -> ApiError:
        ahead = self._per_key.total() / self._config.max_running_requests
        wait = min(max(math.ceil(ahead * self._mean_reply_s), 1), MAX_RETRY_AFTER_S)
        return ApiError(status, f"{reason}; try again later", code=code, retry_after_s=wait)

    async def drain(self) -> None:
        """Lets nobody in any more; returns when the last reply is written."""
        self.is_draining = True
        await self._empty.wait()
