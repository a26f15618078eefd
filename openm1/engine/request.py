"""One sequence on its way through the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from openm1.engine.thinking import ThoughtTracker
from openm1.types import FinishReason, SamplingParams


@dataclass(kw_only=True, eq=False)
class Request:
    """Mutable bookkeeping; `params.n` is 1 and `params.seed` is set. Equal only to itself."""

    prompt_ids: list[int]
    params: SamplingParams
    thought: ThoughtTracker
    session: str | None = None
    completes_stop: Callable[[int], bool] | None = None
    """Given each token in turn, says whether a stop string is complete."""
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    slot: int | None = None
    num_cached: int = 0
    """Prompt tokens found in the cache at admission."""
    policy_version: int = 0

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_ids + self.output_ids
