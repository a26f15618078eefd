"""Every vendor's name for how much the model may think."""

from __future__ import annotations

import pytest

from openm1.server.config import ServerConfig
from openm1.server.errors import ApiError
from openm1.server.protocol import ThinkingControls
from openm1.server.thinking import Thinking, thinking_of

from .running import THOUGHT, Running

CONFIG = ServerConfig(thinking_budget=700)


def read(**said) -> Thinking:
    return thinking_of(ThinkingControls.model_validate(said), CONFIG)


@pytest.mark.parametrize(
    ("said", "budget"),
    [
        ({}, 700),
        ({"reasoning_effort": "low"}, 4096),
        ({"reasoning": {"effort": "high"}}, 40_000),
        ({"reasoning": {"max_tokens": 9}}, 9),
        ({"output_config": {"effort": "max"}}, 80_000),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, 9),
        ({"thinking": {"type": "adaptive"}}, 700),
        ({"thinking_budget": 9}, 9),
        ({"thinking_token_budget": 9}, 9),
        ({"thinking_budget_tokens": 9}, 9),
        ({"thinking_budget_tokens": -1}, None),
        ({"chat_template_kwargs": {"thinking_budget": 9}}, 9),
        ({"reasoning_effort": "low", "thinking_budget": 9}, 9),
        ({"thinking_budget": 9, "reasoning": {"max_tokens": 9}}, 9),
    ],
)
def test_budgets(said: dict, budget: int | None) -> None:
    assert read(**said) == Thinking(enabled=True, budget=budget, shown=True)


@pytest.mark.parametrize(
    "said",
    [
        {"reasoning_effort": "none"},
        {"reasoning": {"effort": "none"}},
        {"reasoning": {"enabled": False}},
        {"thinking": {"type": "disabled"}},
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_switches(said: dict) -> None:
    assert not read(**said).enabled


@pytest.mark.parametrize(
    "said",
    [
        {"include_reasoning": False},
        {"reasoning": {"exclude": True}},
        {"thinking": {"type": "enabled", "display": "omitted"}},
    ],
)
def test_hiding(said: dict) -> None:
    thinking = read(**said)
    assert thinking.enabled and not thinking.shown


@pytest.mark.parametrize(
    ("said", "both"),
    [
        ({"thinking_budget": 9, "thinking_token_budget": 8}, ("thinking_budget is 9", "is 8")),
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, ("'low'", "'high'")),
        ({"enable_thinking": False, "thinking": {"type": "enabled"}}, ("False", "True")),
        ({"reasoning_effort": "none", "enable_thinking": True}, ("True", "False")),
    ],
)
def test_contradictions_are_told(said: dict, both: tuple[str, str]) -> None:
    with pytest.raises(ApiError) as caught:
        read(**said)
    assert caught.value.status == 400
    assert all(word in caught.value.message for word in both)


@pytest.mark.parametrize("stream", [False, True])
def test_what_nano_does_with_them(server: Running, stream: bool) -> None:
    def ask(**said):
        if not stream:
            reply = server.chat(**said)
            message = reply["choices"][0]["message"]
            return message["reasoning"], reply["usage"]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        text = server.post("/v1/chat/completions", _body(**said, **options)).text
        chunks = [_json(line) for line in text.splitlines() if line.startswith("data: {")]
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        thought = "".join(delta.get("reasoning", "") for delta in deltas)
        return thought or None, chunks[-1]["usage"]

    thought, usage = ask()
    assert thought == THOUGHT and usage["completion_tokens_details"]["reasoning_tokens"] == 9
    thought, usage = ask(thinking_budget=4)
    assert THOUGHT.startswith(thought)
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 4
    thought, usage = ask(include_reasoning=False)
    assert thought is None and usage["completion_tokens_details"]["reasoning_tokens"] == 9
    thought, usage = ask(reasoning_effort="none")
    assert not thought and usage["completion_tokens_details"]["reasoning_tokens"] == 0


def _body(**fields):
    from .running import chat_body

    return chat_body(**fields)


def _json(line: str):
    import json

    return json.loads(line.removeprefix("data: "))
