"""Which tokens run next: decode rows, then prefill, then new requests, as far as memory goes.

With c tokens of a request computed and n known, c < n - 1 is prefill and c = n - 1 is decode: the
last token runs, and its logits give the next. So prefill needs no logits, and equal prompts share
all but their last token, from which each samples for itself.
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass, field
from itertools import count

from openm1.engine.cache.hybrid import CachedSequence, HybridCache
from openm1.engine.request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to before `end` of a request, to be computed without logits."""

    request: Request
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """No request is in it twice."""

    prefill: list[Chunk] = field(default_factory=list)
    decode: list[Request] = field(default_factory=list)


class Scheduler:
    """Keeps requests in two lists, and has memory in the cache for all tokens of the running."""

    def __init__(self, cache: HybridCache, *, max_num_seqs: int, max_step_tokens: int) -> None:
        """A decode row is one token of a step, so no more than max_step_tokens run either."""
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_step_tokens = max_step_tokens
        self.waiting: list[Request] = []
        """Best first."""
        self.running: list[Request] = []
        self._arrivals = count()
        # The last request that found no memory, and how much others held then.
        self._refused: Request | None = None
        self._held_bytes = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError if it could not run even alone."""
        sizes = self.cache.sizes
        # The last token of an answer is sampled but never run.
        most = len(request.prompt_ids) + request.params.max_tokens - 1
        if sizes.bytes_for(most) > sizes.budget_bytes:
            raise ValueError(
                f"prompt of {len(request.prompt_ids)} tokens and max_tokens "
                f"{request.params.max_tokens} need {sizes.bytes_for(most)} bytes of cache; "
                f"allowed are {sizes.budget_bytes} (the memory budget), which hold one sequence of "
                f"{sizes.longest_tokens} tokens"
            )
        request.arrival = next(self._arrivals)
        insort(self.waiting, request, key=_rank)

    def abort(self, request: Request) -> None:
        """Forgets a request, waiting or running, and frees what it has."""
        if request.sequence is None:
            self.waiting.remove(request)
        else:
            self._stop(request)

    def finish(self, request: Request) -> None:
        """The last token is sampled: what the request has becomes a cached prefix."""
        self.cache.finish(_sequence(request), request.token_ids)
        self.running.remove(request)
        request.sequence = None

    def restart_all(self) -> None:
        """Sends all running requests back to wait, with their tokens, to be computed again."""
        for request in self.running[:]:
            self._preempt(request)

    def schedule(self) -> StepPlan:
        """What to run next; the cache has room for it. Empty only when there is no work."""
        plan = StepPlan()
        self.running.sort(key=_rank)
        for request in self.running[:]:
            is_running = request.sequence is not None
            if is_running and _num_left(request) == 0 and self._make_room(request):
                plan.decode.append(request)
        for request in self.running:
            if _num_left(request) > 0:
                self._plan_chunk(plan, request)
        self._admit(plan)
        return plan

    def ran(self, plan: StepPlan) -> None:
        """What was planned has been computed, all of it; nobody was aborted meanwhile."""
        for request in plan.decode:
            self.cache.advance(_sequence(request), 1)
        for chunk in plan.prefill:
            sequence = _sequence(chunk.request)
            self.cache.advance(sequence, chunk.end - chunk.start)
            if chunk.end in chunk.request.snapshot_at:
                self.cache.snapshot(sequence, chunk.request.token_ids)

    def _make_room(self, request: Request) -> bool:
        """Room for one more token. The worst requests make way; False if that was this one."""
        while not self.cache.grow(_sequence(request), request.num_tokens):
            assert len(self.running) > 1, "a request that runs alone does not fit the budget"
            worst = max(self.running, key=_rank)
            self._preempt(worst)
            if worst is request:
                return False
        return True

    def _plan_chunk(self, plan: StepPlan, request: Request) -> None:
        """The next tokens of a prefill: up to a snapshot, its end or the end of the step's room."""
        start = _sequence(request).num_tokens
        stop = min(start + self._num_tokens_free(plan), request.num_tokens - 1)
        end = min((at for at in request.snapshot_at if start < at < stop), default=stop)
        if end > start:
            plan.prefill.append(Chunk(request, start, end))

    def _num_tokens_free(self, plan: StepPlan) -> int:
        # Never negative: whoever was started found room when all others had theirs.
        num_prefill = sum(chunk.end - chunk.start for chunk in plan.prefill)
        return self.max_step_tokens - len(plan.decode) - num_prefill

    def _admit(self, plan: StepPlan) -> None:
        """Starts waiting requests, best first, until something they need runs out."""
        # The best priority that is reading a prompt, by the prompt's hash: of two prompts with one
        # hash one would wait for nothing, no more. The worst come first, so that the best remain.
        reading = {r.prompt_hash: r.priority for r in self.running[::-1] if _is_reading_prompt(r)}
        for request in self.waiting[:]:
            # What another reads now need not be read twice; only for a worse one nobody waits.
            if reading.get(request.prompt_hash, -math.inf) >= request.priority:
                continue
            full = len(self.running) >= self.max_num_seqs or self._num_tokens_free(plan) == 0
            if full or not self._start(request):
                return
            if _num_left(request) == 0:
                plan.decode.append(request)
            else:
                self._plan_chunk(plan, request)
            if _is_reading_prompt(request):
                reading[request.prompt_hash] = request.priority

    def _start(self, request: Request) -> bool:
        # To look for a long prefix in every step, and find the memory as full as before, is slow.
        if request is self._refused and self.cache.num_bytes_held >= self._held_bytes:
            return False
        sequence = self.cache.start(request.token_ids)
        if sequence is None:
            self._refused, self._held_bytes = request, self.cache.num_bytes_held
            return False
        self.waiting.remove(request)
        self.running.append(request)
        request.sequence = sequence
        request.snapshot_at.add(len(request.prompt_ids) - 1)
        if sequence.branch_point is not None:
            request.snapshot_at.add(sequence.branch_point)
        if not request.was_admitted:
            request.was_admitted = True
            request.num_cached = sequence.num_cached
        return True

    def _preempt(self, request: Request) -> None:
        self._stop(request)
        insort(self.waiting, request, key=_rank)

    def _stop(self, request: Request) -> None:
        self.cache.release(_sequence(request))
        self.running.remove(request)
        request.sequence = None

    def check_integrity(self) -> None:
        """Asserts that the lists are in order, and the cache's books with them."""
        assert self.waiting == sorted(self.waiting, key=_rank)
        assert all(request.sequence is None for request in self.waiting)
        assert len(self.running) <= self.max_num_seqs
        assert all(_num_left(request) >= 0 for request in self.running)
        self.cache.check_integrity(_sequence(request) for request in self.running)


def _rank(request: Request) -> tuple[int, int]:
    """The lowest goes first and is preempted last."""
    return -request.priority, request.arrival


def _sequence(request: Request) -> CachedSequence:
    assert request.sequence is not None, "the request is not running"
    return request.sequence


def _num_left(request: Request) -> int:
    """Tokens to prefill before the last one can be run."""
    return request.num_tokens - 1 - _sequence(request).num_tokens


def _is_reading_prompt(request: Request) -> bool:
    """Whether the state that equal prompts can start from is still to come."""
    return _sequence(request).num_tokens < len(request.prompt_ids) - 1
