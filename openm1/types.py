"""The nouns that cross folders: plain, frozen, torch-free.

Shape legend, used in every annotation of the project (docs/notation.md has the long form):
B sequences, T packed tokens, S running sequences, H query heads, G key/value heads, D head dim,
C hidden size, E experts, K experts per token, F expert width, V vocabulary, N packed sequences,
M chunks of a kernel or places of a loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from openm1.protocols import Grammar

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "repetition", "abort"]
ThoughtEnd = Literal["model", "budget", "off"]
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
    min_p: float = 0.0
    """Keep tokens at least min_p times as probable as the likeliest; 0 keeps all."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token the answer already has."""
    frequency_penalty: float = 0.0
    """Taken off as often as the answer has the token."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the answer."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of the answer's tokens, by id."""
    banned_token_ids: tuple[int, ...] = ()
    """Never sampled in the answer. Penalties, bias and bans leave the thought alone."""
    grammar: Grammar | None = None
    """What the answer must look like. It begins after the thought, which stays free."""
    top_logprobs: int = 0
    """How many of the likeliest tokens to report at each place, with their log-probabilities."""
    seed: int | None = None
    """Makes the request repeatable whatever else runs in the batch; None draws a fresh one."""
    n: int = 1
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are cut from the text. They do not act inside a thought."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    thinking: bool = True
    """False closes the thought before it begins."""
    thinking_budget: int | None = None
    """Tokens of thought allowed before it is brought to an end; 0 answers at once; None is free."""
    thinking_grace: int | None = None
    """How many tokens past the budget the thought may take to land: at the next sentence end, or
    where the grace ends, it is closed with a short message, which counts as thought. None is a
    sixteenth of the budget, at most 512; 0 cuts hard."""
    repetition_stop_tokens: int = 3000
    """Stops after that many tokens in a row above `repetition_stop_probability`; 0 never stops."""
    repetition_stop_probability: float = 0.99
    priority: int = 0
    """Higher goes first and is preempted last."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "banned_token_ids", tuple(self.banned_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        self._check_lengths()
        self._check_distribution()

    def _need(self, good: bool, name: str, allowed: str) -> None:
        if not good:
            raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {allowed}")

    def _check_lengths(self) -> None:
        for name, least in _COUNTS.items():
            count = f"an integer of at least {least}"
            self._need(_is_whole(getattr(self, name), least), name, count)
        for name in ("thinking_budget", "thinking_grace"):
            value = getattr(self, name)
            self._need(
                value is None or _is_whole(value, 0), name, "None or an integer of at least 0"
            )
        self._need(isinstance(self.thinking, bool), "thinking", "True or False")
        self._need(isinstance(self.priority, Integral), "priority", "an integer")
        self._need(all(self.stop), "stop", "non-empty strings")

    def _check_distribution(self) -> None:
        need = self._need
        need(0.0 <= self.temperature <= 100.0, "temperature", "0 (greedy) to 100")
        need(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        need(0.0 <= self.min_p <= 1.0, "min_p", "0 (off) to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            need(math.isfinite(getattr(self, name)), name, "a finite number, 0 being off")
        need(0 < self.repetition_penalty < math.inf, "repetition_penalty", "above 0, 1 being off")
        need(
            all(_is_whole(i, 0) and math.isfinite(bias) for i, bias in self.logit_bias.items()),
            "logit_bias",
            "finite numbers by token id",
        )
        ids = all(_is_whole(i, 0) for i in self.banned_token_ids)
        need(ids, "banned_token_ids", "token ids")
        # A ban could take the only token that the grammar allows.
        free = self.grammar is None or not self.banned_token_ids
        need(free, "banned_token_ids", "none beside a grammar")
        share = self.repetition_stop_probability
        need(0.0 <= share < 1.0, "repetition_stop_probability", "at least 0 and below 1")


_COUNTS = {"max_tokens": 1, "n": 1, "top_k": 0, "top_logprobs": 0, "repetition_stop_tokens": 0}
"""The counts of `SamplingParams`, and the least each may be."""


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What the model wrote for one prompt."""

    token_ids: tuple[int, ...]
    """Every sampled or forced token, the end-of-sentence token included."""
    logprobs: tuple[float, ...]
    """Per token, under softmax(logits / temperature), 1 when greedy, before top-k and top-p."""
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    """Per token, the likeliest ids with their log-probabilities, best first, where asked for."""
    forced: tuple[bool, ...] = ()
    """True for tokens the thinking budget wrote; the policy did not choose them."""
    text: str = ""
    """The answer, without thought, special tokens or tool calls."""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason = "stop"
    thought_end: ThoughtEnd | None = None
    """Who ended the thought; None when there was none, or it never ended."""
    num_reasoning_tokens: int = 0
    num_prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were not computed again."""
    policy_versions: tuple[int, ...] = ()
    """Per token, which weights wrote it."""
    experts: tuple[bytes, ...] = ()
    """Where the engine records them: for each token of prompt and reply but the last, the experts
    it went to, K of the first layer, then K of the next one; empty where it was not computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One question with what is needed to grade it."""

    family: str
    prompt: tuple[Message, ...]
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[ToolSpec, ...] = ()
    """Functions offered to the model; the environment carries the calls out."""


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
