"""The process: sockets, signals, and clients that send their headers too slowly."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from openm1.server.app import serving_of
from openm1.server.config import ServerConfig
from openm1.server.errors import ApiError

SWITCH_INTERVAL_S = 0.001

_LOG = logging.getLogger("openm1.server")


def run_server(
    app: FastAPI, config: ServerConfig, *, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serves until SIGTERM or Ctrl-C, and then until running replies are written.

    `on_ready` is told the address. A second signal ends the process at once. Raises OSError where
    the port cannot be had.
    """
    # The engine's thread computes outside of Python and should not wait long to come back in.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    listener = listen(config)
    host, port = listener.getsockname()[:2]
    if on_ready is not None:
        on_ready(f"http://{host}:{port}")
    DrainingServer(app, config).run(sockets=[listener])


def listen(config: ServerConfig) -> socket.socket:
    """A socket that already takes connections."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    return socket.create_server((config.host, config.port), family=family, backlog=2048)


class DrainingServer(uvicorn.Server):
    """Goes on answering after SIGTERM until the last reply is written, but takes no new ones."""

    def __init__(self, app: FastAPI, config: ServerConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=patient_protocol(config.header_timeout_s),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=5,
                timeout_keep_alive=int(config.header_timeout_s),
            )
        )
        self._gate = serving_of(app).gate
        self._timeout_s = config.drain_timeout_s
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None:
            self.force_exit = self.should_exit = True
            return
        _LOG.warning("%s: finishing what runs, taking nothing new", signal.Signals(sig).name)
        # A signal handler runs between any two instructions; the loop takes over from here.
        self._loop.call_soon_threadsafe(self._start_draining)

    def drain(self) -> None:
        """What SIGTERM does, for a server in a thread."""
        self._loop.call_soon_threadsafe(self._start_draining)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def _start_draining(self) -> None:
        if self._draining is None:
            self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._gate.drain()
        except TimeoutError:
            _LOG.error("replies were still running after %s s", self._timeout_s)
        self.should_exit = True


def patient_protocol(timeout_s: float) -> type[HttpToolsProtocol]:
    """A protocol that waits so long for a request's headers, and then answers 408 and hangs up."""

    class PatientProtocol(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._wait()

        def on_headers_complete(self) -> None:
            self._stop_waiting()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait(self) -> None:
            if self._deadline is None:
                self._deadline = self.loop.call_later(timeout_s, self._give_up)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            if not self.transport.is_closing():
                self.transport.write(_headers_too_slow(timeout_s))
                self.transport.close()

    return PatientProtocol


def _headers_too_slow(timeout_s: float) -> bytes:
    reason = f"the request's headers took longer than {timeout_s} s"
    body = json.dumps(ApiError(408, reason, code="request_timeout").body()).encode()
    head = (
        "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
