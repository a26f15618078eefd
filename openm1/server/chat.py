"""/v1/chat/completions: replies in the words of OpenAI's chat API."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from openm1.chat.tokenizer import Tokenizer
from openm1.chat.tool_stream import CallPart
from openm1.server.protocol import ChatRequest
from openm1.server.replies import Item, NewTokens, Piece, Reply
from openm1.server.served import ServedModel
from openm1.server.stream import DONE, event
from openm1.server.thinking import Thinking
from openm1.types import Completion


def chat_completion(
    replies: Sequence[Reply],
    served: ServedModel,
    request: ChatRequest,
    thinking: Thinking,
    prompt_ids: list[int],
) -> dict[str, Any]:
    """The whole answer to a request that does not stream."""
    return {
        **_head(served, "chat.completion"),
        "choices": [
            {
                "index": index,
                "message": _message(reply.completion, thinking),
                "logprobs": _reply_logprobs(reply, served.tokenizer) if request.logprobs else None,
                "finish_reason": reply.finish,
                "stop_reason": stop_reason(reply),
                **(exact_tokens(reply.completion) if request.return_token_ids else {}),
            }
            for index, reply in enumerate(replies)
        ],
        "usage": usage([reply.completion for reply in replies]),
        **({"prompt_token_ids": prompt_ids} if request.return_token_ids else {}),
    }


async def chat_chunks(
    items: AsyncGenerator[tuple[int, Item], None],
    served: ServedModel,
    request: ChatRequest,
    thinking: Thinking,
    prompt_ids: list[int],
) -> AsyncGenerator[bytes, None]:
    """The answer as events, one choice's deltas between another's."""
    chunks = _Chunks(served, request, thinking, prompt_ids)
    async with aclosing(items):
        for index in range(request.n or 1):
            yield chunks.chunk(index, {"role": "assistant", "content": ""})
        async for index, item in items:
            for data in chunks.take(index, item):
                yield data
    options = request.stream_options
    if options is not None and options.include_usage:
        yield event({**chunks.head, "choices": [], "usage": usage(chunks.completions)})
    yield DONE


class _Chunks:
    """Turns items into chunks of one stream."""

    def __init__(
        self, served: ServedModel, request: ChatRequest, thinking: Thinking, prompt_ids: list[int]
    ) -> None:
        self.head = _head(served, "chat.completion.chunk")
        self.completions: list[Completion] = []
        self._tokenizer = served.tokenizer
        self._request, self._thinking, self._prompt_ids = request, thinking, prompt_ids
        self._num_tokens = [0] * (request.n or 1)
        options = request.stream_options
        self._tells_usage = bool(options and options.continuous_usage_stats)
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in range(request.n or 1)]

    def take(self, index: int, item: Item) -> Iterable[bytes]:
        if isinstance(item, Piece):
            self._num_tokens[index] = item.num_tokens
            if item.part == "answer":
                yield self.chunk(index, {"content": item.text})
            elif self._thinking.shown:
                yield self.chunk(index, {"reasoning_content": item.text, "reasoning": item.text})
        elif isinstance(item, CallPart):
            yield from self._call(index, item)
        elif isinstance(item, NewTokens):
            self._logprobs[index] += [
                token_logprob(self._tokenizer, t.token_id, t.logprob, t.top_logprobs)
                for t in item.tokens
            ]
        else:
            yield self._end(index, item)

    def chunk(
        self, index: int, delta: dict[str, Any], finish: str | None = None, **more: Any
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": finish, **more}
        if self._request.logprobs:
            held, self._logprobs[index] = self._logprobs[index], []
            choice["logprobs"] = {"content": held, "refusal": None} if held else None
        so_far = {"usage": self._usage_so_far()} if self._tells_usage else {}
        return event({**self.head, "choices": [choice], **so_far})

    def _usage_so_far(self) -> dict[str, int]:
        prompt, written = len(self._prompt_ids), sum(self._num_tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
        }

    def _call(self, index: int, part: CallPart) -> Iterable[bytes]:
        if part.begins:
            function = {"name": part.name, "arguments": ""}
            head = {"index": part.index, "id": part.id, "type": "function", "function": function}
            yield self.chunk(index, {"tool_calls": [head]})
        if part.arguments:
            more = {"index": part.index, "function": {"arguments": part.arguments}}
            yield self.chunk(index, {"tool_calls": [more]})

    def _end(self, index: int, reply: Reply) -> bytes:
        self.completions.append(reply.completion)
        more: dict[str, Any] = {"stop_reason": stop_reason(reply)}
        if self._request.return_token_ids:
            more |= exact_tokens(reply.completion) | {"prompt_token_ids": self._prompt_ids}
        return self.chunk(index, {}, reply.finish, **more)


def usage(completions: Sequence[Completion]) -> dict[str, Any]:
    """Of one prompt and all its replies; the prompt counts once."""
    prompt = max((c.num_prompt_tokens for c in completions), default=0)
    written = sum(len(c.token_ids) for c in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {
            # The later replies find the prompt that the first one has just read.
            "cached_tokens": min((c.cached_tokens for c in completions), default=0),
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(c.num_reasoning_tokens for c in completions),
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def stop_reason(reply: Reply) -> str | int | None:
    """What ended the reply beyond what `finish_reason` has words for: the stop string, or
    "repetition" for one that was caught in a loop."""
    if reply.completion.finish_reason == "repetition":
        return "repetition"
    return reply.stop_string


def exact_tokens(completion: Completion) -> dict[str, Any]:
    """What reinforcement learning needs of a reply, per token."""
    return {
        "token_ids": list(completion.token_ids),
        "token_logprobs": list(completion.logprobs),
        "forced": list(completion.forced),
        "policy_versions": list(completion.policy_versions),
    }


def token_logprob(
    tokenizer: Tokenizer, token_id: int, logprob: float, top: Iterable[tuple[int, float]]
) -> dict[str, Any]:
    """One entry of `logprobs.content`."""
    return {
        **_scored(tokenizer, token_id, logprob),
        "top_logprobs": [_scored(tokenizer, index, value) for index, value in top],
    }


def _scored(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def _reply_logprobs(reply: Reply, tokenizer: Tokenizer) -> dict[str, Any]:
    completion, tops = reply.completion, reply.completion.top_logprobs
    content = [
        token_logprob(
            tokenizer,
            completion.token_ids[place],
            completion.logprobs[place],
            tops[place] if tops else (),
        )
        for place in reply.answer_places
    ]
    return {"content": content, "refusal": None}


def _message(completion: Completion, thinking: Thinking) -> dict[str, Any]:
    reasoning = completion.reasoning if thinking.shown else None
    message: dict[str, Any] = {
        "role": "assistant",
        # OpenAI's clients read null as "the calls are all there is".
        "content": completion.text or (None if completion.tool_calls else ""),
        "refusal": None,
        "reasoning_content": reasoning,
        "reasoning": reasoning,
    }
    if completion.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in completion.tool_calls
        ]
    return message


def _head(served: ServedModel, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": f"openm1-v{served.policy_version()}",
    }
