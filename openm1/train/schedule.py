"""How the learning rate moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Linear warm-up, a plateau, then a decay over the last part of the run."""

    warmup_steps: int = 0
    decay_share: float = 0.0
    """Share of the run, counted from its end, over which the rate falls to `final_ratio`."""
    decay: Literal["linear", "cosine"] = "linear"
    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; allowed is 0 or more")
        for name in ("decay_share", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is 0 to 1")

    def ratio(self, step: int, num_steps: int) -> float:
        """The factor on the learning rate at `step`, counted from 0."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay_steps = self.decay_share * num_steps
        if decay_steps == 0 or step < num_steps - decay_steps:
            return warmup
        left = (num_steps - step) / decay_steps
        fall = left if self.decay == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        return warmup * (self.final_ratio + (1 - self.final_ratio) * fall)
