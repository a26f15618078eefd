"""Keys, queues, limits, faults: what a server meets on a bad day, and survives."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import torch

from openm1.engine.config import EngineConfig
from openm1.engine.llm import LLM

from .running import ANSWER, PATIENCE_S, QUESTION, Running, chat_body, running, wait_until

CHAT = "/v1/chat/completions"
ENDLESS = {"ignore_eos": True, "max_tokens": 100_000}


def refused(reply: httpx.Response, status: int, code: str) -> str:
    """The message of a refusal of this kind."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["code"] == code
    assert error["message"]
    return error["message"]


def serves(server: Running) -> bool:
    return server.chat()["choices"][0]["message"]["content"] == ANSWER


def raw(server: Running, data: bytes, *, then: float = 0.0) -> bytes:
    """What comes back for these bytes."""
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(data)
        time.sleep(then)
        received = b""
        while part := connection.recv(65536):
            received += part
            if b"\r\n\r\n" in received and received.endswith(b"}"):
                break
        return received


def post_bytes(server: Running, content: bytes) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.post(server.address + CHAT, content=content, headers=headers, timeout=PATIENCE_S)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b'{"messages": [', "invalid_json"),
        (b"", "invalid_request"),
        (b"[]", "invalid_request"),
        (b'"x"', "invalid_request"),
        (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "bad_request"),
        (b"[" * 100_000, "bad_request"),
        (b'{"a": ' * 5_000, "bad_request"),
    ],
)
def test_bodies_that_are_no_request(server: Running, content: bytes, code: str) -> None:
    refused(post_bytes(server, content), 400, code)
    assert serves(server)


def test_a_lone_surrogate_is_no_text(server: Running) -> None:
    content = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    assert "surrogate" in refused(post_bytes(server, content), 400, "invalid_value")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_50_megabytes(server: Running, chunked: bool) -> None:
    content = json.dumps(chat_body("x" * 50_000_000)).encode()
    parts = (content[i : i + 2**20] for i in range(0, len(content), 2**20))
    reply = httpx.post(
        server.address + CHAT,
        content=parts if chunked else content,
        headers={"Content-Type": "application/json"},
        timeout=PATIENCE_S,
    )
    assert "allowed are 16777216 bytes" in refused(reply, 400, "request_too_large")
    assert serves(server)


LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
ENDLESS_OBJECT = {
    "$ref": "#/$defs/a",
    "$defs": {
        "a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}
    },
}
DEEP: dict = {}
for _ in range(300):
    DEEP = {"type": "array", "items": DEEP}
HOPELESS = [LOOP, ENDLESS_OBJECT, DEEP, {"type": "x"}, {"not": {}}, {"a": "x" * 300_000}]


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"stop": [f"x{i}" for i in range(10_000)]}, "limit_exceeded", "10000 strings"),
        ({"stop": ["x" * 300]}, "limit_exceeded", "300 characters"),
        ({"stop": [""]}, "invalid_value", "non-empty"),
        ({"n": 1000}, "limit_exceeded", "at most 128"),
        ({"max_tokens": 20_000_000}, "context_length_exceeded", "10240000 together"),
        ({"max_tokens": 0}, "invalid_request", "greater than or equal to 1"),
        ({"top_logprobs": 5}, "invalid_value", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, "limit_exceeded", "at most 20"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "token ids"),
        ({"logit_bias": {"999999": 1}}, "invalid_value", "allowed are 0 to"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "invalid_value", "once"),
        ({"tool_choice": "required"}, "invalid_value", "not in tools"),
        ({"messages": []}, "invalid_request", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "tool_call_id"),
        ({"functions": []}, "invalid_request", "not known"),
        ({"temperature": "1"}, "invalid_request", "number"),
    ],
)
def test_fields_beyond_what_is_allowed(server: Running, fields: dict, code: str, said: str) -> None:
    reply = server.post(CHAT, {**chat_body(), **fields})
    assert said in refused(reply, 400, code)
    assert serves(server)


@pytest.mark.parametrize("schema", HOPELESS)
@pytest.mark.parametrize("stream", [False, True])
def test_schemas_that_no_answer_can_keep_to(server: Running, schema: dict, stream: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    reply = server.post(CHAT, chat_body(response_format=wanted, stream=stream))
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == "response_format"
    assert serves(server)


def test_a_tree_is_a_schema_like_any_other(server: Running) -> None:
    """Recursive, but with an end."""
    tree = {
        "$ref": "#/$defs/n",
        "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}},
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": tree}}
    reply = server.chat(response_format=wanted, max_tokens=400)
    assert reply["choices"][0]["finish_reason"] in ("stop", "length")
    assert reply["choices"][0]["message"]["content"].startswith("[")


def test_a_prompt_over_the_context(llm: LLM) -> None:
    with running(llm, context_tokens=100) as server:
        reply = server.post(CHAT, chat_body("x" * 200))
        assert "allowed are 100 together" in refused(reply, 400, "context_length_exceeded")
        assert serves(server)


def test_a_prompt_over_the_memory(server: Running) -> None:
    """The budget of the tests holds some hundred thousand tokens."""
    reply = server.post(CHAT, chat_body(max_tokens=9_000_000, stream=True))
    assert "memory budget" in refused(reply, 400, "context_length_exceeded")
    server.check_idle()


def test_only_keys_come_in(llm: LLM) -> None:
    keys = {"ann": "secret-a", "bob": "secret-b"}
    with running(llm, api_keys=keys, admin_key="root") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": "secret-"}):
            for path in (CHAT, "/v1/messages", "/v1/completions", "/v1/responses", "/tokenize"):
                body = {"max_tokens": 9, **chat_body()}
                if path in ("/v1/completions", "/tokenize"):
                    body = {"prompt": "x"}
                elif path == "/v1/responses":
                    body = {"input": "x"}
                reply = server.post(path, body, **headers)
                assert reply.status_code == 401, (path, reply.text)
                assert "www-authenticate" in reply.headers
            assert server.get("/v1/models", **headers).status_code == 401
            assert server.get("/v1/cache", **headers).status_code == 401
        for headers in ({"Authorization": "Bearer secret-a"}, {"x-api-key": "secret-b"}):
            assert server.post(CHAT, chat_body(), **headers).status_code == 200
        # A user's key is no admin key, nor the other way round.
        assert server.get("/rl/state", Authorization="Bearer secret-a").status_code == 401
        assert server.get("/rl/state", Authorization="Bearer root").status_code == 200
        assert server.post(CHAT, chat_body(), Authorization="Bearer root").status_code == 401
        assert server.get("/health").status_code == server.get("/").status_code == 200


def test_a_full_queue_says_when_to_come_back(llm: LLM) -> None:
    with running(llm, max_running_requests=1, max_queued_requests=1) as server:
        with endless(server), endless(server):
            wait_until(lambda: server.serving.gate.num_waiting == 1)
            reply = server.post(CHAT, chat_body())
            refused(reply, 503, "queue_full")
            assert int(reply.headers["retry-after"]) >= 1
            refused(server.post(CHAT, chat_body(stream=True, n=2)), 503, "queue_full")
        server.check_idle()
        assert serves(server)


def test_one_key_cannot_take_all(llm: LLM) -> None:
    keys = {"ann": "a", "bob": "b"}
    limited = running(llm, api_keys=keys, max_requests_per_key=2)
    with limited as server, endless(server, key="a"):
        wait_until(lambda: server.serving.gate.num_running == 1)
        reply = server.post(CHAT, chat_body(n=2), Authorization="Bearer a")
        refused(reply, 429, "too_many_requests")
        assert int(reply.headers["retry-after"]) >= 1
        assert server.post(CHAT, chat_body(n=2), Authorization="Bearer b").status_code == 200


@contextmanager
def endless(server: Running, *, key: str = "any", **fields: Any) -> Iterator[None]:
    """A client that asks for replies without end, waits or reads, and hangs up."""
    body = json.dumps(chat_body(**{"stream": True, **ENDLESS, **fields})).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        yield


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_costs_nothing_more(server: Running, stream: bool) -> None:
    with endless(server, stream=stream, n=3):
        wait_until(lambda: server.llm.engine.memory.num_running == 3)
    server.check_idle()
    assert serves(server)


def test_headers_and_bodies_that_trickle(llm: LLM) -> None:
    with running(llm, header_timeout_s=0.3, body_timeout_s=0.3) as server:
        for start in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-A: "):
            reply = raw(server, start, then=0.4)
            assert reply.startswith(b"HTTP/1.1 408"), reply
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        )
        reply = raw(server, head + b'Content-Length: 1000\r\n\r\n{"messages"', then=0.4)
        assert reply.startswith(b"HTTP/1.1 408"), reply
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
        assert raw(server, b"NONSENSE\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert serves(server)


def test_draining_finishes_what_runs_and_takes_nothing_new(llm: LLM) -> None:
    with running(llm) as server:
        replies: list[httpx.Response] = []

        def ask() -> None:
            replies.append(server.post(CHAT, chat_body(ignore_eos=True, max_tokens=1500)))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.serving.gate.num_running == 4)
        assert server.get("/ready").status_code == 200
        server.server.drain()
        wait_until(lambda: server.serving.gate.is_draining)
        refused(server.get("/ready"), 503, "shutting_down")
        refused(server.post(CHAT, chat_body()), 503, "shutting_down")
        for thread in threads:
            thread.join(PATIENCE_S)
        assert [r.json()["usage"]["completion_tokens"] for r in replies] == [1500] * 4


def test_the_log_keeps_prompts_to_itself(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="openm1.server")
    with running(llm) as server:
        assert serves(server)
    assert "POST /v1/chat/completions 200" in caplog.text
    assert QUESTION not in caplog.text
    with running(llm, log_prompts=True) as server:
        assert serves(server)
    assert QUESTION in caplog.text


def test_the_engines_own_error_is_told_and_survived(server: Running, monkeypatch) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(server.llm.engine, "step", fail)
    assert refused(server.post(CHAT, chat_body()), 500, "internal")
    monkeypatch.undo()
    assert serves(server)
    server.check_idle()


def test_paths_and_methods_that_are_not_there(server: Running) -> None:
    refused(server.get("/nowhere"), 404, "not_found")
    refused(server.get(CHAT), 405, "method_not_allowed")
    assert server.get("/v1/messages").json()["type"] == "error"


def test_a_request_with_bad_logits_fails_alone() -> None:
    """One token of its prompt is NaN; those beside it are read and written as ever."""
    own = LLM("nano", config=EngineConfig(memory_budget_bytes=2**28))
    (poison,) = own.tokenizer.encode("~")
    with torch.no_grad():
        own.model.model.embed_tokens.weight[poison] = torch.nan
    long = {"ignore_eos": True, "max_tokens": 400}
    with running(own) as server:
        expected = server.chat(**long)["choices"][0]["message"]
        replies: list[dict] = []

        def ask() -> None:
            replies.append(server.chat(**long)["choices"][0]["message"])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: own.engine.memory.num_running >= 1)
        for stream in (False, True):
            for path in (CHAT, "/v1/messages"):
                reply = server.post(path, chat_body("4 ~9", stream=stream, max_tokens=30))
                assert "logits" in refused(reply, 500, "request_failed")
        for thread in threads:
            thread.join(PATIENCE_S)
        assert replies == [expected] * 4
        server.check_idle()
