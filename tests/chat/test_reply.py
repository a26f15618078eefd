"""Replies: what `encode_with_mask` teaches reads back, and replies that were cut off."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.chat.reply import parse_reply, reply_text
from openm1.chat.template import chat_format_for
from openm1.chat.tokenizer import build_tokenizer
from openm1.types import Message, ToolCall

SENTENCE = ("<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>")
NANO = build_tokenizer(["so"], special_tokens=[*SENTENCE, "<think>", "</think>"])
PLAIN = build_tokenizer(["so"], special_tokens=SENTENCE)

shards = [*SENTENCE, "so", "\n", " ", "</tool_calls", '{"']
texts = st.lists(st.sampled_from(shards) | st.text(max_size=3), max_size=5).map("".join)


@pytest.mark.parametrize("tokenizer", [NANO, PLAIN], ids=["nano", "m1"])
@given(texts, texts, st.none() | st.just("so"))
def test_a_taught_reply_reads_back(tokenizer, content, argument, reasoning):
    call = ToolCall(name="f", arguments=json.dumps({"t": argument}), id="call_0")
    reply = Message(role="assistant", reasoning=reasoning, content=content, tool_calls=(call,))
    ids, mask = chat_format_for(tokenizer).encode_with_mask([reply])
    learned = [i for i, learn in zip(ids, mask, strict=True) if learn]
    found = parse_reply(tokenizer, learned)
    assert (found.role, found.reasoning) == ("assistant", reasoning)
    assert found.content.strip() == content.strip()
    (found_call,) = found.tool_calls
    assert (found_call.name, found_call.id) == ("f", "call_0")
    assert json.loads(found_call.arguments) == {"t": argument}


@pytest.mark.parametrize("tokenizer", [NANO, PLAIN], ids=["nano", "m1"])
def test_only_a_last_end_of_sentence_goes(tokenizer):
    for text, expected in {
        "<think>so</think>4<end_of_sentence>": "<think>so</think>4",
        "<think>so</think>4": "<think>so</think>4",
        "4<end_of_sentence><end_of_sentence>": "4<end_of_sentence>",
        "": "",
    }.items():
        assert reply_text(tokenizer, tokenizer.encode(text, allow_special=True)) == expected


@pytest.mark.parametrize("tokenizer", [NANO, PLAIN], ids=["nano", "m1"])
@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("4<end_of_sentence>", False, None, "4"),
        ("<think>so", False, "so", ""),
        ("so</think>4<end_of_sentence>", True, "so", "4"),
        ("so, cut off", True, "so, cut off", ""),
        ("so</think>4", False, None, "so</think>4"),
        ("", False, None, ""),
        # A thought may speak of calls without making one.
        ('<think><tool_calls>\n{"name": "f"}\n</tool_calls></think>4', False, ..., "4"),
    ],
)
def test_thought_and_answer_of_whole_and_cut_replies(tokenizer, text, opened, reasoning, content):
    ids = tokenizer.encode(text, allow_special=True)
    found = parse_reply(tokenizer, ids, thought_opened=opened)
    assert (found.content, found.tool_calls) == (content, ())
    assert reasoning is ... or found.reasoning == reasoning
