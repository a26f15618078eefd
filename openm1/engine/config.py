"""How much runs at once, and what the engine must know of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Kernels = Literal["auto", "torch", "cpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Limits of one engine."""

    max_num_seqs: int = 256
    """Sequences decoded together."""
    max_step_tokens: int = 2048
    """Tokens of one step, decoded and prefilled; longer prompts are split."""
    memory_budget_bytes: int | None = None
    """For keys, values and states, of running sequences and cached prefixes together. None is half
    of the memory that is available when the engine takes its first request."""
    page_tokens: int = 64
    """Tokens per page of keys and values."""
    record_experts: bool = False
    """Completions tell which experts their tokens went to. "auto" kernels are then "torch"."""
    kernels: Kernels = "auto"
    """"torch" is the reference for every device and dtype, "cpu" decodes in fused compiled loops,
    "auto" takes the faster of those that can run the model."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_step_tokens", "page_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is at least 1")
        if self.memory_budget_bytes is not None and self.memory_budget_bytes < 1:
            raise ValueError(
                f"memory_budget_bytes is {self.memory_budget_bytes}; allowed is None or at least 1"
            )
        if self.record_experts and self.kernels == "cpu":
            raise ValueError("kernels is 'cpu' with record_experts; allowed are auto, torch")
        if self.kernels not in get_args(Kernels):
            raise ValueError(
                f"kernels is {self.kernels!r}; allowed are {', '.join(get_args(Kernels))}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """What the engine must know of the vocabulary."""

    vocab_size: int
    """Ids from here on have no text and are never sampled."""
    eos_token_ids: frozenset[int] = frozenset()
    think_open: tuple[int, ...] = ()
    think_close: tuple[int, ...] = ()
    landing_message: tuple[int, ...] = ()
    """Written before `</think>` when a thought found no sentence end within its grace."""
    is_blank: Callable[[int], bool] = lambda token: False
    """Whether a token is blank characters only, which may stand before a thought."""
    ends_sentence: Callable[[int], bool] = lambda token: False
    """Whether a token ends a sentence or a line: a good place for a thought to end."""
