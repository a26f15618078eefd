"""/v1/responses: replies in the words of OpenAI's Responses API, whole and as events."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from openm1.chat.tool_stream import CallPart
from openm1.server.replies import Item, Piece, Reply
from openm1.server.responses import ResponsesRequest
from openm1.server.served import ServedModel
from openm1.server.stream import event
from openm1.server.thinking import Thinking
from openm1.types import Completion

Event = dict[str, Any]


def response_object(
    reply: Reply, served: ServedModel, request: ResponsesRequest, thinking: Thinking
) -> dict[str, Any]:
    """The whole answer to a request that does not stream."""
    items = _Items(thinking)
    completion = reply.completion
    pieces: list[Item] = []
    if completion.reasoning:
        pieces.append(Piece("reasoning", completion.reasoning))
    if completion.text:
        pieces.append(Piece("answer", completion.text))
    for item in [*pieces, *reply.calls, reply]:
        list(items.take(item))
    return _finished(_started(served, request), items, reply)


async def response_events(
    items: AsyncGenerator[tuple[int, Item], None],
    served: ServedModel,
    request: ResponsesRequest,
    thinking: Thinking,
) -> AsyncGenerator[bytes, None]:
    """The same as events, numbered from 0."""
    response, output = _started(served, request), _Items(thinking)
    number = 0

    def numbered(data: Event) -> bytes:
        nonlocal number
        number += 1
        return event({**data, "sequence_number": number - 1}, data["type"])

    async with aclosing(items):
        yield numbered({"type": "response.created", "response": response})
        yield numbered({"type": "response.in_progress", "response": response})
        async for _, item in items:
            for each in output.take(item):
                yield numbered(each)
            if isinstance(item, Reply):
                done = _finished(response, output, item)
                yield numbered({"type": f"response.{done['status']}", "response": done})


class _Items:
    """The output items of one response, and the events by which they grow."""

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self.done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._call_is_whole = False

    def take(self, item: Item) -> Iterator[Event]:
        if isinstance(item, Piece) and item.part == "reasoning":
            if self._thinking.shown:
                yield from self._text(item.text, "reasoning")
        elif isinstance(item, Piece):
            yield from self._text(item.text, "message")
        elif isinstance(item, CallPart):
            yield from self._call(item)
        elif isinstance(item, Reply):
            if not item.completion.text and not item.completion.tool_calls:
                yield from self._text("", "message")
            yield from self._close("incomplete" if item.finish == "length" else "completed")

    def _text(self, text: str, kind: str) -> Iterator[Event]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close("completed")
            yield from self._enter(kind)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        event_name = "reasoning_text" if kind == "reasoning" else "output_text"
        more = {} if kind == "reasoning" else {"logprobs": []}
        delta = {"type": f"response.{event_name}.delta", "delta": text, **more}
        yield {**delta, **self._place(), "content_index": 0}

    def _enter(self, kind: str) -> Iterator[Event]:
        part: dict[str, Any]
        if kind == "reasoning":
            item_id, more = f"rs_{secrets.token_hex(12)}", {"summary": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            item_id, more = f"msg_{secrets.token_hex(12)}", {"role": "assistant"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._open = {"id": item_id, "type": kind, "status": "in_progress", "content": [], **more}
        yield self._added()
        self._open["content"] = [part]
        added = {"type": "response.content_part.added", "part": dict(part), "content_index": 0}
        yield {**added, **self._place()}

    def _call(self, part: CallPart) -> Iterator[Event]:
        if part.begins:
            yield from self._close("completed")
            self._open = {
                "id": f"fc_{secrets.token_hex(12)}",
                "type": "function_call",
                "status": "in_progress",
                "call_id": part.id,
                "name": part.name,
                "arguments": "",
            }
            yield self._added()
        assert self._open is not None
        if part.arguments:
            delta = {"type": "response.function_call_arguments.delta", "delta": part.arguments}
            yield {**delta, **self._place()}
            self._open["arguments"] += part.arguments
        self._call_is_whole = part.is_whole
        if part.is_whole:
            yield from self._close("completed")

    def _close(self, status: str) -> Iterator[Event]:
        item = self._open
        if item is None:
            return
        if item["type"] == "function_call":
            status = "completed" if self._call_is_whole else "incomplete"
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield {"type": "response.function_call_arguments.done", **done, **self._place()}
        else:
            yield from self._text_done(item)
        item["status"] = status
        index = len(self.done)
        self.done.append(item)
        self._open = None
        yield {"type": "response.output_item.done", "output_index": index, "item": item}

    def _text_done(self, item: dict[str, Any]) -> Iterator[Event]:
        part = item["content"][0]
        kind = "reasoning_text" if item["type"] == "reasoning" else "output_text"
        more = {} if kind == "reasoning_text" else {"logprobs": []}
        text = {"type": f"response.{kind}.done", "text": part["text"], **more}
        yield {**text, **self._place(), "content_index": 0}
        done = {"type": "response.content_part.done", "part": part, "content_index": 0}
        yield {**done, **self._place()}

    def _added(self) -> Event:
        assert self._open is not None
        item = {**self._open}
        return {"type": "response.output_item.added", "output_index": len(self.done), "item": item}

    def _place(self) -> Event:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.done)}


def _started(served: ServedModel, request: ResponsesRequest) -> dict[str, Any]:
    sent = request.model_dump(exclude_none=True, by_alias=True)
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": served.name,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": sent.get("reasoning"),
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": sent.get("text", {"format": {"type": "text"}}),
        "tool_choice": sent.get("tool_choice", "auto"),
        "tools": [{"strict": None, **tool} for tool in sent.get("tools", [])],
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _finished(response: dict[str, Any], items: _Items, reply: Reply) -> dict[str, Any]:
    cut = reply.finish == "length"
    return {
        **response,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": items.done,
        "usage": _usage(reply.completion),
    }


def _usage(completion: Completion) -> dict[str, Any]:
    written = len(completion.token_ids)
    return {
        "input_tokens": completion.num_prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": completion.cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": completion.num_reasoning_tokens},
        "total_tokens": completion.num_prompt_tokens + written,
    }
