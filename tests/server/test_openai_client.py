"""The `openai` package against the server: what its users do on their first day."""

from __future__ import annotations

import json

import openai
import pytest

from .running import ADD, ANSWER, QUESTION, THOUGHT, Running

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": ADD}}]
USER = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.address + "/v1", api_key="any", max_retries=0)


def test_chat_thinks_and_answers(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="nano", messages=USER, temperature=0)
    message = reply.choices[0].message
    assert message.content == ANSWER
    assert message.reasoning_content == message.reasoning == THOUGHT
    assert reply.choices[0].finish_reason == "stop"
    usage = reply.usage
    assert usage.completion_tokens_details.reasoning_tokens == 9
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    again = client.chat.completions.create(model="nano", messages=USER, temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_a_stream_joins_to_the_whole(client: openai.OpenAI) -> None:
    thought = answer = ""
    finish, usage, num_deltas = None, None, 0
    for chunk in client.chat.completions.create(
        model="nano",
        messages=USER,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            answer += choice.delta.content or ""
            finish = choice.finish_reason or finish
            num_deltas += 1
    assert (thought, answer, finish) == (THOUGHT, ANSWER, "stop")
    assert num_deltas > 3, "it did not come in pieces"
    assert usage.completion_tokens_details.reasoning_tokens == 9


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("seed", range(2))
def test_a_required_call_always_comes(client, choice, stream: bool, seed: int) -> None:
    with (
        client.chat.completions.stream(
            model="nano", messages=USER, tools=TOOLS, tool_choice=choice, seed=seed
        )
        if stream
        else _whole(client, choice, seed) as events
    ):
        reply = events.get_final_completion()
    assert reply.choices[0].finish_reason == "tool_calls"
    calls = reply.choices[0].message.tool_calls
    assert calls
    for call in calls:
        assert call.function.name == "add"
        assert 0 <= json.loads(call.function.arguments)["a"] <= 99
        assert call.id.startswith("call_")


class _whole:
    """`create` in the dress of `stream`, so that one test serves both."""

    def __init__(self, client: openai.OpenAI, choice, seed: int) -> None:
        self._reply = client.chat.completions.create(
            model="nano", messages=USER, tools=TOOLS, tool_choice=choice, seed=seed
        )

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_final_completion(self):
        return self._reply


def test_results_of_tools_go_back_to_the_model(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(
        model="nano", messages=USER, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    message = first.choices[0].message
    assert len(message.tool_calls) == 1
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "7"}
    second = client.chat.completions.create(
        model="nano", messages=[*USER, message, result], tools=TOOLS, temperature=0
    )
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_json_schema_is_kept_behind_a_free_thought(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    for seed in range(5):
        reply = client.chat.completions.create(
            model="nano",
            messages=USER,
            seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        )
        assert json.loads(reply.choices[0].message.content)["answer"] in range(10)
        assert reply.choices[0].message.reasoning.startswith("4")
        assert reply.choices[0].finish_reason == "stop"


def test_a_truncated_json_answer_ends_with_length(client: openai.OpenAI) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 500}
    reply = client.chat.completions.create(
        model="nano",
        messages=USER,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.content.startswith("[")
    assert reply.usage.completion_tokens == 40


def test_n_replies_of_one_seed_differ_and_repeat(client: openai.OpenAI) -> None:
    def ask() -> list[str]:
        reply = client.chat.completions.create(
            model="nano", messages=USER, n=4, seed=3, temperature=3.0, max_tokens=30
        )
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
        return [c.message.model_dump_json() for c in reply.choices]

    first = ask()
    assert len(set(first)) > 1
    assert ask() == first


def test_logprobs_tell_of_the_answer(client: openai.OpenAI) -> None:
    def ask(stream: bool):
        return client.chat.completions.create(
            model="nano",
            messages=USER,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
            stream=stream,
        )

    whole = ask(False).choices[0].logprobs.content
    assert [entry.token for entry in whole] == [ANSWER]
    assert whole[0].top_logprobs[0].token == ANSWER and len(whole[0].top_logprobs) == 2
    streamed = [c.choices[0].logprobs for c in ask(True) if c.choices]
    assert [e for logprobs in streamed if logprobs for e in logprobs.content] == whole


def test_completions_continue_raw_text(client: openai.OpenAI) -> None:
    prompt = client.post("/../apply-template", body={"messages": USER}, cast_to=dict)["prompt"]
    reply = client.completions.create(
        model="nano", prompt=prompt, temperature=0, max_tokens=40, echo=True
    )
    assert reply.choices[0].text == f"{prompt}<think>{THOUGHT}</think>{ANSWER}"
    two = client.completions.create(
        model="nano", prompt=[prompt, prompt], temperature=0, max_tokens=40, logprobs=1
    )
    assert [c.text for c in two.choices] == [f"<think>{THOUGHT}</think>{ANSWER}"] * 2
    assert "".join(two.choices[1].logprobs.tokens) == two.choices[1].text
    streamed = client.completions.create(
        model="nano", prompt=prompt, temperature=0, max_tokens=40, stream=True, stop=["8"]
    )
    assert "".join(c.choices[0].text for c in streamed) == f"<think>{THOUGHT}</think>"


def test_responses_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="nano", input=QUESTION, temperature=0)
    assert whole.output_text == ANSWER and whole.status == "completed"
    assert whole.output[0].type == "reasoning" and whole.output[0].content[0].text == THOUGHT
    assert whole.usage.output_tokens_details.reasoning_tokens == 9
    kinds, text = [], ""
    with client.responses.stream(model="nano", input=QUESTION, temperature=0) as events:
        for event in events:
            kinds.append(event.type)
            text += event.delta if event.type == "response.output_text.delta" else ""
        final = events.get_final_response()
    assert text == final.output_text == ANSWER
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert "response.reasoning_text.delta" in kinds and kinds[-1] == "response.completed"


def test_responses_call_tools_and_go_on(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "name": "add", "parameters": ADD, "strict": True}]
    first = client.responses.create(
        model="nano", input=QUESTION, tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    call = next(item for item in first.output if item.type == "function_call")
    assert json.loads(call.arguments)["a"] in range(100)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    items = [{"role": "user", "content": QUESTION}, *first.output, result]
    second = client.responses.create(model="nano", input=items, tools=tools)
    assert second.usage.input_tokens > first.usage.input_tokens
    cut = client.responses.create(model="nano", input=QUESTION, max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_errors_are_the_clients_own(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'nano'"):
        client.chat.completions.create(model="gpt", messages=USER)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="nano", messages=USER, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="not known") as caught:
        client.chat.completions.create(model="nano", messages=USER, extra_body={"foo": 1})
    assert caught.value.param == "foo"
    server.check_idle()
