"""The loop: plan, prefill, decode, choose, stop. Tokens only; text lives in `llm`."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openm1.chat.tokenizer import Tokenizer
from openm1.common.device import available_memory_bytes
from openm1.engine.admission import make_request
from openm1.engine.cache.hybrid import CachedSequence, CacheSizes, HybridCache
from openm1.engine.config import EngineConfig, SpecialTokens
from openm1.engine.draw import BadLogits
from openm1.engine.request import Request, RequestFailed
from openm1.engine.runner import Runner, TorchRunner
from openm1.engine.sampler import Choice, choose, sampling_row
from openm1.engine.scheduler import Scheduler
from openm1.engine.stopping import finish_reason
from openm1.model.cache import CachePools
from openm1.model.m1 import M1ForCausalLM
from openm1.types import Completion, SamplingParams

InFlight = Literal["recompute", "keep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMemory:
    """Keys, values and states: bytes, pages and states, and who waits for them."""

    budget_bytes: int
    in_use_bytes: int = 0
    """Of running sequences and cached prefixes."""
    cached_bytes: int = 0
    """Of those, what is given up when a request needs the room."""
    page_tokens: int = 0
    page_bytes: int = 0
    state_bytes: int = 0
    num_pages_in_use: int = 0
    num_pages_cached: int = 0
    """Of those in use, what only cached prefixes hold; so too with states."""
    num_states_in_use: int = 0
    num_states_cached: int = 0
    num_running: int = 0
    num_waiting: int = 0


class Engine:
    """Continuous batching over a hybrid cache, one `step` at a time.

    Its methods may be called from any thread; they wait for a running step to end.
    """

    def __init__(
        self, model: M1ForCausalLM, tokens: SpecialTokens, config: EngineConfig | None = None
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.config = config or EngineConfig()
        self.policy_version = 0
        self.lock = threading.RLock()
        self._live: dict[Request, None] = {}
        self._is_open = False
        self._runner: Runner
        self._scheduler: Scheduler

    def _open(self) -> None:
        """Takes memory and makes empty books, when the first request comes."""
        model, config = self.model, self.config
        budget = config.memory_budget_bytes or available_memory_bytes(model.device) // 2
        sizes = CacheSizes(
            page_tokens=config.page_tokens,
            page_bytes=CachePools.page_bytes(model.config, config.page_tokens, model.dtype),
            state_bytes=CachePools.state_bytes(model.config, model.dtype),
            budget_bytes=budget,
        )
        # Of either kind as many as the budget buys: the books see to it that both together fit.
        pools = CachePools(
            model.config,
            num_pages=budget // sizes.page_bytes if sizes.page_bytes else 0,
            num_slots=budget // sizes.state_bytes if sizes.state_bytes else 0,
            page_tokens=config.page_tokens,
            dtype=model.dtype,
            device=model.device,
        )
        self._runner = _make_runner(model, pools, config)
        self._scheduler = self._new_books(sizes)
        self._is_open = True

    def _new_books(self, sizes: CacheSizes) -> Scheduler:
        config = self.config
        return Scheduler(
            HybridCache(sizes),
            max_num_seqs=config.max_num_seqs,
            max_step_tokens=config.max_step_tokens,
        )

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def memory(self) -> EngineMemory:
        if not self._is_open:
            return EngineMemory(budget_bytes=self.config.memory_budget_bytes or 0)
        scheduler, cache = self._scheduler, self._scheduler.cache
        return EngineMemory(
            budget_bytes=cache.sizes.budget_bytes,
            in_use_bytes=cache.num_bytes_in_use,
            cached_bytes=cache.num_bytes_cached,
            page_tokens=cache.sizes.page_tokens,
            page_bytes=cache.sizes.page_bytes,
            state_bytes=cache.sizes.state_bytes,
            num_pages_in_use=cache.pages.num_used,
            num_pages_cached=cache.pages.num_used - cache.pages.num_held,
            num_states_in_use=cache.states.num_used,
            num_states_cached=cache.states.num_used - cache.states.num_held,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
        )

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        snapshot_at: Iterable[int] = (),
        tokenizer: Tokenizer | None = None,
    ) -> Request:
        """Queues one sequence.

        `snapshot_at` are prefix lengths of the prompt from which later prompts are likely to
        differ; the prompt's own end is always one. Stop strings need a tokenizer. Raises ValueError
        on an empty, foreign or too long prompt, and on one that no memory could ever be found for.
        """
        request = make_request(
            self.model.config,
            self.tokens,
            prompt_ids,
            params,
            snapshot_at=snapshot_at,
            tokenizer=tokenizer,
        )
        with self.lock:
            if not self._is_open:
                self._open()
            self._scheduler.add(request)
            self._live[request] = None
        return request

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One pass: a token for each running request, some of the prompts; returns what finished.

        A request whose logits are no distribution ends with an `error`; the others go on.
        After an error, Ctrl-C included, all requests wait to be computed again: abort them, or go
        on.
        """
        with self.lock:
            if not self._live:
                return []
            # What an error finds: books half written, or books whole and caches half computed.
            books_are_whole = False
            try:
                plan = self._scheduler.schedule()
                self._settle()
                books_are_whole = True
                if plan.prefill:
                    pieces = [(c.request, c.request.ids(c.start, c.end)) for c in plan.prefill]
                    self._runner.prefill([(sequence_of(r), ids) for r, ids in pieces])
                    places = [(c.request, p) for c in plan.prefill for p in range(c.start, c.end)]
                    self._note_experts(places)
                sound, choice = self._choose(plan.decode)
                self._note_experts([(request, request.num_tokens - 1) for request in plan.decode])
                books_are_whole = False
                self._scheduler.ran(plan)
                done = self._take(sound, choice)
                if len(sound) < len(plan.decode):
                    done += self._fail(set(plan.decode) - set(sound))
                self._settle()
                return done
            except BaseException:
                self._recover(books_are_whole=books_are_whole)
                raise

    def _settle(self) -> None:
        """Carries out what the books order, and gives memory that came free back to the system."""
        cache = self._scheduler.cache
        self._runner.apply(cache.take_orders())
        self._runner.pools.release(*cache.take_freed())

    def _choose(self, requests: list[Request]) -> tuple[list[Request], Choice]:
        """Those of the requests whose logits are sound, and a token for each of them."""
        if not requests:
            return [], Choice(tokens=[], logprobs=[], top_logprobs=[])
        newest = [request.newest_id for request in requests]
        logits = self._runner.decode(newest, [sequence_of(request) for request in requests])
        rows = [sampling_row(r.params, r.output_ids, r.thought, r.adjustment) for r in requests]
        vocab_size, plain = self.tokens.vocab_size, self._runner.sample
        while True:
            try:
                return requests, choose(logits, rows, vocab_size=vocab_size, plain=plain)
            except BadLogits as error:
                sound = [i for i in range(len(requests)) if i not in error.rows]
                requests, rows = [requests[i] for i in sound], [rows[i] for i in sound]
                logits = logits[sound]

    def _take(self, requests: list[Request], choice: Choice) -> list[Request]:
        """Appends each request's token; returns those it was the last token of."""
        done = []
        rows = zip(requests, choice.tokens, choice.logprobs, choice.top_logprobs, strict=True)
        for request, token, logprob, top in rows:
            request.append(token, logprob, top, version=self.policy_version)
            request.finish_reason = finish_reason(request, self.tokens.eos_token_ids)
            if request.finish_reason is not None:
                del self._live[request]
                self._scheduler.finish(request)
                done.append(request)
        return done

    def _fail(self, requests: Iterable[Request]) -> list[Request]:
        """Ends requests whose logits are no distribution.

        Their caches may hold what made them so, and so may the prefixes that came of those.
        """
        self._scheduler.cache.clear()
        for request in requests:
            request.error = RequestFailed(
                f"after {len(request.output_ids)} tokens the model's logits for this request are "
                "NaN, infinite or all minus infinity: its weights are not finite, or all tokens "
                "are excluded"
            )
            request.finish_reason = "abort"
            del self._live[request]
            self._scheduler.abort(request)
        return list(requests)

    def _note_experts(self, places: list[tuple[Request, int]]) -> None:
        """Of what the runner has just computed, in its order. A position that is computed again
        has the choices that what follows has seen."""
        if places and self.config.record_experts:
            assert isinstance(self._runner, TorchRunner)
            for (request, place), chosen in zip(places, self._runner.experts, strict=True):
                request.experts[place] = chosen

    def _recover(self, *, books_are_whole: bool) -> None:
        """After an error in a step. States are written in place, so running requests start anew."""
        if books_are_whole:
            self._scheduler.restart_all()
            return
        # New books, in which nothing is cached and everybody waits.
        self._scheduler = self._new_books(self._scheduler.cache.sizes)
        self._live = {r: None for r in self._live if r.finish_reason is None}
        for request in self._live:
            request.sequence = None
            self._scheduler.add(request)
        pools = self._runner.pools
        pools.release(range(pools.num_pages), range(pools.num_slots))

    def abort(self, request: Request) -> None:
        """Ends a request and frees its memory."""
        with self.lock:
            if request.finish_reason is None:
                request.finish_reason = "abort"
                self._live.pop(request, None)
                self._scheduler.abort(request)
                self._settle()

    def completion(self, request: Request) -> Completion:
        """The tokens of a finished request; text is added by `llm`."""
        assert request.finish_reason is not None, "the request is still running"
        return Completion(
            token_ids=tuple(request.output_ids),
            logprobs=tuple(request.logprobs),
            top_logprobs=tuple(request.top_logprobs) if request.params.top_logprobs else (),
            forced=tuple(request.forced),
            finish_reason=request.finish_reason,
            thought_end=request.thought.thought_end,
            num_reasoning_tokens=request.thought.num_tokens,
            num_prompt_tokens=len(request.prompt_ids),
            cached_tokens=request.num_cached,
            policy_versions=tuple(request.policy_versions),
            experts=self._experts(request),
        )

    def _experts(self, request: Request) -> tuple[bytes, ...]:
        if not self.config.record_experts:
            return ()
        return tuple(request.experts.get(i, b"") for i in range(request.num_tokens - 1))

    def check_integrity(self) -> None:
        """Asserts that every page and slot is free, a running sequence's or a cached prefix's."""
        if not self._is_open:
            assert not self._live
            return
        scheduler = self._scheduler
        assert {*scheduler.waiting, *scheduler.running} == set(self._live)
        assert all(request.finish_reason is None for request in self._live)
        scheduler.check_integrity()

    def load_weights(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        version: int,
        in_flight: InFlight = "recompute",
    ) -> None:
        """Copies new weights in by name and forgets every cached prefix.

        Requests in flight keep their tokens. "recompute" builds their caches anew under the new
        weights; "keep" lets them go on with the caches they have, which costs nothing and mixes the
        two. All names and shapes are checked before anything is copied. Tensors that are the
        model's own storage are not copied, so a trainer may share its model.
        """
        if in_flight not in ("recompute", "keep"):
            raise ValueError(f"in_flight is {in_flight!r}; allowed are recompute, keep")
        tensors = list(tensors)
        own = dict(self.model.named_parameters())
        for name, tensor in tensors:
            if name not in own:
                raise ValueError(f"unknown weight {name!r}")
            if own[name].shape != tensor.shape:
                raise ValueError(
                    f"weight {name} has shape {[*tensor.shape]}; expected {[*own[name].shape]}"
                )
        with self.lock, torch.no_grad():
            if self._is_open:
                if in_flight == "recompute":
                    self._scheduler.restart_all()
                # The cache knows which sequences began before, and never remembers those.
                self._scheduler.cache.clear()
                self._settle()
            for name, tensor in tensors:
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
            self.policy_version = version
            if self._is_open:
                self._runner.weights_changed()


def sequence_of(request: Request) -> CachedSequence:
    assert request.sequence is not None
    return request.sequence


def _make_runner(model: M1ForCausalLM, pools: CachePools, config: EngineConfig) -> Runner:
    from openm1.engine.cpu_runner import CpuRunner, unsupported

    if config.record_experts:
        if not 1 < model.config.num_local_experts <= 256:
            raise ValueError(
                f"record_experts with {model.config.num_local_experts} experts; allowed is 2 to 256"
            )
        return TorchRunner(model, pools, record_experts=True)
    kernels = config.kernels
    # A subclass may compute something else than the fused loops do.
    if kernels == "auto":
        plain = type(model) is M1ForCausalLM
        kernels = "cpu" if plain and unsupported(model) is None else "torch"
    return CpuRunner(model, pools) if kernels == "cpu" else TorchRunner(model, pools)
