"""Server-sent events, and work that ends when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import AbstractContextManager, aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from openm1.server.errors import ApiError, internal_error

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class Disconnected(Exception):
    """The client has gone."""


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes; then raises Disconnected."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events until they end or the client goes; then the events are closed.

    `place` is left when the stream is over, whichever way. Errors on the way become a last event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        place: AbstractContextManager[Any],
        *,
        anthropic: bool = False,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._place, self._anthropic = events, place, anthropic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            sending = asyncio.ensure_future(self._send(send))
            gone = asyncio.ensure_future(_gone(receive))
            try:
                await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in (sending, gone):
                    each.cancel()
                    with suppress(asyncio.CancelledError, OSError):
                        await each

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            try:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Exception as error:
                # The 200 has gone out, so the client learns of it here or not at all.
                failure = error if isinstance(error, ApiError) else internal_error(error)
                name = "error" if self._anthropic else None
                last = event(failure.body(anthropic=self._anthropic), name)
                await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def primed(items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same items, the first of them already there: what is refused is refused before a 200."""
    try:
        first = await anext(items)
    except StopAsyncIteration:
        return _chain([], items)
    except BaseException:
        await items.aclose()
        raise
    return _chain([first], items)


async def _chain(first: Sequence[T], rest: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    async with aclosing(rest):
        for item in first:
            yield item
        async for item in rest:
            yield item


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all sources as they come, each with its source's number."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for item in only:
                yield 0, item
        return
    items: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()

    async def pump(index: int, source: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    items.put_nowait((index, item))
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    tasks = [asyncio.create_task(pump(i, source)) for i, source in enumerate(sources)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await items.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collected(items: AsyncIterator[T]) -> list[T]:
    return [item async for item in items]
