"""The `anthropic` package against the server."""

from __future__ import annotations

import anthropic
import pytest

from .running import ADD, ANSWER, QUESTION, THOUGHT, Running

USER = [{"role": "user", "content": QUESTION}]
# The package has no temperature of its own any more.
GREEDY = {"extra_body": {"temperature": 0}}
TOOLS = [{"name": "add", "description": "Adds.", "input_schema": ADD}]


@pytest.fixture(scope="module")
def client(server: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.address, api_key="any", max_retries=0)


def ask(client: anthropic.Anthropic, **more):
    wanted = {"model": "nano", "max_tokens": 256, "messages": USER, **GREEDY} | more
    return client.messages.create(**wanted)


def read_tokens(reply: anthropic.types.Message) -> int:
    """Anthropic counts what was cached beside the input."""
    return reply.usage.input_tokens + reply.usage.cache_read_input_tokens


def test_a_message_thinks_and_answers(client: anthropic.Anthropic) -> None:
    reply = ask(client)
    assert [block.type for block in reply.content] == ["thinking", "text"]
    assert reply.content[0].thinking == THOUGHT and reply.content[1].text == ANSWER
    assert reply.stop_reason == "end_turn"
    assert reply.usage.output_tokens_details.thinking_tokens == 9
    counted = client.messages.count_tokens(model="nano", messages=USER)
    assert counted.input_tokens == read_tokens(reply)


def test_a_stream_of_blocks_joins_to_the_whole(client: anthropic.Anthropic) -> None:
    names = []
    with client.messages.stream(model="nano", max_tokens=256, messages=USER, **GREEDY) as events:
        names += [event.type for event in events]
        final = events.get_final_message()
    whole = ask(client)
    assert [b.model_dump() for b in final.content] == [b.model_dump() for b in whole.content]
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == 13
    assert names[0] == "message_start" and names[-1] == "message_stop"
    assert names.count("content_block_start") == names.count("content_block_stop") == 2


@pytest.mark.parametrize("budget", [0, 3, 1024])
def test_budget_tokens_bound_the_thought(client: anthropic.Anthropic, budget: int) -> None:
    reply = ask(client, thinking={"type": "enabled", "budget_tokens": budget})
    thought = reply.usage.output_tokens_details.thinking_tokens
    assert thought == min(budget, 9)
    off = ask(client, thinking={"type": "disabled"})
    assert off.usage.output_tokens_details.thinking_tokens == 0


def test_a_thought_may_be_left_out(client: anthropic.Anthropic) -> None:
    reply = ask(client, thinking={"type": "adaptive", "display": "omitted"})
    assert reply.content[0].thinking == "" and reply.content[-1].text == ANSWER
    assert reply.usage.output_tokens_details.thinking_tokens == 9


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "add"}])
def test_tools_are_used_and_answered(client: anthropic.Anthropic, choice: dict) -> None:
    choice = choice | {"disable_parallel_tool_use": True}
    first = ask(client, tools=TOOLS, tool_choice=choice, system="Add.")
    call = first.content[-1]
    assert first.stop_reason == "tool_use" and call.type == "tool_use"
    assert call.name == "add" and call.input["a"] in range(100)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "7"}
    turns = [
        *USER,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
    ]
    second = ask(client, messages=turns, tools=TOOLS)
    assert read_tokens(second) > read_tokens(first)
    with client.messages.stream(
        model="nano", max_tokens=256, messages=USER, tools=TOOLS, tool_choice=choice, **GREEDY
    ) as events:
        assert events.get_final_message().content[-1].input == call.input


def test_stop_sequences_and_length_are_told(client: anthropic.Anthropic) -> None:
    stopped = ask(client, stop_sequences=["8"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "8")
    assert stopped.content[-1].text == ""
    assert ask(client, max_tokens=3).stop_reason == "max_tokens"


def test_errors_have_anthropics_shape(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="this server has 'nano'"):
        ask(client, model="other")
    with pytest.raises(anthropic.BadRequestError, match="assistant") as caught:
        ask(client, messages=[*USER, {"role": "assistant", "content": "The"}])
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
