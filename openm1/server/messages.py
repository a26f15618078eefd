"""/v1/messages: replies in the words of Anthropic's API."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from pydantic_core import from_json

from openm1.chat.tool_stream import CallPart
from openm1.server.replies import Item, Piece, Reply
from openm1.server.served import ServedModel
from openm1.server.stream import event
from openm1.server.thinking import Thinking
from openm1.types import Completion


def anthropic_message(reply: Reply, served: ServedModel, thinking: Thinking) -> dict[str, Any]:
    """The whole answer to a request that does not stream."""
    completion = reply.completion
    blocks: list[dict[str, Any]] = []
    if completion.reasoning is not None:
        thought = completion.reasoning
        shown = thought if thinking.shown else ""
        blocks.append({"type": "thinking", "thinking": shown, "signature": _signature(thought)})
    if completion.text or not completion.tool_calls:
        blocks.append({"type": "text", "text": completion.text, "citations": None})
    blocks += [
        {"type": "tool_use", "id": _tool_id(c), "name": c.name, "input": _input(c)}
        for c in reply.calls
    ]
    return {**_head(served), "content": blocks, **_end(reply), "usage": _usage(completion)}


async def message_events(
    items: AsyncGenerator[tuple[int, Item], None],
    served: ServedModel,
    thinking: Thinking,
    num_prompt_tokens: int,
) -> AsyncGenerator[bytes, None]:
    """The same as events: blocks one after the other, each opened, filled and closed."""
    blocks = _Blocks(thinking)
    async with aclosing(items):
        start = {
            **_head(served),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            # How much of the prompt was cached is known at the end, in message_delta.
            "usage": {
                "input_tokens": num_prompt_tokens,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 0,
            },
        }
        yield _event({"type": "message_start", "message": start})
        async for _, item in items:
            for each in blocks.take(item):
                yield _event(each)
            if isinstance(item, Reply):
                delta = {**_end(item), "container": None}
                usage = _usage(item.completion)
                yield _event({"type": "message_delta", "delta": delta, "usage": usage})
    yield _event({"type": "message_stop"})


class _Blocks:
    """Which content block is open, and the events that fill and change it."""

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._index = -1
        self._open: str | None = None
        self._thought = ""

    def take(self, item: Item) -> Iterator[dict[str, Any]]:
        if isinstance(item, Piece) and item.part == "reasoning":
            yield from self._enter("thinking", {"thinking": "", "signature": ""})
            self._thought += item.text
            if self._thinking.shown:
                yield self._delta("thinking_delta", thinking=item.text)
        elif isinstance(item, Piece):
            yield from self._enter("text", {"text": "", "citations": None})
            yield self._delta("text_delta", text=item.text)
        elif isinstance(item, CallPart):
            yield from self._call(item)
        elif isinstance(item, Reply):
            if self._index < 0 or (not item.completion.text and not item.completion.tool_calls):
                yield from self._enter("text", {"text": "", "citations": None})
            yield from self._close()

    def _call(self, part: CallPart) -> Iterator[dict[str, Any]]:
        if part.begins:
            yield from self._close()
            block = {"id": _tool_id(part), "name": part.name, "input": {}}
            yield from self._enter("tool_use", block)
        if part.arguments:
            yield self._delta("input_json_delta", partial_json=part.arguments)
        if part.is_whole:
            yield from self._close()

    def _enter(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._open == kind:
            return
        yield from self._close()
        self._open = kind
        self._index += 1
        content = {"type": kind, **block}
        yield {"type": "content_block_start", "index": self._index, "content_block": content}

    def _close(self) -> Iterable[dict[str, Any]]:
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta("signature_delta", signature=_signature(self._thought))
        self._open = None
        yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, kind: str, **content: str) -> dict[str, Any]:
        delta = {"type": kind, **content}
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _event(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])


def _head(served: ServedModel) -> dict[str, Any]:
    message_id = f"msg_{secrets.token_hex(12)}"
    return {"id": message_id, "type": "message", "role": "assistant", "model": served.name}


def _end(reply: Reply) -> dict[str, Any]:
    if reply.finish == "length":
        reason = "max_tokens"
    elif reply.completion.tool_calls:
        reason = "tool_use"
    else:
        reason = "end_turn" if reply.stop_string is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": reply.stop_string}


def _usage(completion: Completion) -> dict[str, Any]:
    """Anthropic counts cached tokens beside the input, not within it."""
    return {
        "input_tokens": completion.num_prompt_tokens - completion.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": completion.cached_tokens,
        "output_tokens": len(completion.token_ids),
        "output_tokens_details": {"thinking_tokens": completion.num_reasoning_tokens},
    }


def _tool_id(call: CallPart) -> str:
    return call.id.replace("call_", "toolu_", 1)


def _input(call: CallPart) -> dict[str, Any]:
    """Of a call that is not whole, what can be read: so does Anthropic's client with a stream."""
    return from_json(call.arguments, allow_partial=not call.is_whole)


def _signature(thought: str) -> str:
    """Clients keep one with each thought; this one only says which thought it belongs to."""
    return hashlib.sha256(thought.encode("utf-8", "replace")).hexdigest()
