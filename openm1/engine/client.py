"""The engine as an async `Policy`: callers await tokens, one thread steps for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from openm1.engine.engine import Engine, InFlight
from openm1.engine.request import Request
from openm1.types import Completion, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from openm1.chat.tokenizer import Tokenizer

# Small models step faster than threads take turns, so the worker goes on while nobody waits for
# news; longer than this nobody should wait for it.
TURN_S = 0.02
# To hand over one burst of one stream costs some 0.1 ms, so that many streams wait longer for each,
# but not so long that a reader sees it stutter.
MAX_BURSTS_PER_S = 400
LONGEST_BURST_S = 0.25


class TokenEvent(NamedTuple):
    """One token of a stream."""

    token_id: int
    logprob: float
    forced: bool
    """Written by the thinking budget, not chosen by the model."""
    policy_version: int
    top_logprobs: tuple[tuple[int, float], ...] = ()


Event = list[TokenEvent] | Completion | Exception


@dataclass(eq=False)
class _Caller:
    """Someone who waits. The loop's thread sets `left`, the worker all else."""

    prompt_ids: list[int]
    params: SamplingParams
    snapshot_at: tuple[int, ...]
    wants_tokens: bool
    events: asyncio.Queue[Event]
    request: Request | None = None
    num_shown: int = 0
    left: bool = False
    over: bool = False


class EnginePolicy:
    """`protocols.Policy` and `protocols.WeightSink` over an embedded engine.

    Requests made in one pass of the event loop are batched together. Cancelling a caller aborts its
    request as soon as the running step ends. A request that fails alone raises RequestFailed for
    its caller; an error of the engine ends every request that is waiting for it, and the next ones
    are served. The engine is touched by the worker thread alone,
    so the event loop stays free while it computes.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tokenizer: Tokenizer | None = None,
        burst_s: float = 0.0,
    ) -> None:
        """The tokenizer is there to find stop strings; without one they are refused.

        Streams get what has come in `burst_s` together, a reply's first token and its end at once:
        a small model writes faster than one can hand over its tokens one by one. Many streams wait
        longer, up to `LONGEST_BURST_S`. 0 hands over each token.
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.burst_s = burst_s
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="openm1-engine")
        self._callers: list[_Caller] = []
        self._pump_task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._hurry = False
        self._paused = False
        self._last_burst = 0.0

    async def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        session: str | None = None,
        snapshot_at: Iterable[int] = (),
    ) -> Completion:
        """The `session` hint is not needed here: the prefix cache finds what a prompt extends."""
        events = self._events(prompt_ids, params, snapshot_at, wants_tokens=False)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Completion):
                    return event
        raise AssertionError("the events ended without a completion")

    def bursts(
        self, prompt_ids: list[int], params: SamplingParams, *, snapshot_at: Iterable[int] = ()
    ) -> AsyncGenerator[list[TokenEvent] | Completion, None]:
        """Tokens as they come, several where several have come, then the whole `Completion`.

        Closing the generator aborts; where you may leave it early, use `contextlib.aclosing`.
        """
        return self._events(prompt_ids, params, snapshot_at, wants_tokens=True)

    async def stream(
        self, prompt_ids: list[int], params: SamplingParams, *, snapshot_at: Iterable[int] = ()
    ) -> AsyncGenerator[TokenEvent | Completion, None]:
        """`bursts`, one token at a time."""
        async with aclosing(self.bursts(prompt_ids, params, snapshot_at=snapshot_at)) as bursts:
            async for burst in bursts:
                if isinstance(burst, Completion):
                    yield burst
                    return
                for event in burst:
                    yield event

    async def pause(self) -> None:
        """Returns when no step runs; none will until `resume`. Requests wait with all they have."""
        self._paused = True
        await self._between_steps()

    def resume(self) -> None:
        self._paused = False
        self._changed.set()

    def load_weights(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        version: int,
        in_flight: InFlight = "recompute",
    ) -> None:
        """`Engine.load_weights` between two steps; blocks until the running one has ended."""
        self._hurry = True
        self._worker.submit(
            self.engine.load_weights, tensors, version=version, in_flight=in_flight
        ).result()

    async def update_weights(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        version: int,
        in_flight: InFlight = "recompute",
    ) -> None:
        """`load_weights` without blocking the event loop."""
        self._hurry = True
        load = self._worker.submit(
            self.engine.load_weights, tensors, version=version, in_flight=in_flight
        )
        await asyncio.wrap_future(load)

    async def _between_steps(self) -> None:
        self._hurry = True
        await asyncio.wrap_future(self._worker.submit(lambda: None))

    async def _events(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        snapshot_at: Iterable[int],
        *,
        wants_tokens: bool,
    ) -> AsyncGenerator[list[TokenEvent] | Completion, None]:
        events: asyncio.Queue[Event] = asyncio.Queue()
        caller = _Caller(list(prompt_ids), params, tuple(snapshot_at), wants_tokens, events)
        self._start_pump()
        self._callers.append(caller)
        self._tell()
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Completion):
                    return
        finally:
            caller.left = True
            self._tell()

    def _tell(self) -> None:
        """Somebody came or left: the worker should look up from its steps."""
        self._hurry = True
        self._changed.set()

    def _start_pump(self) -> None:
        task = self._pump_task
        if task is not None and not task.done():
            if task.get_loop() is asyncio.get_running_loop():
                return
            # An event loop that was closed under its callers: they will not come back.
            for caller in self._callers:
                caller.left = True
        self._changed = asyncio.Event()
        self._pump_task = asyncio.create_task(self._pump())

    async def _pump(self) -> None:
        changed = self._changed
        # The first pass lets every caller that is ready come in, so that they share a prefill.
        await asyncio.sleep(0)
        try:
            while self._callers:
                self._hurry = False
                changed.clear()
                turn = self._worker.submit(self._turn, tuple(self._callers))
                for caller, event in await asyncio.wrap_future(turn):
                    caller.events.put_nowait(event)
                self._callers = [caller for caller in self._callers if not caller.over]
                # Whoever has got news may answer with a new request before the next step.
                await (changed.wait() if self._idle else asyncio.sleep(0))
        finally:
            # Something is left only when the event loop shuts down around its callers. A task of a
            # loop that is gone ends whenever Python finds it; then the callers are another's.
            if self._callers and changed is self._changed:
                for caller in self._callers:
                    caller.left = True
                    caller.events.put_nowait(RuntimeError("the engine's task has ended"))
                self._hurry = True
                self._worker.submit(self._turn, tuple(self._callers)).result()
                self._callers.clear()

    @property
    def _idle(self) -> bool:
        return self._paused and bool(self._callers)

    def _turn(self, callers: tuple[_Caller, ...]) -> list[tuple[_Caller, Event]]:
        """In the worker: takes in who came, lets go who left, steps until there is news."""
        # Another policy may share the engine.
        with self.engine.lock:
            try:
                news = [event for caller in callers for event in self._admit(caller)]
                ends = time.monotonic() + TURN_S
                burst_s = self._burst_s_for(sum(caller.wants_tokens for caller in callers))
                while True:
                    now = time.monotonic()
                    is_due = now - self._last_burst >= burst_s
                    news += [(c, event) for c in callers for event in self._news(c, is_due)]
                    if news and is_due:
                        self._last_burst = now
                    if news or self._hurry or self._paused or now > ends:
                        return news
                    self.engine.step()
            except Exception as error:
                for caller in callers:
                    self._let_go(caller)
                return [(caller, error) for caller in callers]

    def _burst_s_for(self, num_streams: int) -> float:
        if self.burst_s == 0:
            return 0.0
        return max(self.burst_s, min(num_streams / MAX_BURSTS_PER_S, LONGEST_BURST_S))

    def _admit(self, caller: _Caller) -> list[tuple[_Caller, Event]]:
        if caller.left:
            self._let_go(caller)
        elif caller.request is None:
            try:
                caller.request = self.engine.submit(
                    caller.prompt_ids,
                    caller.params,
                    snapshot_at=caller.snapshot_at,
                    tokenizer=self.tokenizer,
                )
            except ValueError as error:
                caller.over = True
                return [(caller, error)]
        return []

    def _let_go(self, caller: _Caller) -> None:
        caller.over = True
        if caller.request is not None:
            self.engine.abort(caller.request)

    def _news(self, caller: _Caller, is_due: bool) -> list[Event]:
        """What happened to a caller's request since it was last asked about, tokens if due."""
        request = caller.request
        if caller.over or request is None:
            return []
        if request.error is not None:
            caller.over = True
            return [request.error]
        news: list[Event] = []
        is_due = is_due or caller.num_shown == 0 or request.finish_reason is not None
        num_tokens = len(request.output_ids)
        if caller.wants_tokens and is_due and num_tokens > caller.num_shown:
            news.append([_token_event(request, i) for i in range(caller.num_shown, num_tokens)])
            caller.num_shown = num_tokens
        if request.finish_reason is not None:
            caller.over = True
            news.append(self.engine.completion(request))
        return news


def _token_event(request: Request, index: int) -> TokenEvent:
    return TokenEvent(
        request.output_ids[index],
        request.logprobs[index],
        request.forced[index],
        request.policy_versions[index],
        request.top_logprobs[index],
    )
