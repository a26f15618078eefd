"""The loop: admit, prefill, decode, sample, stop. Tokens only; text lives in `llm`."""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openm1.engine.request import Request
from openm1.engine.sampler import sample, token_logprobs, uniforms
from openm1.engine.stopping import finish_reason
from openm1.engine.thinking import ThoughtTracker
from openm1.kernels.packing import PackedLayout
from openm1.model.cache import CacheView, HybridCache
from openm1.model.m1 import M1ForCausalLM
from openm1.types import Completion, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much runs at once."""

    max_num_seqs: int = 256
    """Sequences decoded together."""
    max_prefill_tokens: int = 8192
    """Prompt tokens per forward pass; longer prompts are split."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """What the engine must know of the vocabulary."""

    vocab_size: int
    """Ids from here on have no text and are never sampled."""
    eos_token_ids: frozenset[int] = frozenset()
    think_open: tuple[int, ...] = ()
    think_close: tuple[int, ...] = ()
    is_blank: Callable[[int], bool] = lambda token: False
    """Whether a token is blank characters only, which may stand before a thought."""


class Engine:
    """Continuous batching over a fixed number of slots, one `step` at a time."""

    def __init__(
        self, model: M1ForCausalLM, tokens: SpecialTokens, config: EngineConfig | None = None
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.config = config or EngineConfig()
        self.policy_version = 0
        self._cache: HybridCache | None = None
        self._free: list[int] = []
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._sessions: OrderedDict[str, tuple[int, list[int]]] = OrderedDict()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        session: str | None = None,
    ) -> Request:
        """Queues one sequence. Raises ValueError on an empty, foreign or too long prompt."""
        self._check(prompt_ids, params)
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        request = Request(
            prompt_ids=list(prompt_ids),
            params=params,
            thought=ThoughtTracker(
                self.tokens.think_open,
                self.tokens.think_close,
                is_blank=self.tokens.is_blank,
                prompt_tail=self._tail(prompt_ids),
                budget=params.thinking_budget,
            ),
            session=session,
        )
        self._waiting.append(request)
        return request

    def _check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        if params.n != 1:
            raise ValueError(f"n is {params.n}; the engine takes one sequence a request")
        if not prompt_ids:
            raise ValueError("the prompt is empty; allowed is at least one token")
        if bad := [i for i in prompt_ids if not 0 <= i < self.model.config.vocab_size]:
            raise ValueError(
                f"prompt has token id {bad[0]}; allowed are 0 to {self.model.config.vocab_size - 1}"
            )
        room = self.model.config.max_position_embeddings
        if len(prompt_ids) + params.max_tokens > room:
            raise ValueError(
                f"prompt of {len(prompt_ids)} tokens and max_tokens {params.max_tokens} exceed the "
                f"model's {room} positions"
            )

    def _tail(self, prompt_ids: list[int]) -> list[int]:
        for at in range(len(prompt_ids) - 1, -1, -1):
            if prompt_ids[at] in self.tokens.eos_token_ids:
                return prompt_ids[at + 1 :]
        return prompt_ids

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Prefills what can be admitted, else decodes one token each; returns what finished.

        After an error the running requests cannot go on; abort them.
        """
        admitted = self._admit()
        batch = admitted or self._running
        if not batch:
            return []
        self._sample(batch, self._prefill(admitted) if admitted else self._decode())
        done = [request for request in self._running if request.finish_reason is not None]
        if done:
            self._running = [r for r in self._running if r.finish_reason is None]
            for request in done:
                self._release(request)
        return done

    def abort(self, request: Request) -> None:
        """Ends a request at once and frees its slot."""
        if request.finish_reason is not None:
            return
        request.finish_reason = "abort"
        if request in self._waiting:
            self._waiting.remove(request)
        else:
            self._running.remove(request)
            self._release(request)

    def completion(self, request: Request) -> Completion:
        """The tokens of a finished request; text is added by `llm`."""
        assert request.finish_reason is not None, "the request is still running"
        return Completion(
            token_ids=tuple(request.output_ids),
            logprobs=tuple(request.logprobs),
            forced=tuple(request.forced),
            finish_reason=request.finish_reason,
            num_reasoning_tokens=request.thought.num_tokens,
            num_prompt_tokens=len(request.prompt_ids),
            cached_tokens=request.num_cached,
            policy_version=request.policy_version,
        )

    def check_integrity(self) -> None:
        """Asserts that each slot is free, running or a session's, and holds what it should."""
        if self._cache is None:
            assert not self._running and not self._sessions
            return
        slots = [*self._free, *(slot for slot, _ in self._sessions.values())]
        slots += [request.slot for request in self._running if request.slot is not None]
        assert sorted(slots) == list(range(self._cache.num_slots)), f"slots in use: {sorted(slots)}"
        for slot, cached in self._sessions.values():
            assert self._cache.lengths[slot] == len(cached)
        for request in self._running:
            assert request.slot is not None and request.finish_reason is None
            # The newest token is run in the next step.
            assert self._cache.lengths[request.slot] == len(request.token_ids) - 1

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Copies new weights in by name and forgets every cached sequence. Nothing may be running.

        Tensors that are the model's own storage are not copied, so a trainer may share its model.
        """
        if self.has_work:
            raise RuntimeError("load_weights while requests run; finish or abort them first")
        self._free += [slot for slot, _ in self._sessions.values()]
        self._sessions.clear()
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors:
                if name not in own:
                    raise ValueError(f"unknown weight {name!r}")
                if own[name].shape != tensor.shape:
                    raise ValueError(
                        f"weight {name} has shape {[*tensor.shape]}; expected {[*own[name].shape]}"
                    )
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        self.policy_version = version

    def _admit(self) -> list[Request]:
        if not self._waiting:
            return []
        if self._cache is None:
            self._cache = HybridCache(
                self.model.config, 0, dtype=self.model.dtype, device=self.model.device
            )
        # Low slots first: those of a fresh batch then lie side by side and need no gathering.
        self._free.sort(reverse=True)
        admitted: list[Request] = []
        while self._waiting:
            slot = self._slot_for(self._waiting[0])
            if slot is None:
                break
            request = self._waiting.popleft()
            request.slot = slot
            request.policy_version = self.policy_version
            admitted.append(request)
        self._running += admitted
        return admitted

    def _slot_for(self, request: Request) -> int | None:
        assert self._cache is not None
        if request.session in self._sessions:
            slot, cached = self._sessions.pop(request.session)
            prompt = request.prompt_ids
            if len(cached) < len(prompt) and prompt[: len(cached)] == cached:
                request.num_cached = len(cached)
                return slot
            self._free.append(slot)
        if not self._free:
            self._make_free_slots()
        if not self._free:
            return None
        slot = self._free.pop()
        self._cache.reset(slot)
        return slot

    def _make_free_slots(self) -> None:
        """Adds slots while that is allowed, else forgets the session used longest ago."""
        assert self._cache is not None
        before = self._cache.num_slots
        wanted = min(self.config.max_num_seqs, max(2 * before, len(self._waiting)))
        if wanted > before:
            self._cache.add_slots(wanted - before)
            self._free = list(range(wanted - 1, before - 1, -1))
        elif self._sessions:
            _, (oldest, _) = self._sessions.popitem(last=False)
            self._free.append(oldest)

    def _release(self, request: Request) -> None:
        assert request.slot is not None
        if request.session is not None and request.finish_reason != "abort":
            if request.session in self._sessions:
                # Two requests of one session ran side by side; the later one stays.
                self._free.append(self._sessions.pop(request.session)[0])
            # The newest token was sampled but never run, so it is not in the cache.
            self._sessions[request.session] = (request.slot, request.token_ids[:-1])
        else:
            self._free.append(request.slot)
        request.slot = None

    def _prefill(self, requests: list[Request]) -> Tensor:
        """Logits [S, V] after each prompt; equal prompts are computed once, their slots copied."""
        assert self._cache is not None
        equal: dict[tuple[int, ...], list[Request]] = {}
        for request in requests:
            equal.setdefault(tuple(request.prompt_ids), []).append(request)
        # The one with most of its prompt in the cache leads.
        groups = [sorted(group, key=lambda r: -r.num_cached) for group in equal.values()]
        rows = self._prefill_rows([group[0] for group in groups])
        index: dict[Request, int] = {}
        for row, group in enumerate(groups):
            source, *targets = [request.slot for request in group]
            assert source is not None
            self._cache.fork(source, [slot for slot in targets if slot is not None])
            index.update(dict.fromkeys(group, row))
        return rows[[index[request] for request in requests]]

    def _prefill_rows(self, requests: list[Request]) -> Tensor:
        last: dict[int, Tensor] = {}
        left = [(row, request, request.num_cached) for row, request in enumerate(requests)]
        while left:
            budget, batch, later = self.config.max_prefill_tokens, [], []
            for row, request, done in left:
                take = min(budget, len(request.prompt_ids) - done)
                if take:
                    batch.append((row, request, done, take))
                    budget -= take
                if done + take < len(request.prompt_ids):
                    later.append((row, request, done + take))
            pieces = [request.prompt_ids[done : done + take] for _, request, done, take in batch]
            hidden = self._run(
                [token for piece in pieces for token in piece],
                [request.slot for _, request, _, _ in batch],
                [len(piece) for piece in pieces],
            )
            last.update({row: hidden[n] for n, (row, *_) in enumerate(batch)})
            left = later
        return self.model.logits(torch.stack([last[row] for row in range(len(requests))]))

    def _decode(self) -> Tensor:
        ids = [request.output_ids[-1] for request in self._running]
        slots = [request.slot for request in self._running]
        return self.model.logits(self._run(ids, slots, [1] * len(ids)))

    def _run(self, ids: list[int], slots: list[int | None], new_tokens: list[int]) -> Tensor:
        """Hidden states [S, C] after the last new token of each slot."""
        assert self._cache is not None
        device = self.model.device
        layout = PackedLayout(new_tokens, device)
        view = CacheView(self._cache, [s for s in slots if s is not None], new_tokens)
        hidden = self.model.model(torch.tensor(ids, device=device), layout, view).hidden
        return hidden.index_select(0, layout.last_tokens)

    def _sample(self, requests: list[Request], logits: Tensor) -> None:
        logits[:, self.tokens.vocab_size :] = -torch.inf
        params = [request.params for request in requests]
        device = logits.device
        temperature = torch.tensor(
            [p.temperature for p in params], dtype=torch.float64, device=device
        )
        chosen = sample(
            logits,
            temperature,
            torch.tensor([p.top_k for p in params], device=device),
            torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
            uniforms([p.seed or 0 for p in params], [len(r.output_ids) for r in requests]),
        )
        forced = [request.thought.forced for request in requests]
        for row, token in enumerate(forced):
            if token is not None:
                chosen[row] = token
        logprobs = token_logprobs(logits, temperature, chosen).tolist()
        rows = zip(requests, chosen.tolist(), logprobs, forced, strict=True)
        for request, token, logprob, force in rows:
            request.output_ids.append(token)
            request.logprobs.append(logprob)
            request.forced.append(force is not None)
            request.thought.observe(token)
            request.finish_reason = finish_reason(request, self.tokens.eos_token_ids)
