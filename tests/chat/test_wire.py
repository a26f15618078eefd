"""Messages and tools out of JSON: every accepted shape, and what is wrong by its name."""

from __future__ import annotations

import pytest

from openm1.chat.wire import messages_from_json, tools_from_json
from openm1.types import Message, ToolCall, ToolSpec


def test_messages_from_json():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    found = messages_from_json(
        [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": parts},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": None,
                "reasoning": "r",
                "tool_calls": [call],
            },
            {
                "role": "assistant",
                "reasoning_content": "",
                "tool_calls": [{"name": "f", "arguments": ""}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "1"},
            {"role": "tool", "content": [{"name": "f", "type": "text", "text": "1"}] * 2},
        ]
    )
    result = Message(role="tool", content="1", name="f")
    assert found == [
        Message(role="system", content="s"),
        Message(role="user", content="ab"),
        Message(
            role="assistant",
            reasoning="r",
            tool_calls=(ToolCall(name="f", arguments='{"x": 1}', id="c"),),
        ),
        Message(role="assistant", reasoning="", tool_calls=(ToolCall(name="f", arguments="{}"),)),
        Message(role="tool", content="1", tool_call_id="c"),
        result,
        result,
    ]


def test_tools_from_json_reads_flat_and_nested():
    flat = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    spec = ToolSpec(name="f", description="d", parameters={"type": "object"})
    guide = {"name": "f", "description": "d", "type": "object", "parameters": {"type": "object"}}
    nested = {"type": "function", "function": flat}
    responses = {"type": "function", **flat}
    assert tools_from_json([flat, nested, guide, responses]) == [spec] * 4
    assert tools_from_json(None) == []


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "non-empty list"),
        ("hi", "non-empty list"),
        (["hi"], r"messages\[0\]: a message must be"),
        ([{"role": "user"}, {"role": "robot"}], r"messages\[1\]: message role is 'robot'; allowed"),
        ([{"content": "hi"}], "role is None"),
        ([{"role": "user", "content": 3}], "content must be"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url'; allowed is 'text'"),
        ([{"role": "user", "tool_calls": [{"name": "f"}]}], "belong to role 'assistant'"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "JSON object"),
        ([{"role": "assistant", "tool_calls": [{"arguments": "{}"}]}], "name must be"),
    ],
)
def test_wrong_messages_are_named(messages, error):
    with pytest.raises(ValueError, match=error):
        messages_from_json(messages)


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ({}, "list"),
        ([{"type": "retrieval"}], r"tools\[0\]: tool type is 'retrieval'"),
        ([{"type": "function", "function": {}}], "name must be"),
        ([{"name": ""}], "empty"),
        ([{"name": "f", "parameters": "x"}], "parameters must be"),
    ],
)
def test_wrong_tools_are_named(tools, error):
    with pytest.raises(ValueError, match=error):
        tools_from_json(tools)
