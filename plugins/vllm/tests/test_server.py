"""The openai client over vLLM's API server with the plugin, and nano behind it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import openai
import pytest
from openm1_vllm.gate import Case, environment

from openm1.chat.tokenizer import Tokenizer
from openm1.model.config import M1Config
from openm1.model.hf import resolve_path

START_S = 600
QUESTION = "4 -9 +8 *9 +1"
THOUGHT, ANSWER = "4 -9 =5 +8 =3 *9 =7 +1 =8", "8"
USER = [{"role": "user", "content": QUESTION}]
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": ADD}}]
NATIVE_CALL = r'<tool_calls>\n\{"name": "add", "arguments": \{"a": [1-9]\}\}\n</tool_calls>'


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    arguments = [
        *("--model", str(resolve_path("nano")), "--served-model-name", "nano"),
        *("--reasoning-parser", "minimax_m1", "--tool-call-parser", "minimax_m1"),
        *("--enable-auto-tool-choice", "--dtype", "float32", "--max-model-len", "2048"),
        *("--enforce-eager", "--host", "127.0.0.1", "--port", str(port)),
        # nano, which knows no JSON, would write blanks for ever.
        *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
    ]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            env=environment(Case(name="server", engine={"tensor_parallel_size": 1})),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        made = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0, timeout=120
        )
        wait(made, process, log)
        yield made
    finally:
        process.terminate()
        process.wait(60)


def wait(client: openai.OpenAI, process: subprocess.Popen, log) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(1)
    pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")


def ask(client: openai.OpenAI, **settings):
    settings = {"messages": USER, "temperature": 0, "max_tokens": 200} | settings
    return client.chat.completions.create(model="nano", **settings)


def test_a_thought_is_apart_from_the_answer(client):
    choice = ask(client).choices[0]
    assert choice.message.reasoning == THOUGHT
    assert choice.message.content == ANSWER
    assert choice.finish_reason == "stop"


def test_a_stream_joins_to_the_whole(client):
    thought = answer = ""
    count = 0
    for chunk in ask(client, stream=True):
        for choice in chunk.choices:
            thought += getattr(choice.delta, "reasoning", None) or ""
            answer += choice.delta.content or ""
            count += 1
    assert (thought, answer) == (THOUGHT, ANSWER)
    assert count > 3, "it did not come in pieces"


def test_a_thought_stops_at_its_budget(client):
    short = ask(client, extra_body={"thinking_token_budget": 4}).choices[0].message
    assert short.reasoning and THOUGHT.startswith(short.reasoning)
    assert len(short.reasoning) < len(THOUGHT)
    assert short.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_in_m1s_own_format(client, stream):
    """nano knows no tools: a grammar writes the block, the parser must find it."""
    settings = {
        "tools": TOOLS,
        "stream": stream,
        "extra_body": {"structured_outputs": {"regex": NATIVE_CALL}, "include_reasoning": False},
    }
    name, arguments, content, finish = call(ask(client, **settings), stream)
    assert (name, content, finish) == ("add", "", "tool_calls")
    assert 1 <= json.loads(arguments)["a"] <= 9


NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(("choice", "stream"), [("required", False), (NAMED, False), (NAMED, True)])
def test_a_required_call_comes(client, choice, stream):
    """One call: nano would list them for ever."""
    settings = {
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "stream": stream,
        "extra_body": {"include_reasoning": False},
    }
    name, arguments, _, _ = call(ask(client, **settings), stream)
    assert name == "add"
    assert 0 <= json.loads(arguments)["a"] <= 99


def test_a_required_call_is_refused_in_a_stream(client):
    with pytest.raises(openai.BadRequestError, match="in a stream"):
        ask(client, tools=TOOLS, tool_choice="required", stream=True)


def call(reply, stream: bool) -> tuple[str, str, str, str]:
    """(name, arguments, content, finish reason) of the one call."""
    if not stream:
        choice = reply.choices[0]
        [one] = choice.message.tool_calls
        content = choice.message.content or ""
        return one.function.name, one.function.arguments, content, choice.finish_reason
    name, arguments, content, finish = "", "", "", ""
    for chunk in reply:
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            content += choice.delta.content or ""
            for one in choice.delta.tool_calls or []:
                assert one.index == 0
                name += one.function.name or ""
                arguments += one.function.arguments or ""
    return name, arguments, content, finish


def test_padding_ids_are_never_drawn(client):
    """Even where the request asks for them."""
    num_real = Tokenizer.from_pretrained(resolve_path("nano")).vocab_size
    num_ids = M1Config.from_pretrained(resolve_path("nano")).vocab_size
    assert num_real < num_ids
    reply = client.completions.create(
        model="nano",
        prompt="x",
        max_tokens=50,
        logit_bias={str(i): 100.0 for i in range(num_real, num_ids)},
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    ids = reply.choices[0].token_ids
    assert len(ids) == 50
    assert max(ids) < num_real
