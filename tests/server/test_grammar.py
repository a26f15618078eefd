"""Grammars over nano's vocabulary, and behind its thought."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from openm1.chat.tools import parse_tool_calls
from openm1.engine.llm import LLM
from openm1.server.errors import ApiError
from openm1.server.grammar import (
    AnswerGrammar,
    form_or_calls_source,
    json_object_source,
    json_schema_source,
    landing_tokens,
    regex_source,
    text_or_calls_source,
    tool_calls_source,
)
from openm1.types import SamplingParams, ToolSpec

from .running import ADD, Running

# A number that no double holds is valid JSON but no argument to the parser, so none may come here.
ODD = {"properties": {"x": {"const": "</tool_calls>"}}, "additionalProperties": False}
TOOLS = [ToolSpec(name="add", parameters=ADD), ToolSpec(name='odd "name"\n', parameters=ODD)]


def walk(grammar: AnswerGrammar, llm: LLM, text: str) -> bool:
    """Whether the grammar lets this text through, token by token, to its end."""
    tokenizer = llm.tokenizer
    matcher = grammar.start()
    for token in tokenizer.encode(text):
        if not matcher.allowed(1000)[token]:
            # What is not allowed is not taken either, and changes nothing.
            assert not matcher.consume(token)
            return False
        assert matcher.consume(token)
    return bool(matcher.allowed(1000)[tokenizer.eos_token_id])


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        (regex_source("[ab]{2}"), "ab", "abc"),
        (json_schema_source(ADD, "x"), '{"a": 7}', '{"a":7}'),
        (json_schema_source({"enum": ["ü", 3]}, "x"), '"ü"', '"u"'),
        (
            tool_calls_source(TOOLS, parallel=False),
            '<tool_calls>\n{"name": "add", "arguments": {"a": 7}}\n</tool_calls>',
            '<tool_calls>\n{"name": "sub", "arguments": {"a": 7}}\n</tool_calls>',
        ),
    ],
)
def test_what_a_grammar_lets_through(llm: LLM, source: str, good: str, bad: str) -> None:
    grammar = AnswerGrammar(llm.tokenizer, source, "x")
    assert walk(grammar, llm, good)
    assert not walk(grammar, llm, bad)
    assert grammar.error is None


def test_parallel_calls_only_where_wanted(llm: LLM) -> None:
    lines = '{"name": "add", "arguments": {"a": 7}}\n{"name": "add", "arguments": {"a": 8}}'
    block = f"<tool_calls>\n{lines}\n</tool_calls>"
    for parallel in (True, False):
        source = tool_calls_source(TOOLS, parallel=parallel)
        assert walk(AnswerGrammar(llm.tokenizer, source, "x"), llm, block) == parallel


CALL, OTHER = '{"name": "add", "arguments": {"a": 7}}', '{"name": "add", "arguments": {"b": []}}'


def block(*lines: str) -> str:
    return "\n".join(["<tool_calls>", *lines, "</tool_calls>"])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_text_or_calls(llm: LLM, strict: bool, parallel: bool) -> None:
    source = text_or_calls_source(TOOLS, {"add"} if strict else (), parallel=parallel)
    grammar = AnswerGrammar(llm.tokenizer, source, "x")
    for text in ("", "8", "a <tool and\nmore", "</tool_calls> {"):
        assert walk(grammar, llm, text)
        assert walk(grammar, llm, text + block(CALL))
        assert walk(grammar, llm, text + block(OTHER)) == (not strict)
        assert walk(grammar, llm, text + block(CALL, CALL)) == parallel
        # A block ends the answer, and the tag is never text.
        assert not walk(grammar, llm, text + block(CALL) + " ")
        assert not walk(grammar, llm, text + "<tool_calls>")
        assert not walk(grammar, llm, text + block(CALL.replace("add", "sub")))
    odd = json.dumps({"name": 'odd "name"\n', "arguments": {"y": 1}})
    assert walk(grammar, llm, block(odd)), "the other tool is not strict"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("form", "good"),
    [
        (json_schema_source({"enum": ["ü", 3]}, "x"), '"ü"'),
        (json_object_source(), '{"x": 1}'),
        (regex_source("[/\n]{2}"), "/\n"),
    ],
)
def test_a_form_or_calls(llm: LLM, form: str, good: str, strict: bool) -> None:
    source = form_or_calls_source(form, TOOLS, {"add"} if strict else (), parallel=True)
    grammar = AnswerGrammar(llm.tokenizer, source, "x")
    assert walk(grammar, llm, good) and walk(grammar, llm, block(CALL, CALL))
    assert walk(grammar, llm, block(OTHER)) == (not strict)
    assert not walk(grammar, llm, good + block(CALL)) and not walk(grammar, llm, "x")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("form", [regex_source("so: [xy]"), None])
def test_thinking_off_begins_as_it_does_without_a_grammar(llm, temperature, form) -> None:
    """With the empty thought that nano is then made to write."""
    source = form or text_or_calls_source(TOOLS, {"add"}, parallel=True)
    ids = llm.chat_format.encode([_user("4 -9 +8 *9 +1")])
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=1, n=4, thinking=False)
    begins = llm.tokenizer.encode("<think></think>", allow_special=True)
    for grammar in (None, AnswerGrammar(llm.tokenizer, source, "x")):
        for completion in llm.generate(ids, replace(params, grammar=grammar))[0]:
            assert list(completion.token_ids[:2]) == begins
            assert completion.reasoning == "" and completion.text
            assert completion.num_reasoning_tokens == 0
            assert completion.thought_end == "off"


def test_a_grammar_of_free_text_changes_nothing_where_no_call_is_made(llm: LLM) -> None:
    source = text_or_calls_source(TOOLS, {"add"}, parallel=True)
    ids = llm.chat_format.encode([_user("4 -9 +8 *9 +1")])
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=1, n=8)
    free = llm.generate(ids, params)[0]
    held = llm.generate(ids, replace(params, grammar=AnswerGrammar(llm.tokenizer, source, "x")))[0]
    assert [c.text for c in held] == [c.text for c in free]


def test_calls_of_a_grammar_are_calls_to_the_parser(llm: LLM) -> None:
    """Whatever may be written: names and arguments in need of escapes included."""
    grammar = AnswerGrammar(llm.tokenizer, tool_calls_source(TOOLS, parallel=True), "x")
    rng, eos = np.random.default_rng(0), llm.tokenizer.eos_token_id
    seen = set()
    for _ in range(20):
        matcher, ids = grammar.start(), []
        while True:
            token = int(rng.choice(np.flatnonzero(matcher.allowed(1000))))
            if token == eos:
                break
            assert matcher.consume(token)
            ids.append(token)
        content, calls = parse_tool_calls(llm.tokenizer.decode(ids))
        assert content == "" and calls
        for call in calls:
            seen.add(call.name)
            assert json.loads(call.arguments).keys() <= {"a", "x"} or call.name != "add"
    assert seen == {tool.name for tool in TOOLS}


@pytest.mark.parametrize("seed", range(5))
def test_calls_end_in_time(llm: LLM, seed: int) -> None:
    """Arguments without an end of their own: strings, numbers, lists, objects of any kind."""
    properties = {
        "s": {"type": "string"},
        "i": {"type": "integer"},
        "any": {},
        "l": {"type": "array"},
    }
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    tools = [ToolSpec(name="f", parameters=parameters)]
    source = tool_calls_source(tools, parallel=True)
    landing = landing_tokens(llm.tokenizer, tools)
    grammar = AnswerGrammar(llm.tokenizer, source, "x", landing_tokens=landing)
    ids = llm.chat_format.encode([_user("4 -9 +8 *9 +1")])
    params = SamplingParams(
        max_tokens=300, temperature=1.5, seed=seed, thinking_budget=20, grammar=grammar
    )
    ((completion,),) = llm.generate(ids, params)
    # Read by json itself: a number without bounds may be written too large for a float, which is
    # no call for the parser and not what this is about.
    opening, *calls, closing = completion.text.strip().split("\n")
    assert completion.finish_reason == "stop" and calls
    assert (opening, closing) == ("<tool_calls>", "</tool_calls>")
    assert all(json.loads(call)["arguments"].keys() >= properties.keys() for call in calls)


def test_special_tokens_are_no_text(llm: LLM) -> None:
    matcher = AnswerGrammar(llm.tokenizer, regex_source("(.|\n)*"), "x").start()
    allowed = matcher.allowed(1000)
    special = set(llm.tokenizer.special_tokens.values()) - {llm.tokenizer.eos_token_id}
    assert special and not allowed[list(special)].any()
    assert allowed[:256].sum() > 120 and allowed[llm.tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "source", [regex_source("("), json_schema_source({"type": "x"}, "x"), regex_source("[^\\s\\S]")]
)
def test_what_is_no_grammar_is_refused(llm: LLM, source: str) -> None:
    with pytest.raises(ApiError, match="x cannot be followed"):
        AnswerGrammar(llm.tokenizer, source, "x")


def test_a_grammar_that_gives_up_ends_its_answer_and_says_so(llm: LLM) -> None:
    grammar = AnswerGrammar(llm.tokenizer, regex_source("a*"), "x")
    matcher = grammar.start()
    matcher._matcher.consume_token(llm.tokenizer.encode("b")[0])  # As if it had become too complex.
    assert np.flatnonzero(matcher.allowed(1000)).tolist() == [llm.tokenizer.eos_token_id]
    assert grammar.error
    assert matcher.consume(llm.tokenizer.eos_token_id)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_thought_is_free_and_the_answer_is_not(llm: LLM, temperature: float) -> None:
    ids = llm.chat_format.encode([_user("4 -9 +8 *9 +1")])
    grammar = AnswerGrammar(llm.tokenizer, regex_source("so: [xy]"), "x")
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=1, n=4, grammar=grammar)
    for completion in llm.generate(ids, params)[0]:
        assert completion.reasoning is not None and "so: " not in completion.reasoning
        assert re.fullmatch("so: [xy]", completion.text)
        assert completion.finish_reason == "stop"


def test_formats_over_http(server: Running) -> None:
    def ask(**wanted) -> str:
        reply = server.chat(response_format=wanted, max_tokens=300)
        assert reply["choices"][0]["finish_reason"] in ("stop", "length")
        return reply["choices"][0]["message"]["content"]

    assert re.fullmatch("yes|no", ask(type="regex", pattern="yes|no"))
    assert ask(type="json_object").startswith("{")
    assert ask(type="text") == "8"
    reply = server.post(
        "/v1/completions",
        {"prompt": "x", "response_format": {"type": "regex", "pattern": "[0-9]{3}"}},
    )
    assert re.search("[0-9]{3}$", reply.json()["choices"][0]["text"])


def _user(content: str):
    from openm1.types import Message

    return Message(role="user", content=content)
