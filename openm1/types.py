"""The nouns that cross folders: plain, frozen, torch-free.

Shape legend, used in every annotation of the project (docs/notation.md has the long form):
B sequences, T packed tokens, S running sequences, H query heads, G key/value heads, D head dim,
C hidden size, E experts, K experts per token, F expert width, V vocabulary, N packed sequences,
M chunks of a kernel or places of a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "abort"]
ErrorSource = Literal["policy", "env", "grader", "sandbox"]

ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call the model made: `ToolCall(name="add", arguments='{"a": 1, "b": 2}')`."""

    name: str
    arguments: str
    """A JSON object as text, valid as it stands."""
    id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolSpec:
    """A function offered to the model; `parameters` is its JSON schema."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation.

    `Message(role="assistant", reasoning="2+2: 4", content="4")` is a thought and an answer. What is
    present is rendered: drop `reasoning` from old turns yourself if the model should not see it.
    """

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    """For role "tool": which function answered."""
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"message role is {self.role!r}; allowed are {', '.join(ROLES)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to continue a prompt."""

    max_tokens: int = 256
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches top_p."""
    seed: int | None = None
    """Makes the request repeatable whatever else runs in the batch; None draws a fresh one."""
    n: int = 1
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are cut from the text. They do not act inside a thought."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    thinking_budget: int | None = None
    """Tokens of thought allowed before `</think>` is forced; 0 answers at once; None is free."""

    def __post_init__(self) -> None:
        def need(good: bool, name: str, allowed: str) -> None:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {allowed}")

        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        else:
            object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        need(self.max_tokens >= 1, "max_tokens", "an integer of at least 1")
        need(0.0 <= self.temperature <= 100.0, "temperature", "0 (greedy) to 100")
        need(self.top_k >= 0, "top_k", "0 (off) or more")
        need(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        need(self.n >= 1, "n", "an integer of at least 1")
        need(all(self.stop), "stop", "non-empty strings")
        need(
            self.thinking_budget is None or self.thinking_budget >= 0,
            "thinking_budget",
            "None or an integer of at least 0",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What the model wrote for one prompt."""

    token_ids: tuple[int, ...]
    """Every sampled or forced token, the end-of-sentence token included."""
    logprobs: tuple[float, ...]
    """Per token, under softmax(logits / temperature), 1 when greedy, before top-k and top-p."""
    forced: tuple[bool, ...] = ()
    """True for tokens the thinking budget wrote; the policy did not choose them."""
    text: str = ""
    """The answer, without thought, special tokens or tool calls."""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason = "stop"
    num_reasoning_tokens: int = 0
    num_prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were not computed again."""
    policy_version: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One question with what is needed to grade it."""

    family: str
    prompt: tuple[Message, ...]
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What the environment says to one assistant turn."""

    reward: float
    done: bool = True
    messages: tuple[Message, ...] = ()
    """The environment's reply when not done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One policy call inside a rollout, in exact token ids."""

    prompt_ids: tuple[int, ...]
    completion: Completion


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A task played to its end. With `error` set, `reward` is None and must not be trained on."""

    task: Task
    turns: tuple[Turn, ...] = ()
    reward: float | None = None
    error: str | None = None
    error_source: ErrorSource | None = None

    @property
    def num_completion_tokens(self) -> int:
        return sum(len(turn.completion.token_ids) for turn in self.turns)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """The G rollouts of one prompt: what a group-relative advantage is taken over."""

    task: Task
    rollouts: Sequence[Rollout]
