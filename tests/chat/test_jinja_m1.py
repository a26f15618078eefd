"""M1's format as a Jinja template: what other programs render is what this project renders."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openm1.chat.jinja_format import JinjaChatFormat
from openm1.chat.jinja_m1 import M1_CHAT_TEMPLATE, m1_chat_template
from openm1.chat.template import M1ChatFormat
from openm1.chat.tokenizer import Tokenizer, build_tokenizer
from openm1.chat.wire import messages_from_json, tools_from_json

SENTENCE = ("<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>")
THINK = ("<think>", "</think>")
KINDS = {
    "think-token": build_tokenizer(
        ["tool", "\n\n"], special_tokens=[*SENTENCE, *THINK], chat_template=M1_CHAT_TEMPLATE
    ),
    "think-text": build_tokenizer(
        ["tool", "\n\n"],
        special_tokens=SENTENCE,
        chat_template=m1_chat_template(think_is_token=False),
    ),
}

shards = [*SENTENCE, *THINK, "<tool_calls>", "\n", "tool", "{{ 1 }}", "{% if %}", "<b>'\"\\"]
texts = st.lists(st.sampled_from(shards) | st.text(max_size=3), max_size=4).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, width=16) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
).filter(lambda value: "Infinity" not in json.dumps(value))
objects = st.dictionaries(texts, json_values, max_size=2)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Dictionaries with some of these keys."""
    return st.fixed_dictionaries({}, optional=fields)


def merged(*strategies: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*strategies).map(
        lambda parts: {k: v for part in parts for k, v in part.items()}
    )


def function(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A flat object and the same under "function"."""
    flat = st.fixed_dictionaries(fields)
    return flat | flat.map(lambda value: {"type": "function", "function": value})


parts = st.lists(st.builds(lambda t: {"type": "text", "text": t}, texts), max_size=3)
contents = st.none() | texts | parts
call_ids = st.sampled_from(["c0", "c1", "<think>"])
arguments = objects | objects.map(lambda value: json.dumps(value, ensure_ascii=False))
calls = merged(
    function(name=texts.map(lambda t: "f" + t), arguments=arguments | st.just("") | st.none()),
    some(id=call_ids | st.none()),
)
asked = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "developer"])})
replies = merged(
    st.just({"role": "assistant"}),
    some(
        reasoning_content=st.none() | texts,
        reasoning=st.none() | texts,
        tool_calls=st.none() | st.lists(calls, max_size=2),
    ),
)
names = texts.map(lambda t: "f" + t)
named_parts = st.lists(
    st.builds(lambda n, t: {"name": n, "type": "text", "text": t}, names, texts), min_size=1
)
results = merged(
    st.just({"role": "tool"}),
    st.fixed_dictionaries({"name": names, "content": contents})
    | st.fixed_dictionaries({"tool_call_id": call_ids, "content": contents})
    | st.fixed_dictionaries({"content": named_parts}),
)
turns = merged(asked | replies, some(content=contents)) | results
# The first message lets any tool_call_id be answered; the call without an id answers none.
CALLER = {
    "role": "assistant",
    "tool_calls": [
        {"name": "g", "id": "c0"},
        {"name": "g", "id": "c1"},
        {"name": "h", "id": "<think>", "arguments": "{}"},
        {"name": "no id"},
    ],
}
# What chance rarely joins: an id used twice, calls after a line break, system messages anywhere.
RICH = [
    CALLER,
    {"role": "tool", "tool_call_id": "c0", "content": "1"},
    {"role": "system", "content": "between results"},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}]},
    {"role": "developer", "content": "Be brief."},
    {
        "role": "assistant",
        "content": "Again\n",
        "tool_calls": [{"id": "c0", "function": {"name": "other", "arguments": {"a": [None]}}}],
    },
    {"role": "tool", "tool_call_id": "c0", "content": None},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "reasoning": "", "content": "x", "tool_calls": CALLER["tool_calls"]},
]
conversations = st.lists(turns, max_size=5).map(lambda rest: [CALLER, *rest])
schemas = function(name=names, description=texts | st.none(), parameters=objects | st.none())


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory) -> tuple[Tokenizer, Any]:
    """A tokenizer of ours, and what transformers makes of its files."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    KINDS[request.param].save_pretrained(folder)
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=60)
@given(conversations, st.lists(schemas, max_size=2), st.booleans())
@example(RICH, [{"name": "f", "description": "d"}], True)
def test_transformers_renders_a_saved_tokenizer_as_m1(saved, messages, tools, prompt):
    ours, theirs = saved
    parsed = messages_from_json(messages), tools_from_json(tools)
    found = theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt, tokenize=False
    )
    assert found == M1ChatFormat(ours).render(*parsed, add_generation_prompt=prompt)


@pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)
@settings(max_examples=40)
@given(conversations, st.lists(schemas, max_size=2))
@example(RICH, [])
def test_rendered_as_any_template_it_gives_m1_tokens_and_mask(tokenizer, messages, tools):
    # A system message further on would go to the front, which rewrites the past.
    messages = [m for m in messages if m["role"] not in ("system", "developer")]
    parsed = messages_from_json(messages), tools_from_json(tools)
    expected = M1ChatFormat(tokenizer).encode_with_mask(*parsed)
    assert JinjaChatFormat(tokenizer).encode_with_mask(*parsed) == expected


def test_tokens_of_a_quiet_conversation_equal_transformers(saved):
    ours, theirs = saved
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "7-9?"},
        {"role": "assistant", "reasoning_content": "7-9", "content": "-2"},
        {"role": "user", "content": "tool"},
    ]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == M1ChatFormat(ours).encode(messages_from_json(messages))


def test_what_programs_without_transformers_may_give():
    call = {"name": "f", "arguments": '{\n"a": 1}'}
    reply = {"role": "assistant", "content": "4", "tool_calls": [call]}
    for thought in ({"reasoning": "so"}, {"reasoning_content": "so", "reasoning": "no"}):
        template = JinjaChatFormat(KINDS["think-token"])._template
        assert template.render(messages=[reply | thought]) == (
            "<begin_of_document><beginning_of_sentence>ai name=assistant\n<think>so</think>4\n"
            '<tool_calls>\n{"name": "f", "arguments": { "a": 1}}\n</tool_calls><end_of_sentence>\n'
        )


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "robot", "content": "hi"}, "role is not"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "not of type 'text'"),
        ({"role": "tool", "content": "3"}, "needs a name"),
        ({"role": "tool", "content": "3", "tool_call_id": "c9"}, "needs a name"),
        ({"role": "tool", "content": [{"type": "text", "text": "3"}]}, "needs a name"),
    ],
)
def test_what_it_cannot_write_is_refused(saved, message, error):
    with pytest.raises(Exception, match=error):
        saved[1].apply_chat_template([CALLER, message], tokenize=False)


def test_nano_tokenizers_carry_it():
    from openm1.recipes.vocabulary import nano_tokenizer

    assert nano_tokenizer().chat_template == M1_CHAT_TEMPLATE
