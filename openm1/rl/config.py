"""What a run of reinforcement learning can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from openm1.rl.batch import BatchConfig
from openm1.rl.critic import Critic
from openm1.rl.losses import CISPO, Loss, RatioAnchor
from openm1.rl.stages import WindowGrowth
from openm1.train.optim import AdamWConfig
from openm1.train.schedule import Schedule

InFlight = Literal["wait", "recompute", "keep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RLConfig:
    """One run. Defaults are M1's where it published them, scaled to small models elsewhere."""

    num_steps: int = 100
    num_prompts: int = 16
    """Prompts P per generation batch."""
    group_size: int = 16
    """Rollouts G per prompt."""
    num_updates: int = 16
    """Optimizer steps per generation batch; M1 used 16."""
    max_response_tokens: int = 256
    """The window; with `growth`, the first one."""
    growth: WindowGrowth = field(default_factory=WindowGrowth)
    temperature: float = 1.0
    repetition_stop_tokens: int = 3000
    """A rollout stops after so many tokens in a row of which the model is all but sure."""
    loss: Loss = field(default_factory=CISPO)
    critic: Critic | None = None
    """With one, advantages are a value head's (PPO's way) instead of the group's; groups that are
    all right or all wrong then teach too: switch dynamic_sampling off."""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    schedule: Schedule = field(default_factory=Schedule)
    anchor: RatioAnchor = field(default_factory=RatioAnchor)
    batch: BatchConfig = field(default_factory=BatchConfig)
    max_staleness: int = 0
    """How many versions older than the weights that are trained a token may be. 0: rollouts and
    updates take turns; above: rollouts of the next steps go on while a step is learned from."""
    in_flight: InFlight = "wait"
    """What becomes of rollouts under way when new weights come. "wait": they are finished first,
    so that each has one version, and a resumed run is the same to the byte. "recompute": they go
    on under the new weights, their caches built anew. "keep": they go on with the caches they
    have."""
    take_window_share: float = 0.3
    """With "recompute" and "keep": of the groups under way, the share of the oldest among which
    who finishes first is taken first."""
    replay_experts: bool = False
    """The engine records which experts tokens went to, and the trainer sends them there again:
    what routers disagree on is then no difference between the two."""
    env_timeout_s: float | None = 600.0
    """What one call of an environment may take before its rollout counts as failed; None: all."""
    dynamic_sampling: bool = True
    """Drop groups that are all right or all wrong, and draw new prompts in their place."""
    max_refills: int = 2
    """How often a step may draw again before it goes on with what it has."""
    retire_pass_rate: float | None = 0.9
    """A prompt is not drawn again once that share of its rollouts was right; None keeps all."""
    max_tokens: int = 16_384
    """Tokens per training forward pass."""
    seed: int = 0
    save_every_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_prompts", "num_updates", "max_response_tokens",
                     "max_tokens", "save_every_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is at least 1")
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}; a relative advantage needs 2")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; allowed is above 0")
        if self.repetition_stop_tokens < 0:
            raise ValueError(
                f"repetition_stop_tokens is {self.repetition_stop_tokens}; allowed is 0 or more"
            )
        if self.retire_pass_rate is not None and not 0 < self.retire_pass_rate <= 1:
            raise ValueError(
                f"retire_pass_rate is {self.retire_pass_rate}; allowed is above 0 to 1, or None"
            )
        self.growth.check(self.max_response_tokens, self.loss)
        for name in ("max_refills", "max_staleness"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is 0 or more")
        if self.in_flight not in get_args(InFlight):
            allowed = ", ".join(get_args(InFlight))
            raise ValueError(f"in_flight is {self.in_flight!r}; allowed are {allowed}")
        if not 0 < self.take_window_share <= 1:
            raise ValueError(
                f"take_window_share is {self.take_window_share}; allowed is above 0 to 1"
            )
        if self.env_timeout_s is not None and not self.env_timeout_s > 0:
            raise ValueError(f"env_timeout_s is {self.env_timeout_s}; allowed is above 0, or None")
