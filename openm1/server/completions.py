"""/v1/completions: prompts continued as they stand."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import accumulate
from typing import Any

from openm1.chat.tokenizer import Tokenizer
from openm1.server.chat import exact_tokens, stop_reason, usage
from openm1.server.protocol import CompletionRequest
from openm1.server.replies import Item, NewTokens, Piece, Reply, ReplyOrder
from openm1.server.served import ServedModel
from openm1.server.stream import DONE, event

Scored = tuple[int, float, tuple[tuple[int, float], ...]]


def text_completion(
    replies: Sequence[Reply],
    orders: Sequence[Sequence[ReplyOrder]],
    served: ServedModel,
    request: CompletionRequest,
) -> dict[str, Any]:
    """Choices in the order of prompts, n for each."""
    n = len(orders[0])
    groups = [replies[i : i + n] for i in range(0, len(replies), n)]
    choices: list[dict[str, Any]] = []
    for group, (order, *_) in zip(groups, orders, strict=True):
        echo = served.tokenizer.decode(order.prompt_ids) if request.echo else ""
        for reply in group:
            choices.append(
                {
                    "index": len(choices),
                    "text": echo + reply.completion.text,
                    "logprobs": _reply_logprobs(reply, served, request),
                    "finish_reason": reply.finish,
                    "stop_reason": stop_reason(reply),
                    **(_exact(reply, order) if request.return_token_ids else {}),
                }
            )
    return {**_head(served), "choices": choices, "usage": _total_usage(groups)}


async def text_chunks(
    items: AsyncGenerator[tuple[int, Item], None],
    orders: Sequence[Sequence[ReplyOrder]],
    served: ServedModel,
    request: CompletionRequest,
) -> AsyncGenerator[bytes, None]:
    """The same as events."""
    head = _head(served)
    flat = [order for group in orders for order in group]
    groups: list[list[Reply]] = [[] for _ in orders]
    held: list[list[Scored]] = [[] for _ in flat]

    def chunk(index: int, text: str, finish: str | None = None, **more: Any) -> bytes:
        scored, held[index] = held[index], []
        logprobs = _logprobs(served.tokenizer, scored) if scored else None
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return event({**head, "choices": [{**choice, **more}]})

    async with aclosing(items):
        if request.echo:
            for index, order in enumerate(flat):
                yield chunk(index, served.tokenizer.decode(order.prompt_ids))
        async for index, item in items:
            if isinstance(item, Piece):
                yield chunk(index, item.text)
            elif isinstance(item, NewTokens):
                held[index] += [(t.token_id, t.logprob, t.top_logprobs) for t in item.tokens]
            elif isinstance(item, Reply):
                groups[index // len(orders[0])].append(item)
                exact = _exact(item, flat[index]) if request.return_token_ids else {}
                yield chunk(index, "", item.finish, stop_reason=stop_reason(item), **exact)
    options = request.stream_options
    if options is not None and options.include_usage:
        yield event({**head, "choices": [], "usage": _total_usage(groups)})
    yield DONE


def _exact(reply: Reply, order: ReplyOrder) -> dict[str, Any]:
    return exact_tokens(reply.completion) | {"prompt_token_ids": order.prompt_ids}


def _total_usage(groups: Sequence[Sequence[Reply]]) -> dict[str, Any]:
    """The usage of each prompt, added up."""
    parts = [usage([reply.completion for reply in group]) for group in groups]
    total = parts[0]
    for part in parts[1:]:
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            total[name] += part[name]
        for details in ("prompt_tokens_details", "completion_tokens_details"):
            for name in total[details]:
                total[details][name] += part[details][name]
    return total


def _reply_logprobs(
    reply: Reply, served: ServedModel, request: CompletionRequest
) -> dict[str, Any] | None:
    if request.logprobs is None:
        return None
    completion = reply.completion
    tops = completion.top_logprobs or ((),) * len(completion.token_ids)
    scored = [
        (completion.token_ids[place], completion.logprobs[place], tops[place])
        for place in reply.answer_places
    ]
    return _logprobs(served.tokenizer, scored)


def _logprobs(tokenizer: Tokenizer, scored: Sequence[Scored]) -> dict[str, Any]:
    """In the columns of the old API; offsets count from the first of these tokens."""

    def text(token_id: int) -> str:
        return tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    tokens = [text(token_id) for token_id, _, _ in scored]
    return {
        "tokens": tokens,
        "token_logprobs": [logprob for _, logprob, _ in scored],
        "top_logprobs": [{text(index): value for index, value in top} for _, _, top in scored],
        "text_offset": [0, *accumulate(map(len, tokens))][: len(tokens)],
    }


def _head(served: ServedModel) -> dict[str, Any]:
    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": f"openm1-v{served.policy_version()}",
    }
