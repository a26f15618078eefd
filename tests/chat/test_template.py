"""M1's chat format: the published format's facts as texts written by hand, and their tokens."""

from __future__ import annotations

import pytest

from openm1.chat.jinja_m1 import m1_chat_template
from openm1.chat.template import ChatFormat, M1ChatFormat, chat_format_for
from openm1.chat.tokenizer import build_tokenizer
from openm1.chat.wire import messages_from_json, tools_from_json
from openm1.types import Message, ToolCall

M1_SPECIAL = ("<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>")
THINK = ("<think>", "</think>")
WORDS = ("user name=user", "ai name=assistant", "tool", " -9", "\n\n")
# `<think>` as a single token (nano models), and as plain text (the published tokenizer).
NANO = build_tokenizer(WORDS, special_tokens=[*M1_SPECIAL, *THINK, "<tool_calls>"])
PLAIN = build_tokenizer(WORDS, special_tokens=M1_SPECIAL)
FORMATS = [chat_format_for(NANO), chat_format_for(PLAIN)]

TOOL_SCHEMAS = [
    {
        "name": "add",
        "description": "\u00c9t\u00e9 <b>",
        "parameters": {"type": "object", "b": [1]},
    },
    {"name": "now", "parameters": {}},
]

# Facts of the published format. What a role may carry beyond these is this project's own.
START, PROMPT = "<begin_of_document>", "<beginning_of_sentence>ai name=assistant\n"
TOOLS_SENTENCE = """<beginning_of_sentence>system tool_setting=tools
You are provided with these tools:
<tools>
{"name": "add", "description": "\u00c9t\u00e9 <b>", "parameters": {"type": "object", "b": [1]}}
{"name": "now", "parameters": {}}
</tools>

If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, \
and provide tool-name and json-object of arguments, following the format below:
<tool_calls>
{name: <tool-name-1>, arguments: <args-json-object-1>}
...
</tool_calls><end_of_sentence>
"""
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "7 -9?"},
    {"role": "assistant", "content": "-2"},
    {"role": "user", "content": [{"type": "text", "text": "And\nthe time?"}]},
    {"role": "assistant", "content": "I look."},
    {
        "role": "tool",
        "content": [
            {"name": "now", "type": "text", "text": "12:00"},
            {"name": "add", "type": "text", "text": "-2"},
        ],
    },
]
CONVERSATION_TURNS = """<beginning_of_sentence>user name=user
7 -9?<end_of_sentence>
<beginning_of_sentence>ai name=assistant
-2<end_of_sentence>
<beginning_of_sentence>user name=user
And
the time?<end_of_sentence>
<beginning_of_sentence>ai name=assistant
I look.<end_of_sentence>
<beginning_of_sentence>tool name=tools
tool name: now
tool result: 12:00

tool name: add
tool result: -2

<end_of_sentence>
"""
SYSTEM_SENTENCE = "<beginning_of_sentence>system ai_setting=assistant\nBe brief.<end_of_sentence>\n"
USER_SENTENCE = "<beginning_of_sentence>user name=user\nHi<end_of_sentence>\n"


@pytest.mark.parametrize("chat", FORMATS, ids=["nano", "m1"])
@pytest.mark.parametrize(
    ("messages", "tools", "expected"),
    [
        ([{"role": "user", "content": "Hi"}], [], USER_SENTENCE),
        (CONVERSATION[:1], [], SYSTEM_SENTENCE),
        ([{"role": "user", "content": "Hi"}], TOOL_SCHEMAS, TOOLS_SENTENCE + USER_SENTENCE),
        (CONVERSATION, [], SYSTEM_SENTENCE + CONVERSATION_TURNS),
        (CONVERSATION, TOOL_SCHEMAS, SYSTEM_SENTENCE + TOOLS_SENTENCE + CONVERSATION_TURNS),
        # Wherever system messages stand, they are joined at the front.
        ([*CONVERSATION[1:], CONVERSATION[0]], [], SYSTEM_SENTENCE + CONVERSATION_TURNS),
    ],
)
def test_m1_writes_the_published_format(chat: ChatFormat, messages, tools, expected):
    parsed = messages_from_json(messages), tools_from_json(tools)
    assert chat.render(*parsed, add_generation_prompt=False) == START + expected
    assert chat.render(*parsed) == START + expected + PROMPT


@pytest.mark.parametrize("think", [(), THINK])
def test_sentence_tokens_choose_m1_whatever_the_template(think):
    for template in (None, "{{ messages }}", m1_chat_template(think_is_token=bool(think))):
        tokenizer = build_tokenizer(
            [], special_tokens=[*M1_SPECIAL, *think], chat_template=template
        )
        assert isinstance(chat_format_for(tokenizer), M1ChatFormat)


def test_m1_ids_equal_the_rendered_text_where_nobody_attacks():
    messages = [
        Message(role="system", content="Be brief."),
        Message(role="user", content="\n\n7 -9?"),
        Message(role="assistant", reasoning="7-9", content="-2"),
        Message(role="user", content="tool"),
    ]
    chat = M1ChatFormat(NANO)
    text = chat.render(messages, tools_from_json(TOOL_SCHEMAS))
    assert chat.encode(messages, tools_from_json(TOOL_SCHEMAS)) == NANO.encode(
        text, allow_special=True
    )
    assert NANO.decode(chat.encode(messages)) == chat.render(messages)


def test_m1_writes_thoughts_and_calls():
    reply = Message(
        role="assistant",
        reasoning="add",
        content="One moment.",
        tool_calls=(
            ToolCall(name="add", arguments='{"a":\n1}', id="x"),
            ToolCall(name="now", arguments="{}"),
        ),
    )
    block = (
        '<tool_calls>\n{"name": "add", "arguments": {"a": 1}}\n'
        '{"name": "now", "arguments": {}}\n</tool_calls>'
    )
    start, end = (
        "<begin_of_document><beginning_of_sentence>ai name=assistant\n",
        "<end_of_sentence>\n",
    )
    nano, plain = (chat.render([reply], (), False) for chat in FORMATS[:2])
    assert nano == f"{start}<think>add</think>One moment.\n{block}{end}"
    assert plain == f"{start}<think>\nadd\n</think>\n\nOne moment.\n{block}{end}"
    empty = Message(role="assistant", reasoning="", content="4")
    assert FORMATS[0].render([empty], (), False) == f"{start}<think></think>4{end}"
    assert FORMATS[1].render([empty], (), False) == f"{start}<think>\n\n</think>\n\n4{end}"


def test_m1_joins_results_and_finds_their_names():
    call = ToolCall(name="add", arguments="{}", id="call_0")
    messages = [
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content="3", tool_call_id="call_0"),
        Message(role="tool", content="12:00", name="now"),
    ]
    text = FORMATS[0].render(messages, (), False)
    assert text.endswith(
        "<beginning_of_sentence>tool name=tools\ntool name: add\ntool result: 3\n\n"
        "tool name: now\ntool result: 12:00\n\n<end_of_sentence>\n"
    )
    with pytest.raises(ValueError, match="tool_call_id is 'call_9', earlier calls are"):
        FORMATS[0].render([Message(role="tool", content="3", tool_call_id="call_9")])
