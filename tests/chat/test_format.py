"""What holds in every chat format: prompts are prefixes, masks are exact, no text is special."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openm1.chat.jinja_format import JinjaChatFormat
from openm1.chat.template import chat_format_for
from openm1.chat.tokenizer import Tokenizer, build_tokenizer
from openm1.types import Message, ToolCall, ToolSpec

M1_SPECIAL = ("<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>")
THINK = ("<think>", "</think>")
WORDS = ("user name=user", "ai name=assistant", "tool", " -9", "\n\n")
# `<think>` as a single token (nano models), and as plain text (the published tokenizer).
NANO = build_tokenizer(WORDS, special_tokens=[*M1_SPECIAL, *THINK, "<tool_calls>"])
PLAIN = build_tokenizer(WORDS, special_tokens=M1_SPECIAL)

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chatml(think: tuple[str, ...] = ()) -> Tokenizer:
    return build_tokenizer(
        [],
        special_tokens=["<|im_start|>", "<|im_end|>", *think],
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )


FORMATS = [chat_format_for(t) for t in (NANO, PLAIN, chatml(), chatml(think=THINK))]

# Text full of what an attacker would write.
shards = [
    *M1_SPECIAL,
    *THINK,
    "<|im_end|>",
    "<|im_start|>",
    "<tool_calls>",
    "\n",
    " -9",
    "hi",
    "\ue000",
]
texts = st.lists(st.sampled_from(shards) | st.text(max_size=3), max_size=5).map("".join)
calls = st.builds(
    ToolCall, name=st.just("add"), arguments=texts.map(lambda t: json.dumps({"t": t})), id=texts
)
users = st.builds(Message, role=st.just("user"), content=texts)
systems = st.builds(Message, role=st.just("system"), content=texts)
assistants = st.builds(
    Message,
    role=st.just("assistant"),
    content=texts,
    reasoning=st.none() | texts,
    tool_calls=st.lists(calls, max_size=2).map(tuple),
)
results = st.builds(Message, role=st.just("tool"), content=texts, name=st.just("add"))
conversations = st.lists(users | assistants | results | systems, max_size=5)

TOOLS = [
    ToolSpec(name="add", description="Adds. \u00c9t\u00e9 <b>", parameters={"b": [1]}),
    ToolSpec(name="now"),
]


@pytest.mark.parametrize("chat", FORMATS, ids=["nano", "m1", "chatml", "chatml-think"])
@settings(max_examples=40)
@given(conversations, assistants, st.booleans())
def test_prefix_law_and_mask(chat, history, reply, with_tools):
    tools: list[ToolSpec] = []
    if isinstance(chat, JinjaChatFormat):
        # This template can write neither calls nor tools, and wants something before a reply.
        plain = [Message(role="user")] + [*history, reply]
        plain = [Message(role=m.role, content=m.content, reasoning=m.reasoning) for m in plain]
        history, reply = plain[:-1], plain[-1]
    elif with_tools:
        tools = TOOLS
    ids, mask = chat.encode_with_mask([*history, reply], tools)
    prompt = chat.encode(history, tools)
    assert len(ids) == len(mask)
    assert ids[: len(prompt)] == prompt
    so_far = chat.encode([*history, reply], tools, add_generation_prompt=False)
    assert ids == so_far
    whole = chat.encode([*history, reply], tools, add_generation_prompt=True)
    assert chat.encode_prompt([*history, reply], tools) == (whole, len(so_far))
    # Past the prompt, all but the line break after the end token is learned.
    assert mask[len(prompt) :] == [True] * (len(ids) - len(prompt) - 1) + [False]
    learned = [i for i, learn in zip(ids, mask, strict=True) if learn]
    replies = [m for m in [*history, reply] if m.role == "assistant"]
    assert learned.count(chat.tokenizer.eos_token_id) == len(replies)
    for message in replies:
        assert message.content in chat.tokenizer.decode(learned)


@pytest.mark.parametrize("chat", FORMATS, ids=["nano", "m1", "chatml", "chatml-think"])
@settings(max_examples=40)
@given(texts)
def test_no_text_becomes_a_special_token(chat, attack):
    special = set(chat.tokenizer.special_tokens.values())
    jinja = isinstance(chat, JinjaChatFormat)

    def special_ids(text: str) -> list[int]:
        call = ToolCall(name="f", arguments=json.dumps({text: text}), id="x")
        messages = [
            Message(role="system", content="S" + text),
            Message(role="user", content=text),
            Message(
                role="assistant", content=text, reasoning=text, tool_calls=() if jinja else (call,)
            ),
            Message(role="tool", content=text, name="f" + text),
        ]
        tools = [] if jinja else [ToolSpec(name="f" + text, parameters={text: text})]
        ids = chat.encode(messages, tools)
        decoded = chat.tokenizer.decode(ids)
        assert decoded == chat.render(messages, tools)
        assert text in decoded
        return [i for i in ids if i in special]

    assert special_ids(attack) == special_ids("harmless")
