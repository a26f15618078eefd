"""Tool calls over HTTP as three APIs stream them, from a policy that writes what it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from openm1.engine.llm import LLM

from .running import ADD, QUESTION, Running, running
from .scripted import ScriptedPolicy

FUNCTIONS = [{"name": name, "parameters": {"type": "object"}} for name in ("look", "add")]
CHAT_TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
FLAT_TOOLS = [{"type": "function", **function} for function in FUNCTIONS]
CLAUDE_TOOLS = [{"name": f["name"], "input_schema": {"type": "object"}} for f in FUNCTIONS]
USER = [{"role": "user", "content": QUESTION}]
LOOK, SUM = '{"where": "über \\"there\\"", "far": 12.5}', '{"a": 7, "b": [1, {"c": null}]}'
REPLY = (
    "Let me see.\n<tool_calls>\n"
    f'{{"name": "look", "arguments": {LOOK}}}\n'
    f'{{"name": "add", "arguments": {SUM}}}\n'
    "</tool_calls>"
)
CALLS = [("look", json.loads(LOOK)), ("add", json.loads(SUM))]


@pytest.fixture(scope="module")
def policy(llm: LLM) -> ScriptedPolicy:
    return ScriptedPolicy(llm.tokenizer)


@pytest.fixture(scope="module")
def server(llm: LLM, policy: ScriptedPolicy) -> Iterator[Running]:
    with running(llm, policy=policy) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def chat(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.address + "/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def claude(server: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.address, api_key="any", max_retries=0)


def num_tokens(policy: ScriptedPolicy) -> int:
    return len(policy.tokenizer.encode(policy.reply)) + 1


def test_chat_streams_arguments_as_they_are_written(chat, policy: ScriptedPolicy) -> None:
    policy.reply = REPLY
    names: dict[int, str] = {}
    arguments: dict[int, list[str]] = {}
    order: list[int] = []
    chunks = chat.chat.completions.create(
        model="nano", messages=USER, tools=CHAT_TOOLS, stream=True
    )
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        for call in choice.delta.tool_calls or ():
            order.append(call.index)
            if call.id is not None:
                assert call.index not in names and call.function.arguments == ""
                names[call.index] = call.function.name
                arguments[call.index] = []
            else:
                assert call.function.name is None
                arguments[call.index].append(call.function.arguments)
        finish = choice.finish_reason
    assert finish == "tool_calls" and order == sorted(order)
    assert [(names[i], json.loads("".join(arguments[i]))) for i in (0, 1)] == CALLS
    assert all(len(parts) > 5 for parts in arguments.values())


def test_responses_stream_arguments_as_they_are_written(chat, policy: ScriptedPolicy) -> None:
    policy.reply = REPLY
    deltas: dict[int, list[str]] = {}
    done: dict[int, str] = {}
    with chat.responses.stream(model="nano", input=QUESTION, tools=FLAT_TOOLS) as events:
        for event in events:
            if event.type == "response.function_call_arguments.delta":
                assert event.output_index not in done
                deltas.setdefault(event.output_index, []).append(event.delta)
            elif event.type == "response.function_call_arguments.done":
                done[event.output_index] = event.arguments
        final = events.get_final_response()
    calls = [item for item in final.output if item.type == "function_call"]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == CALLS
    assert all(call.status == "completed" for call in calls) and final.status == "completed"
    assert {index: "".join(parts) for index, parts in deltas.items()} == done
    assert list(done.values()) == [call.arguments for call in calls]
    assert all(len(parts) > 5 for parts in deltas.values())


def test_messages_stream_arguments_as_they_are_written(claude, policy: ScriptedPolicy) -> None:
    policy.reply = REPLY
    num_deltas = 0
    with claude.messages.stream(
        model="nano", max_tokens=4096, messages=USER, tools=CLAUDE_TOOLS
    ) as events:
        for event in events:
            delta = event.delta if event.type == "content_block_delta" else None
            num_deltas += delta is not None and delta.type == "input_json_delta"
        final = events.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use", "tool_use"]
    assert [(block.name, block.input) for block in final.content[1:]] == CALLS
    assert final.stop_reason == "tool_use" and num_deltas > 10


def chat_reply(server: Running, max_tokens: int, stream: bool) -> dict[str, Any]:
    """The one choice of a reply, whole or put together from its chunks."""
    body = {"messages": USER, "tools": CHAT_TOOLS, "max_tokens": max_tokens, "stream": stream}
    reply = server.post("/v1/chat/completions", body)
    assert reply.status_code == 200, reply.text
    if not stream:
        (choice,) = reply.json()["choices"]
        calls = choice["message"].get("tool_calls", [])
        found = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        return {
            "text": choice["message"]["content"] or "",
            "calls": found,
            "finish": choice["finish_reason"],
        }
    joined: dict[str, Any] = {"text": "", "calls": [], "finish": None}
    for line in reply.text.splitlines():
        for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
            joined["text"] += choice["delta"].get("content") or ""
            joined["finish"] = choice["finish_reason"]
            for call in choice["delta"].get("tool_calls", ()):
                if "id" in call:
                    joined["calls"].append([call["function"]["name"], ""])
                joined["calls"][call["index"]][1] += call["function"]["arguments"]
    return joined | {"calls": [tuple(call) for call in joined["calls"]]}


def test_wherever_a_reply_is_cut_stream_and_whole_agree(server, policy: ScriptedPolicy) -> None:
    policy.reply = REPLY
    total, num_partial = num_tokens(policy), 0
    for max_tokens in range(1, total + 1):
        whole = chat_reply(server, max_tokens, stream=False)
        assert chat_reply(server, max_tokens, stream=True) == whole
        assert whole["finish"] == ("length" if max_tokens < total else "tool_calls")
        for (name, arguments), (full_name, full) in zip(
            whole["calls"], (("look", LOOK), ("add", SUM)), strict=False
        ):
            # Half a character may be cut through.
            assert name == full_name and full.startswith(arguments.removesuffix("\ufffd"))
            num_partial += arguments != full
    assert num_partial > 40


def written(message: anthropic.types.Message) -> tuple[str, list[tuple[str, Any]]]:
    text = "".join(block.text for block in message.content if block.type == "text")
    calls = [(block.name, block.input) for block in message.content if block.type == "tool_use"]
    return text, calls


def test_a_call_that_is_cut_has_valid_events(chat, claude, policy: ScriptedPolicy) -> None:
    policy.reply = REPLY
    for max_tokens in range(1, num_tokens(policy), 3):
        limit = {"model": "nano", "max_tokens": max_tokens, "messages": USER}
        with claude.messages.stream(tools=CLAUDE_TOOLS, **limit) as events:
            kinds = [event.type for event in events]
            final = events.get_final_message()
        assert final.stop_reason == "max_tokens"
        assert kinds.count("content_block_start") == kinds.count("content_block_stop")
        whole = claude.messages.create(tools=CLAUDE_TOOLS, **limit)
        assert written(whole) == written(final)
        with chat.responses.stream(
            model="nano", input=QUESTION, tools=FLAT_TOOLS, max_output_tokens=max_tokens
        ) as events:
            last = [event for event in events][-1]
        assert last.type == "response.incomplete"
        for item in last.response.output[:-1]:
            assert item.type == "reasoning" or item.status == "completed"
        assert last.response.output[-1].status in ("incomplete", "completed")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "1" * 5000, "\\"])
@pytest.mark.parametrize("quoted", [False, True])
def test_what_cannot_be_passed_on_never_breaks_a_reply(
    server: Running, claude, policy: ScriptedPolicy, number: str, quoted: bool
) -> None:
    arguments = f'{{"b": 1, "a": {number}}}'
    written = json.dumps(arguments) if quoted else arguments
    policy.reply = f'<tool_calls>\n{{"name": "add", "arguments": {written}}}\n</tool_calls>'
    whole = chat_reply(server, 20_000, stream=False)
    assert chat_reply(server, 20_000, stream=True) == whole
    if quoted:
        # Nothing had been sent when the line ended, and it was no call.
        assert whole["calls"] == [] and whole["text"] == policy.reply
    else:
        assert whole["calls"] == [("add", '{"b": 1, "a": ')]
        assert whole["text"].startswith(number) and whole["finish"] == "tool_calls"
    body = {"max_tokens": 20_000, "messages": USER, "tools": CLAUDE_TOOLS}
    blocks = server.post("/v1/messages", body).json()["content"]
    assert [b["input"] for b in blocks if b["type"] == "tool_use"] == [{"b": 1}] * (not quoted)
    with claude.messages.stream(model="nano", **body) as events:
        streamed = events.get_final_message().content
    assert [b.input for b in streamed if b.type == "tool_use"] == [{"b": 1}] * (not quoted)


def test_a_call_that_is_not_whole_may_be_sent_back(server: Running, policy) -> None:
    policy.reply = "Fine."

    def send(arguments: str) -> Any:
        function = {"name": "add", "arguments": arguments}
        turns = [
            *USER,
            {"role": "assistant", "tool_calls": [{"id": "call_1", "function": function}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "no JSON"},
        ]
        return server.post("/apply-template", {"messages": turns})

    assert '"arguments": {"a": 1}}' in send('{"a": 1, "b": ').json()["prompt"]
    assert send('{"a": foo}').status_code == 400
    assert send("[1]").status_code == 400


def test_a_reply_that_fails_midway_ends_with_an_error(chat, claude, policy, monkeypatch) -> None:
    policy.reply = REPLY
    monkeypatch.setattr(policy, "fails_after", num_tokens(policy) - 20)
    chunks = chat.chat.completions.create(
        model="nano", messages=USER, tools=CHAT_TOOLS, stream=True
    )
    with pytest.raises(openai.APIError, match="no logits") as caught:
        list(chunks)
    assert caught.value.code == "request_failed"
    with (
        pytest.raises(anthropic.APIError, match="no logits"),
        claude.messages.stream(model="nano", max_tokens=4096, messages=USER) as events,
    ):
        list(events)
    with pytest.raises(openai.InternalServerError, match="no logits"):
        chat.chat.completions.create(model="nano", messages=USER)


def test_without_tools_a_block_is_text(server: Running, policy: ScriptedPolicy) -> None:
    policy.reply = REPLY
    reply = server.chat(max_tokens=4096)
    assert reply["choices"][0]["message"]["content"] == REPLY
    choice = {"tools": CHAT_TOOLS, "tool_choice": "none", "max_tokens": 4096}
    assert server.chat(**choice)["choices"][0]["message"]["content"] == REPLY


def test_lone_surrogates_in_quoted_arguments(server: Running, policy: ScriptedPolicy) -> None:
    quoted = json.dumps('{"b": 1, "a": "\\ud800"}')
    policy.reply = f'<tool_calls>\n{{"name": "add", "arguments": {quoted}}}\n</tool_calls>'
    assert chat_reply(server, 4096, stream=True)["calls"] == [("add", '{"b": 1, "a": "')]
    body = {"max_tokens": 4096, "messages": USER, "tools": CLAUDE_TOOLS}
    reply = server.post("/v1/messages", body)
    assert reply.json()["content"][0]["input"]["b"] == 1


def test_schemas_are_still_sent_to_the_model(server: Running) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": ADD, "strict": True}}]
    body = {"messages": USER, "tools": tools}
    assert '"maximum": 99' in server.post("/apply-template", body).json()["prompt"]
