"""Between the socket and the routes: bodies that are too long or too slow, and the request log."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openm1.server.config import ServerConfig
from openm1.server.errors import ApiError, bad_request
from openm1.server.metrics import Metrics

_LOG = logging.getLogger("openm1.server.requests")

# Of a body that is too long so much is read and dropped: a client that is still sending when the
# refusal comes sees a broken pipe instead of it.
DROPPED_BYTES = 2**26


def speaks_anthropic(path: str) -> bool:
    return path.startswith("/v1/messages")


class Guard:
    """Reads a request's body whole, within limits, before a route sees it."""

    def __init__(self, app: ASGIApp, *, config: ServerConfig, metrics: Metrics) -> None:
        self._app, self._config, self._metrics = app, config, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._serve(scope, receive, watched)
        finally:
            took_ms = 1000 * (time.monotonic() - began)
            path = scope["path"]
            _LOG.info("%s %s %s %.0f ms", scope["method"], path, status or "gone", took_ms)
            # A path that no route has could be anything, and each would be a series of its own.
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.responded(route, status)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                body = await self._body(Headers(scope=scope), receive)
        except TimeoutError:
            waited = self._config.body_timeout_s
            error = ApiError(408, f"the body took longer than {waited} s", code="request_timeout")
        except ApiError as refused:
            error = refused
        else:
            if body is not None:
                await self._app(scope, _replayed(body, receive), send)
            return
        content = error.body(anthropic=speaks_anthropic(scope["path"]))
        headers = {"Connection": "close"}
        await JSONResponse(content, error.status, headers)(scope, receive, send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """None when the client left before it had sent everything."""
        most = self._config.max_body_bytes
        declared = headers.get("content-length", "0")
        too_long = declared.isdecimal() and int(declared) > most
        if too_long and int(declared) > DROPPED_BYTES:
            raise _too_long(most)
        parts: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            num_bytes += len(message.get("body", b""))
            too_long = too_long or num_bytes > most
            if not too_long:
                parts.append(message.get("body", b""))
            if num_bytes > DROPPED_BYTES or (too_long and not message.get("more_body")):
                raise _too_long(most)
            if not message.get("more_body"):
                return b"".join(parts)


def _too_long(most: int) -> ApiError:
    return bad_request(f"the body is too long; allowed are {most} bytes", code="request_too_large")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` as if the body had not been read yet."""
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
