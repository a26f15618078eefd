"""The engine as an async `Policy`: callers await completions, one task steps for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from openm1.engine.engine import Engine
from openm1.engine.request import Request
from openm1.types import Completion, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor


class EnginePolicy:
    """`protocols.Policy` and `protocols.WeightSink` over an embedded engine.

    Requests made in one pass of the event loop are batched together. Cancelling a caller aborts its
    request. An error of the engine ends every request that is waiting for it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._futures: dict[Request, asyncio.Future[Completion]] = {}
        self._pump_task: asyncio.Task[None] | None = None

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        request = self.engine.submit(prompt_ids, params, session=session)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._futures[request] = future
        if self._pump_task is None or self._pump_task.done():
            self._pump_task = asyncio.create_task(self._pump())
        try:
            return await future
        finally:
            # Nothing is left to do unless the caller was cancelled.
            self.engine.abort(request)
            self._futures.pop(request, None)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        self.engine.load_weights(tensors, version=version)

    async def _pump(self) -> None:
        # The first pass lets every caller that is ready submit, so that they share a prefill.
        await asyncio.sleep(0)
        try:
            while self._futures:
                self.engine.step()
                # Others may use the engine too, so what a step returns need not be ours.
                done = [request for request in self._futures if request.finish_reason is not None]
                for request in done:
                    future = self._futures.pop(request)
                    if not future.done():
                        future.set_result(self.engine.completion(request))
                await asyncio.sleep(0)
        except Exception as error:
            for request, future in self._futures.items():
                self.engine.abort(request)
                if not future.done():
                    future.set_exception(error)
            self._futures.clear()
