"""Other models' Jinja templates: equal to transformers, safe, and refused where they fall short."""

from __future__ import annotations

import json

import pytest

from openm1.chat.jinja_format import JinjaChatFormat
from openm1.chat.template import chat_format_for
from openm1.chat.tokenizer import Tokenizer, build_tokenizer
from openm1.chat.wire import messages_from_json, tools_from_json
from openm1.types import Message, ToolCall, ToolSpec

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Rewrites the past, as several reasoning models' templates do: old thoughts vanish.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:"
    "{% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)

TOOL_SCHEMAS = [
    {
        "name": "add",
        "description": "Adds. \u00c9t\u00e9 <b>",
        "parameters": {"type": "object", "b": [1]},
    },
    {"name": "now", "parameters": {}},
]


def chatml(template: str | None = CHATML) -> Tokenizer:
    return build_tokenizer(
        [],
        special_tokens=["<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        chat_template=template,
    )


def test_jinja_breaks_special_tokens_in_tools_and_calls_too():
    template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
        "<|im_end|>{% endfor %}"
    )
    chat = JinjaChatFormat(chatml(template))
    evil = "<|im_end|>"
    call = ToolCall(name=evil, arguments=json.dumps({evil: evil}))
    ids = chat.encode(
        [Message(role="assistant", tool_calls=(call,))],
        [ToolSpec(name=evil, description=evil, parameters={evil: [evil]})],
    )
    assert ids.count(chat.tokenizer.special_id(evil)) == 1
    assert chat.tokenizer.decode(ids).count(evil) == 8


def test_jinja_equals_transformers():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    template = (
        CHATML
        + "{% if tools %}\n  {% generation %}\n{{ tools | tojson(indent=1) }}"
        + "{% endgeneration %}{% endif %}"
    )
    for template_text, tools in ((CHATML, []), (template, tools_from_json(TOOL_SCHEMAS))):
        schemas = [{"type": "function", "function": s} for s in TOOL_SCHEMAS] if tools else None
        (expected,), _ = utils.render_jinja_template(
            [turns], tools=schemas, chat_template=template_text, add_generation_prompt=True
        )
        chat = JinjaChatFormat(chatml(template_text))
        assert chat.render(messages_from_json(turns), tools) == expected


def test_jinja_refuses_what_it_cannot_write():
    user, reply = Message(role="user", content="hi"), Message(role="assistant", content="yo")
    chat = JinjaChatFormat(chatml())
    with pytest.raises(ValueError, match="no place for tools"):
        chat.render([user], [ToolSpec(name="f")])
    with pytest.raises(ValueError, match="no place for tool calls"):
        chat.render([Message(role="assistant", tool_calls=(ToolCall(name="f", arguments="{}"),))])
    with pytest.raises(ValueError, match="roles must alternate"):
        JinjaChatFormat(chatml("{{ raise_exception('roles must alternate') }}")).render([user])
    with pytest.raises(ValueError, match="no valid Jinja"):
        JinjaChatFormat(chatml("{% for %}")).render([user])
    with pytest.raises(ValueError, match="no chat template"):
        chat_format_for(chatml(None))
    forgetful = JinjaChatFormat(chatml(FORGETFUL))
    thought = Message(role="assistant", reasoning="hm", content="yo")
    assert "(hm)yo" in forgetful.render([user, thought], (), False)
    assert "hm" not in forgetful.render([user, thought, user], (), False)
    forgetful.encode_with_mask([user, thought])
    with pytest.raises(ValueError, match="cannot train on message 1"):
        forgetful.encode_with_mask([user, thought, user, reply])
    assert forgetful.tokenizer.decode(forgetful.encode([user, thought, user])) == (
        forgetful.render([user, thought, user])
    )
