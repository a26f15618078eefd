"""One sequence on its way through the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from openm1.engine.adjustment import Adjustment
from openm1.engine.cache.hybrid import CachedSequence
from openm1.engine.stopping import RepetitionRun
from openm1.engine.thinking import ThoughtTracker
from openm1.types import FinishReason, SamplingParams


class RequestFailed(RuntimeError):
    """One request cannot go on. Those that ran beside it can."""


@dataclass(kw_only=True, eq=False)
class Request:
    """Mutable bookkeeping; `params.n` is 1 and `params.seed` is set. Equal only to itself."""

    prompt_ids: list[int]
    params: SamplingParams
    thought: ThoughtTracker
    adjustment: Adjustment | None = None
    """Penalties, bias and bans, where the request asks for some."""
    completes_stop: Callable[[int], bool] | None = None
    """Given each token in turn, says whether a stop string is complete."""
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: RequestFailed | None = None
    """Why it was aborted, where that was the engine's doing."""
    policy_versions: list[int] = field(default_factory=list)
    """Per output token, which weights wrote it."""
    experts: dict[int, bytes] = field(default_factory=dict)
    """By position, where they are recorded."""
    arrival: int = 0
    """The scheduler's count: what came earlier goes first among equals."""
    snapshot_at: set[int] = field(default_factory=set)
    """Where to remember the prefix while it is computed, in tokens from the start."""
    sequence: CachedSequence | None = None
    """None while it waits."""
    num_cached: int = 0
    """Prompt tokens found in the cache when it was first admitted."""
    was_admitted: bool = False
    repetition: RepetitionRun = field(init=False)
    prompt_hash: int = field(init=False)

    def __post_init__(self) -> None:
        params = self.params
        self.repetition = RepetitionRun(
            params.repetition_stop_tokens, params.repetition_stop_probability
        )
        self.prompt_hash = hash(tuple(self.prompt_ids))

    @property
    def priority(self) -> int:
        return self.params.priority

    @property
    def token_ids(self) -> list[int]:
        """A new list; `num_tokens` is cheaper where its length will do."""
        return self.prompt_ids + self.output_ids

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    def ids(self, start: int, end: int) -> list[int]:
        """`token_ids[start:end]`, at the cost of what is asked for alone."""
        length = len(self.prompt_ids)
        prompt = self.prompt_ids[start:end]
        return prompt + self.output_ids[max(start - length, 0) : max(end - length, 0)]

    @property
    def newest_id(self) -> int:
        return self.output_ids[-1] if self.output_ids else self.prompt_ids[-1]

    def append(
        self,
        token: int,
        logprob: float,
        top_logprobs: tuple[tuple[int, float], ...],
        *,
        version: int,
    ) -> None:
        """Takes the next token of the reply, from the weights of `version`."""
        forced = self.thought.forced is not None
        self.logprobs.append(logprob)
        self.top_logprobs.append(top_logprobs)
        self.forced.append(forced)
        self.policy_versions.append(version)
        self.output_ids.append(token)
        self.thought.observe(token)
        self.repetition.observe(logprob, forced=forced)
