"""What a server is given: a model behind a policy, with its tokenizer and its chat format."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from openm1.chat.format import ChatFormat
from openm1.chat.thinking import THINK_CLOSE, THINK_OPEN
from openm1.chat.tokenizer import Tokenizer
from openm1.types import Completion, SamplingParams

if TYPE_CHECKING:
    from openm1.engine.client import TokenEvent


class StreamingPolicy(Protocol):
    """What the server asks of an engine; `engine.client.EnginePolicy` is one."""

    def bursts(
        self, prompt_ids: list[int], params: SamplingParams, *, snapshot_at: Iterable[int] = ()
    ) -> AsyncGenerator[list[TokenEvent] | Completion, None]: ...

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, snapshot_at: Iterable[int] = ()
    ) -> Completion: ...

    async def pause(self) -> None: ...

    def resume(self) -> None: ...

    async def update_weights(
        self,
        tensors: Iterable[tuple[str, Any]],
        *,
        version: int,
        in_flight: Literal["recompute", "keep"],
    ) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheCounts:
    """The hybrid cache at one moment, for `/v1/cache` and the page."""

    budget_bytes: int
    in_use_bytes: int
    cached_bytes: int
    page_tokens: int
    page_bytes: int
    state_bytes: int
    num_pages_in_use: int
    num_pages_cached: int
    """Of those in use, the ones only cached prefixes hold."""
    num_states_in_use: int
    num_states_cached: int
    num_running: int
    num_waiting: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """One model under one name."""

    name: str
    policy: StreamingPolicy
    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    """None for a model that cannot chat; then only /v1/completions answers."""
    context_tokens: int
    """The longest prompt and reply together."""
    cache_counts: Callable[[], CacheCounts]
    read_weights: Callable[[str], Iterable[tuple[str, Any]]]
    """Named tensors of a checkpoint folder; ValueError or OSError for what is none."""
    policy_version: Callable[[], int]
    created: int = field(default_factory=lambda: int(time.time()))

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside a thought that the reply carries on."""
        eos, start = self.tokenizer.eos_token_id, len(prompt_ids)
        while start and prompt_ids[start - 1] != eos:
            start -= 1
        tail = self.tokenizer.decode(prompt_ids[start:])
        return tail.rfind(THINK_OPEN) > tail.rfind(THINK_CLOSE)
