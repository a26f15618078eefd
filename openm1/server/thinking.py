"""How much a request lets the model think, under every vendor's name for it.

| who | says |
|---|---|
| OpenAI | `reasoning_effort`, `reasoning.effort` |
| Anthropic | `thinking.{type,budget_tokens,display}`, `output_config.effort` |
| Qwen | `enable_thinking`, `thinking_budget`, also inside `chat_template_kwargs` |
| vLLM | `thinking_token_budget`, `include_reasoning` |
| llama.cpp | `thinking_budget_tokens`, -1 being free |
| OpenRouter | `reasoning.{enabled,max_tokens,effort,exclude}`, `include_reasoning` |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openm1.server.config import ServerConfig
from openm1.server.errors import bad_request
from openm1.server.protocol import ThinkingControls

FREE = -1
_NO_EFFORT = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Thinking:
    """What a request wants of the thought."""

    enabled: bool
    budget: int | None
    """Tokens; None is free."""
    shown: bool
    """False hides the thought from the reply; its tokens are counted all the same."""


def thinking_of(controls: ThinkingControls, config: ServerConfig) -> Thinking:
    """Raises ApiError where two names say different things, naming both."""
    template = controls.chat_template_kwargs
    effort = _agreed(_efforts(controls))
    if effort is not None and effort != _NO_EFFORT and effort not in config.effort_budgets:
        raise bad_request(
            f"effort is {effort!r}; allowed are none, {', '.join(config.effort_budgets)}",
            "reasoning_effort",
        )
    budget = _agreed(
        {
            "thinking.budget_tokens": controls.thinking and controls.thinking.budget_tokens,
            "reasoning.max_tokens": controls.reasoning and controls.reasoning.max_tokens,
            "thinking_budget": controls.thinking_budget,
            "thinking_token_budget": controls.thinking_token_budget,
            "thinking_budget_tokens": controls.thinking_budget_tokens,
            "chat_template_kwargs.thinking_budget": template and template.thinking_budget,
        }
    )
    # A number says more than a word.
    if budget is None and effort not in (None, _NO_EFFORT):
        budget = config.effort_budgets[effort]
    if budget is None:
        budget = config.thinking_budget
    return Thinking(
        enabled=_enabled(controls, effort),
        budget=None if budget == FREE else budget,
        shown=_shown(controls),
    )


def _efforts(controls: ThinkingControls) -> dict[str, str | None]:
    return {
        "reasoning_effort": controls.reasoning_effort,
        "reasoning.effort": controls.reasoning and controls.reasoning.effort,
        "output_config.effort": controls.output_config and controls.output_config.effort,
    }


def _enabled(controls: ThinkingControls, effort: str | None) -> bool:
    template, thinking = controls.chat_template_kwargs, controls.thinking
    said = {
        "enable_thinking": controls.enable_thinking,
        "chat_template_kwargs.enable_thinking": template and template.enable_thinking,
        "reasoning.enabled": controls.reasoning and controls.reasoning.enabled,
        "thinking.type": thinking and thinking.type != "disabled",
        "effort": None if effort is None else effort != _NO_EFFORT,
    }
    agreed = _agreed(said)
    return True if agreed is None else agreed


def _shown(controls: ThinkingControls) -> bool:
    reasoning, thinking = controls.reasoning, controls.thinking
    hides = {
        "include_reasoning": controls.include_reasoning is False,
        "reasoning.exclude": bool(reasoning and reasoning.exclude),
        "thinking.display": bool(thinking and thinking.display == "omitted"),
    }
    return not any(hides.values())


def _agreed(said: dict[str, Any]) -> Any:
    """The one value that all names give that give any."""
    given = {name: value for name, value in said.items() if value is not None}
    if len(set(given.values())) > 1:
        told = " and ".join(f"{name} is {value!r}" for name, value in given.items())
        raise bad_request(f"{told}; allowed is one of them, or the same value", next(iter(given)))
    return next(iter(given.values()), None)
