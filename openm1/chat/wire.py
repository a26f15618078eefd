"""Messages and tools out of the JSON that clients send and data files hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from openm1.chat.tools import normal_arguments
from openm1.types import Message, ToolCall, ToolSpec


def messages_from_json(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Reads OpenAI-style messages; ValueError names the message that is wrong and why.

    Content is a string, null, or a list of text parts. "developer" is read as "system". A tool
    message whose parts carry names (the model vendor's guide) becomes one message for each part.
    """
    if isinstance(items, str | Mapping) or not items:
        raise ValueError(f"messages must be a non-empty list of objects, got {items!r}")
    messages: list[Message] = []
    for index, item in enumerate(items):
        try:
            messages += _read_message(item)
        except ValueError as error:
            raise ValueError(f"messages[{index}]: {error}") from error
    return messages


def tools_from_json(items: Sequence[Mapping[str, Any]] | None) -> list[ToolSpec]:
    """Reads tool schemas, flat or as {"type": "function", "function": {...}}; None is no tools."""
    if isinstance(items, str | Mapping):
        raise ValueError(f"tools must be a list of objects, got {items!r}")
    tools: list[ToolSpec] = []
    for index, item in enumerate(items or ()):
        try:
            tools.append(_read_tool(item))
        except ValueError as error:
            raise ValueError(f"tools[{index}]: {error}") from error
    return tools


def _read_message(item: Any) -> list[Message]:
    _need(item, Mapping, "a message")
    role = "system" if item.get("role") == "developer" else item.get("role")
    content = item.get("content")
    parts = content if role == "tool" and isinstance(content, list | tuple) else ()
    if any(isinstance(part, Mapping) and "name" in part for part in parts):
        return [
            Message(role="tool", content=_text([part]), name=_need(part.get("name"), str, "name"))
            for part in parts
        ]
    given = item.get("reasoning_content")
    reasoning = item.get("reasoning") if given is None else given
    calls = item.get("tool_calls") or ()
    if calls and role != "assistant":
        raise ValueError(f"tool_calls belong to role 'assistant', got {role!r}")
    return [
        Message(
            role=role,
            content=_text(content),
            reasoning=None if reasoning is None else _need(reasoning, str, "reasoning_content"),
            tool_calls=tuple(_read_call(call) for call in _need(calls, list | tuple, "tool_calls")),
            name=_optional(item, "name"),
            tool_call_id=_optional(item, "tool_call_id"),
        )
    ]


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in _need(content, list | tuple, "content"):
        kind = _need(part, Mapping, "a content part").get("type")
        if kind != "text":
            raise ValueError(f"content part type is {kind!r}; allowed is 'text'")
        texts.append(_need(part.get("text"), str, "the text of a content part"))
    return "".join(texts)


def _read_call(call: Any) -> ToolCall:
    function = _need(call, Mapping, "a tool call").get("function", call)
    name = _need(_need(function, Mapping, "function").get("name"), str, "name")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(dict(arguments), ensure_ascii=False)
    arguments = _need(arguments or "{}", str, "arguments")
    return ToolCall(name=name, arguments=normal_arguments(arguments), id=call.get("id") or "")


def _read_tool(item: Any) -> ToolSpec:
    kind = _need(item, Mapping, "a tool").get("type", "function")
    # A flat schema may carry its parameters' own type, "object", as the vendor's guide does.
    if kind not in ("function", "object"):
        raise ValueError(f"tool type is {kind!r}; allowed is 'function'")
    function = _need(item.get("function", item), Mapping, "function")
    name = _need(function.get("name"), str, "name")
    if not name:
        raise ValueError("name must not be empty")
    return ToolSpec(
        name=name,
        description=_need(function.get("description") or "", str, "description"),
        parameters=_need(function.get("parameters") or {}, Mapping, "parameters"),
    )


def _optional(item: Mapping[str, Any], key: str) -> str | None:
    value = item.get(key)
    return None if value is None else _need(value, str, key)


def _need(value: Any, kind: Any, what: str) -> Any:
    if not isinstance(value, kind):
        names = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{what} must be of type {names}, got {value!r}")
    return value
