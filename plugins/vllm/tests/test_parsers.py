"""Thoughts and calls as vLLM's own pipeline sees them, whole and in pieces of every size."""

from __future__ import annotations

import pytest
from openm1_vllm.parsers import M1ReasoningParser, M1ToolParser
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.abstract_parser import DelegatingParser

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLS = """<tool_calls>
{"name": "add", "arguments": {"a": 1}}
{"name": "add", "arguments": {}}
</tool_calls>"""
REPLIES = {
    "thought and answer": ("<think>\nhm\n</think>\n\n42", "hm", "42", []),
    "thought and calls": (f"<think>x</think>Sure.\n{CALLS}", "x", "Sure.", ['{"a": 1}', "{}"]),
    "no thought": ("just < 3", None, "just < 3", []),
    "no thought, calls": (CALLS, None, None, ['{"a": 1}', "{}"]),
    "unclosed thought": ("<think>on and on </thi", "on and on </thi", None, []),
    "unclosed block": (
        '<think>x</think><tool_calls>\n{"name": "add", "arguments": {}}', "x", None, ["{}"]
    ),
    "a tag that stays text": ("<think>x</think>a <tool_ca", "x", "a <tool_ca", []),
}  # fmt: skip


class Parser(DelegatingParser):
    reasoning_parser_cls = M1ReasoningParser
    tool_parser_cls = M1ToolParser


class Letters:
    """A tokenizer of one token a character."""

    def get_vocab(self):
        return {}

    def decode(self, ids):
        return "".join(map(chr, ids))


def request() -> ChatCompletionRequest:
    return ChatCompletionRequest(messages=[], tools=[TOOL], tool_choice="auto")


@pytest.mark.parametrize("name", REPLIES)
def test_whole(name):
    text, *expected = REPLIES[name]
    reasoning, content, calls = Parser(Letters(), request().tools).parse(
        text, request(), enable_auto_tools=True
    )
    assert [reasoning, content, [call.arguments for call in calls or []]] == expected


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("name", REPLIES)
def test_in_pieces(name, size):
    text, *expected = REPLIES[name]
    parser, asked = Parser(Letters(), request().tools), request()
    reasoning, content, calls = "", "", []
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for i, piece in enumerate(pieces):
        ids = [ord(c) for c in piece]
        last = i == len(pieces) - 1
        delta = parser.parse_delta(piece, ids, asked, prompt_token_ids=[65], finished=last)
        if delta:
            reasoning += delta.reasoning or ""
            content += delta.content or ""
            calls += [(call.index, call.function) for call in delta.tool_calls]
    assert [index for index, _ in calls] == list(range(len(calls)))
    arguments = [function.arguments for _, function in calls]
    assert [reasoning or None, content or None, arguments] == expected


def test_a_thought_of_an_earlier_turn_is_not_this_one():
    class Sentences(Letters):
        def get_vocab(self):
            return {"<beginning_of_sentence>": 1}

    def ids(text):
        return [1 if c == "|" else ord(c) for c in text]

    parser = M1ReasoningParser(Sentences())
    assert parser.is_reasoning_end(ids("|ai\n<think>a</think>"))
    assert not parser.is_reasoning_end(ids("|ai\n<think>a</think>b|user\nc|ai\n"))
    thought = ids("<think>a</think>bc")
    assert parser.extract_content_ids(thought) == ids("bc")
    assert parser.count_reasoning_tokens(thought) == len(thought) - 2
    assert parser.is_reasoning_end_streaming(thought[:-2], thought[-3:-2])
    assert not parser.is_reasoning_end_streaming(thought[:-3], thought[-4:-3])


def test_a_prompt_may_open_the_thought():
    parser = M1ReasoningParser(Letters())
    parser.adjust_initial_state_from_prompt([ord(c) for c in "ai\n<think>\n"])
    assert parser.extract_reasoning("deep</think>yes", None) == ("deep", "yes")
