"""Laws of tool-call parsing: the stream equals the whole, no text is lost, nothing raises."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.chat.thinking import split_thought
from openm1.chat.tools import (
    TOOL_CALLS_CLOSE,
    TOOL_CALLS_OPEN,
    ToolCallParser,
    format_tool_calls,
    parse_tool_calls,
)
from openm1.types import ToolCall

LINE = '{"name": "add", "arguments": {"a": 1}}'
SHARDS = [
    TOOL_CALLS_OPEN,
    TOOL_CALLS_CLOSE,
    LINE,
    '{"name": "say", "arguments": {"t": "</tool_calls>"}}',
    '{"name": ',
    '"',
    "\\",
    "<tool",
    "</tool_calls",
    "\n",
    " ",
    "x",
    "[1]",
]
texts = st.lists(st.sampled_from(SHARDS), max_size=12).map("".join)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
calls = st.builds(
    ToolCall,
    name=st.text(min_size=1),
    arguments=st.dictionaries(st.text(), json_values, max_size=3).map(json.dumps),
)


def collect(items: list[str | ToolCall]) -> tuple[str, tuple[ToolCall, ...]]:
    content = "".join(item for item in items if isinstance(item, str))
    return content, tuple(item for item in items if isinstance(item, ToolCall))


def blanks_removed(text: str) -> str:
    return "".join(text.split())


def call(index: int) -> ToolCall:
    return ToolCall(name="add", arguments='{"a": 1}', id=f"call_{index}")


@pytest.mark.parametrize(
    ("text", "content", "count"),
    [
        ("no calls", "no calls", 0),
        (f"<tool_calls>\n{LINE}\n</tool_calls>", "", 1),
        (f"<tool_calls>\n{LINE}\n{LINE}\n</tool_calls>\n", "", 2),
        (f"<tool_calls>{LINE}{LINE}</tool_calls>", "", 2),
        (f"One moment.\n\n<tool_calls>\n{LINE}\n</tool_calls>", "One moment.", 1),
        (f"a <tool_calls>\n{LINE}\n</tool_calls> b", "a\nb", 1),
        (f"<tool_calls>\n{LINE}\n</tool_calls>\n<tool_calls>\n{LINE}", "", 2),
        (f"<tool_calls>\n{LINE}\noops\n</tool_calls>", "oops", 1),
        (f"<tool_calls>\noops\n{LINE}\n</tool_calls>", "oops", 1),
        ('<tool_calls>\n{"name": "add", "argu', '<tool_calls>\n{"name": "add", "argu', 0),
        ("write <tool_calls> and </tool_calls> around", None, 0),
        ('<tool_calls>\n{"name": 3}\n</tool_calls> ', None, 0),
        ('<tool_calls>\n{"name": "f", "arguments": [1]}\n</tool_calls>', None, 0),
        ('<tool_calls>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_calls>', None, 0),
        ("<tool_calls>" + "[" * 100_000, None, 0),
        # A closing tag inside a broken string closes all the same.
        (f'<tool_calls>\n{LINE}\n{{"name</tool_calls> b', '{"name\nb', 1),
    ],
)
def test_cases(text, content, count):
    expected = text if content is None else content
    assert parse_tool_calls(text) == (expected, tuple(call(i) for i in range(count)))


def test_arguments_leave_as_valid_json():
    line = '{"name": "f", "arguments": {"s": "\\u00e9\\n\\ud800", "n": 1.50}}'
    _, (found,) = parse_tool_calls(f"<tool_calls>\n{line}\n</tool_calls>")
    assert json.loads(found.arguments) == {"s": "\u00e9\n\ud800", "n": 1.5}
    found.arguments.encode()  # A lone surrogate must have stayed escaped.
    quoted = json.dumps({"name": "f", "arguments": '{"a": 1}'})
    _, (found,) = parse_tool_calls(f"<tool_calls>\n{quoted}\n</tool_calls>")
    assert found.arguments == '{"a": 1}'
    tag = json.dumps({"name": "f", "arguments": {"t": 'say "</tool_calls>\\'}})
    _, (found,) = parse_tool_calls(f"<tool_calls>\n{tag}\n</tool_calls>")
    assert json.loads(found.arguments) == {"t": 'say "</tool_calls>\\'}
    _, (found,) = parse_tool_calls('<tool_calls>\n{"name": "now"}\n</tool_calls>')
    assert found.arguments == "{}"


def test_calls_inside_a_thought_are_no_calls():
    block = f"<tool_calls>\n{LINE}\n</tool_calls>"
    reasoning, answer = split_thought(f"<think>\nI could {block}\n</think>\n\nNo.")
    assert parse_tool_calls(answer) == ("No.", ())
    assert block in (reasoning or "")


def streamed(chunks: list[str]) -> tuple[str, tuple[ToolCall, ...]]:
    parser = ToolCallParser()
    items = [item for chunk in chunks for item in parser.push(chunk)]
    return collect(items + parser.flush())


@given(st.data(), texts, st.booleans())
def test_stream_equals_whole(data, text, open_block):
    text = TOOL_CALLS_OPEN + text if open_block else text
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    edges = itertools.pairwise([0, *cuts, len(text)])
    assert streamed([text[start:end] for start, end in edges]) == parse_tool_calls(text)
    assert streamed(list(text)) == parse_tool_calls(text)


@given(texts)
def test_no_text_is_lost(text):
    content, found = parse_tool_calls(text)
    assert [item.id for item in found] == [f"call_{i}" for i in range(len(found))]
    if not found:
        assert content == text
    rest = blanks_removed(text)
    for line in (SHARDS[2], SHARDS[3]):
        rest = rest.replace(blanks_removed(line), "")
    for tag in (TOOL_CALLS_OPEN, TOOL_CALLS_CLOSE):
        rest = rest.replace(tag, "")
    for character in set(rest):
        assert content.count(character) >= rest.count(character)


@given(st.text(alphabet="ab \n.<", max_size=20), st.lists(calls, min_size=1, max_size=3))
def test_what_is_written_reads_back(content, written):
    gap = "\n" if content else ""
    found_content, found = parse_tool_calls(content + gap + format_tool_calls(tuple(written)))
    assert found_content == content.rstrip()
    assert [c.name for c in found] == [c.name for c in written]
    assert [json.loads(c.arguments) for c in found] == [json.loads(c.arguments) for c in written]


def test_a_call_leaves_when_its_line_ends():
    parser = ToolCallParser()
    assert parser.push("Hm. <tool_") == ["Hm."]
    assert parser.push(f"calls>\n{LINE}") == []
    assert parser.push("\n") == [call(0)]
    assert parser.push(LINE + "</tool_calls") == []
    assert parser.push(">") == [call(1)]
    assert parser.push(" Done") == ["\nDone"]
    assert parser.flush() == []


def test_arguments_must_be_an_object_to_be_written():
    with pytest.raises(ValueError, match="JSON object"):
        format_tool_calls((ToolCall(name="f", arguments="[1]"),))
