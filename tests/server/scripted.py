"""A policy that writes what it is told, a token at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable

from openm1.chat.tokenizer import Tokenizer
from openm1.engine.client import TokenEvent
from openm1.engine.request import RequestFailed
from openm1.types import Completion, SamplingParams


class ScriptedPolicy:
    """Writes `reply`, whatever it is asked, as far as `max_tokens` goes, or until it fails."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.reply = ""
        self.fails_after: int | None = None

    async def bursts(
        self, prompt_ids: list[int], params: SamplingParams, *, snapshot_at: Iterable[int] = ()
    ) -> AsyncGenerator[list[TokenEvent] | Completion, None]:
        end = self.tokenizer.eos_token_id or 0
        ids = [*self.tokenizer.encode(self.reply), end][: params.max_tokens]
        for count, token_id in enumerate(ids):
            await asyncio.sleep(0)
            if count == self.fails_after:
                raise RequestFailed("no logits")
            yield [TokenEvent(token_id, 0.0, forced=False, policy_version=0)]
        yield Completion(
            token_ids=tuple(ids),
            logprobs=(0.0,) * len(ids),
            finish_reason="stop" if ids[-1] == end else "length",
            num_prompt_tokens=len(prompt_ids),
        )

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, snapshot_at: Iterable[int] = ()
    ) -> Completion:
        *_, last = [event async for event in self.bursts(prompt_ids, params)]
        assert isinstance(last, Completion)
        return last
