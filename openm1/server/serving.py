"""One server at work: everything its routes share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openm1.server.config import ServerConfig
from openm1.server.gate import Gate, key_name
from openm1.server.metrics import Metrics
from openm1.server.orders import Desk
from openm1.server.replies import Item, Reply, ReplyOrder, ReplyWriter
from openm1.server.served import ServedModel
from openm1.server.stream import EventStream, collected, merged, primed, while_connected
from openm1.server.usage import UsageMeter

Chunks = Callable[[AsyncGenerator[tuple[int, Item], None]], AsyncGenerator[bytes, None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """The parts of one server, made by `start_serving`."""

    served: ServedModel
    config: ServerConfig
    gate: Gate
    metrics: Metrics
    meter: UsageMeter
    desk: Desk
    writer: ReplyWriter

    async def respond(
        self,
        request: Request,
        orders: Sequence[ReplyOrder],
        whole: Callable[[list[Reply]], dict[str, Any]],
        chunks: Chunks,
        *,
        anthropic: bool = False,
    ) -> Response:
        """All replies at once, as `whole` puts them, or as events, as `chunks` does, where the
        orders stream. What is refused is refused before a 200."""
        key, endpoint = key_name(request.headers, self.config), request.scope["path"]
        with ExitStack() as place:
            place.enter_context(self.gate.admit(key, len(orders)))
            if not orders[0].streams:
                work = self._all(orders, key, endpoint)
                return JSONResponse(whole(await while_connected(request, work)))
            items = merged([self._write(order, key, endpoint) for order in orders])
            ready = await while_connected(request, primed(items))
            return EventStream(chunks(ready), place.pop_all(), anthropic=anthropic)

    async def _all(self, orders: Sequence[ReplyOrder], key: str, endpoint: str) -> list[Reply]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(collected(self._write(order, key, endpoint)))
                    for order in orders
                ]
        except ExceptionGroup as failed:  # What ails one ails all; one is told.
            raise failed.exceptions[0] from failed
        return [reply for task in tasks for reply in task.result() if isinstance(reply, Reply)]

    def _write(self, order: ReplyOrder, key: str, endpoint: str) -> AsyncGenerator[Item, None]:
        return self.writer.write(order, key=key, endpoint=endpoint)


def start_serving(served: ServedModel, config: ServerConfig) -> Serving:
    """Opens the usage database, among others; ValueError where that fails."""
    gate = Gate(config)
    metrics = Metrics(served, gate)
    meter = UsageMeter(config.usage_url)
    return Serving(
        served=served,
        config=config,
        gate=gate,
        metrics=metrics,
        meter=meter,
        desk=Desk(served=served, config=config),
        writer=ReplyWriter(
            served=served,
            gate=gate,
            metrics=metrics,
            meter=meter,
            log_prompts=config.log_prompts,
        ),
    )
