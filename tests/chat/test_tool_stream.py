"""Calls in parts: joined they are the calls, however the text arrives."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.chat.tool_stream import CallPart, ToolCallStream
from openm1.chat.tools import TOOL_CALLS_CLOSE, TOOL_CALLS_OPEN, format_tool_calls, parse_tool_calls

from .test_tools import LINE, SHARDS, calls

MORE_SHARDS = [*SHARDS, '{"name": "f", "arguments": ', '{"a": ', "}", "1e999", '"\\ud800"', "12"]


def streamed(chunks: list[str]) -> list[str | CallPart]:
    stream = ToolCallStream()
    return [item for chunk in chunks for item in stream.push(chunk)] + stream.flush()


def joined(items: list[str | CallPart]) -> tuple[str, list[tuple[str, str, bool]]]:
    """(the text, the name, arguments and wholeness of each call); checks the parts' order."""
    found: list[tuple[str, str, bool]] = []
    for item in items:
        if isinstance(item, str):
            continue
        if item.begins:
            assert item.index == len(found), "calls come one after the other"
            found.append((item.name, item.arguments, item.is_whole))
            continue
        name, arguments, was_whole = found[-1]
        assert not was_whole and item.index == len(found) - 1 and item.name == name
        found[-1] = name, arguments + item.arguments, item.is_whole
    return "".join(item for item in items if isinstance(item, str)), found


def in_chunks(data, text: str) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


@given(st.data(), st.text(alphabet="ab \n.<", max_size=20), st.lists(calls, min_size=1, max_size=3))
def test_whole_calls_are_what_the_line_parser_finds(data, content, written) -> None:
    text = content + "\n" + format_tool_calls(tuple(written))
    expected_content, expected = parse_tool_calls(text)
    found_content, found = joined(streamed(in_chunks(data, text)))
    assert found_content == expected_content
    assert [name for name, _, _ in found] == [call.name for call in expected]
    for (_, arguments, is_whole), call in zip(found, expected, strict=True):
        # What a lone surrogate or a number beyond doubles is in, is left at that.
        if is_whole:
            assert json.loads(arguments) == json.loads(call.arguments)
        else:
            assert "\\ud" in call.arguments or "e+" in call.arguments


@given(st.data(), st.lists(st.sampled_from(MORE_SHARDS), max_size=12).map("".join))
def test_how_the_text_arrives_changes_nothing(data, text: str) -> None:
    text = TOOL_CALLS_OPEN + text
    whole = joined(streamed([text]))
    assert joined(streamed(in_chunks(data, text))) == joined(streamed(list(text))) == whole
    for _, arguments, is_whole in whole[1]:
        assert not is_whole or isinstance(json.loads(arguments), dict)


def test_arguments_leave_as_they_are_written() -> None:
    line = '{"name": "f", "arguments": {"a": "xyz", "b": 12}}'
    items = streamed(list(f"{TOOL_CALLS_OPEN}\n{line}\n{LINE}\n{TOOL_CALLS_CLOSE}"))
    first = [item for item in items if isinstance(item, CallPart) and item.index == 0]
    assert first[0].begins and first[0].name == "f" and first[0].arguments == ""
    # All characters on their own but the number, which is sure with the brace behind it.
    assert [part.arguments for part in first[1:]] == [*'{"a": "xyz", "b": ', "12}"]
    assert [part.is_whole for part in first] == [False] * (len(first) - 1) + [True]
    assert joined(items)[1][1] == ("add", '{"a": 1}', True)


@pytest.mark.parametrize(
    ("written", "text", "arguments"),
    [
        # Cut off: what is there stays.
        ('{"name": "f", "arguments": {"a": "xy', "", '{"a": "xy'),
        ('{"name": "f", "arguments": {"a": 12', "", '{"a": '),
        ('{"name": "f", "arguments": {', "", "{"),
        # Broken: what follows is text.
        ('{"name": "f", "arguments": {"a": 1e999}}\n', "1e999}}", '{"a": '),
        ('{"name": "f", "arguments": {"a": NaN}}\n', "NaN}}", '{"a": '),
        ('{"name": "f", "arguments": {"a": "\n"}}', '"}}', '{"a": "'),
    ],
)
def test_calls_that_are_not_whole(written: str, text: str, arguments: str) -> None:
    for chunks in ([TOOL_CALLS_OPEN + "\n" + written], list(TOOL_CALLS_OPEN + "\n" + written)):
        assert joined(streamed(chunks)) == (text, [("f", arguments, False)])


@pytest.mark.parametrize(
    "line",
    [
        '{"arguments": {"a": 1}, "name": "f"}',
        json.dumps({"name": "f", "arguments": '{"a": 1}'}),
        '{"name": "f" , "arguments" :{"a": 1} }',
        '{"name": "\\u0066", "arguments": {"a": 1}}',
    ],
)
def test_other_forms_of_a_line(line: str) -> None:
    text = f"{TOOL_CALLS_OPEN}\n{line}\n{TOOL_CALLS_CLOSE}"
    assert joined(streamed(list(text))) == ("", [("f", '{"a": 1}', True)])


def test_a_line_without_a_name_is_text() -> None:
    for head in ('{"name": "", "arguments": {"a": 1}}', '{"name": "f", "arguments": [1]}'):
        assert joined(streamed([f"{TOOL_CALLS_OPEN}{head}"])) == (TOOL_CALLS_OPEN + head, [])
