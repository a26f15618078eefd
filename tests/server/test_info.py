"""Tokens, the cache, metrics, the verbs of RL: what stands beside the replies."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from .running import PATIENCE_S, QUESTION, Running, chat_body, wait_until

CHAT = "/v1/chat/completions"
ADMIN = {"Authorization": "Bearer admin"}


def metric(server: Running, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"openm1:{name}"))


def test_tokenize_and_back(server: Running) -> None:
    counted = server.post("/tokenize", {"prompt": QUESTION, "return_token_strs": True}).json()
    assert counted["count"] == len(counted["tokens"]) == len(counted["token_strs"])
    assert "".join(counted["token_strs"]) == QUESTION
    back = server.post("/detokenize", {"tokens": counted["tokens"]}).json()
    assert back == {"prompt": QUESTION}
    messages = chat_body()["messages"]
    ids = server.post("/tokenize", {"messages": messages}).json()
    assert ids["count"] == server.chat()["usage"]["prompt_tokens"]
    text = server.post("/apply-template", {"messages": messages}).json()["prompt"]
    again = server.post("/tokenize", {"prompt": text, "add_special_tokens": True}).json()
    assert again["tokens"] == ids["tokens"]
    assert server.post("/tokenize", {"prompt": text}).json()["count"] > ids["count"]
    assert server.post("/tokenize", {}).status_code == 400
    assert server.post("/detokenize", {"tokens": [10**6]}).status_code == 400


def test_the_metrics_count_what_was_done(server: Running) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total", "reasoning_tokens_total")
    names += (
        "prefix_cache_hits_total",
        "request_success_total",
        "request_queue_time_seconds_count",
    )
    names += ("time_to_first_token_seconds_count", "e2e_request_latency_seconds_count")
    before = [metric(server, name) for name in names]
    usage = server.chat(n=2)["usage"]
    server.post(CHAT, chat_body(stream=True))
    gained = [metric(server, name) - old for name, old in zip(names, before, strict=True)]
    prompt = usage["prompt_tokens"]
    assert gained[:3] == [3 * prompt, usage["completion_tokens"] + 13, 27]
    assert gained[3] >= 2 * (prompt - 1)
    assert gained[4:] == [3, 3, 1, 3]
    assert metric(server, "num_requests_running") == metric(server, "num_requests_waiting") == 0


def test_the_cache_can_be_watched(server: Running) -> None:
    server.chat()
    now = server.get("/v1/cache").json()
    assert now["num_running"] == now["num_waiting"] == 0
    assert now["num_pages_in_use"] == now["num_pages_cached"] > 0
    assert now["num_states_in_use"] == now["num_states_cached"] > 0
    held = (
        now["num_pages_in_use"] * now["page_bytes"] + now["num_states_in_use"] * now["state_bytes"]
    )
    assert now["in_use_bytes"] == held <= now["budget_bytes"]
    assert 0 < now["hit_rate"] < 1
    server.chat()
    after = server.get("/v1/cache").json()
    assert after["hit_rate"] > now["hit_rate"]


def test_replies_carry_what_rl_needs(server: Running) -> None:
    for fields in ({}, {"logprobs": True}):
        reply = server.chat(return_token_ids=True, thinking_budget=4, **fields)
        choice = reply["choices"][0]
        lengths = {
            len(choice[n]) for n in ("token_ids", "token_logprobs", "forced", "policy_versions")
        }
        assert lengths == {reply["usage"]["completion_tokens"]}
        assert any(choice["forced"]) and not all(choice["forced"])
        assert len(reply["prompt_token_ids"]) == reply["usage"]["prompt_tokens"]
        text = server.post("/detokenize", {"tokens": choice["token_ids"]}).json()["prompt"]
        assert text.startswith("<think>4 -9 =5 +8</think>")


def test_pause_keeps_and_resume_goes_on(server: Running) -> None:
    alone = server.chat(max_tokens=300, ignore_eos=True)["choices"][0]["message"]
    replies = []
    ask = threading.Thread(
        target=lambda: replies.append(server.chat(max_tokens=300, ignore_eos=True))
    )
    assert server.post("/rl/pause", {}, **ADMIN).json()["is_paused"]
    ask.start()
    wait_until(lambda: server.serving.gate.num_running == 1)
    ask.join(0.2)
    assert ask.is_alive() and not replies
    state = server.post("/rl/resume", {}, **ADMIN).json()
    assert not state["is_paused"]
    ask.join(PATIENCE_S)
    assert replies[0]["choices"][0]["message"] == alone


@pytest.mark.parametrize("in_flight", ["keep", "recompute"])
def test_new_weights_between_two_tokens(server: Running, tmp_path: Path, in_flight: str) -> None:
    """The same weights again, so that only the version tells."""
    server.llm.model.save_pretrained(tmp_path, layout="published")
    version = server.get("/rl/state", **ADMIN).json()["version"] + 1
    replies = []
    long = {"max_tokens": 3000, "ignore_eos": True, "return_token_ids": True}
    ask = threading.Thread(target=lambda: replies.append(server.chat(**long)))
    ask.start()
    wait_until(lambda: any(request.output_ids for request in [*server.llm.engine._live]))
    assert server.post("/rl/pause", {}, **ADMIN).json()["is_paused"]
    body = {"path": str(tmp_path), "version": version, "in_flight": in_flight}
    state = server.post("/rl/update_weights", body, **ADMIN).json()
    assert state == {"is_paused": True, "version": version}
    assert not server.post("/rl/resume", {}, **ADMIN).json()["is_paused"]
    ask.join(PATIENCE_S)
    versions = replies[0]["choices"][0]["policy_versions"]
    assert versions == sorted(versions) and {*versions} == {version - 1, version}


def test_bad_weights_are_told_and_change_nothing(server: Running, tmp_path: Path) -> None:
    version = server.get("/rl/state", **ADMIN).json()["version"]
    for path in (tmp_path, tmp_path / "nowhere"):
        reply = server.post("/rl/update_weights", {"path": str(path), "version": 99}, **ADMIN)
        assert reply.status_code == 400, reply.text
    assert server.get("/rl/state", **ADMIN).json()["version"] == version
    assert server.post("/rl/pause", {"mode": "abort"}, **ADMIN).status_code == 400
