"""What is compared: losses with the number of updates that a batch is split into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openm1.rl.losses import CISPO, DAPO, GRPO, REINFORCE, Aggregation, PolicyLoss, Praise


@dataclass(frozen=True, kw_only=True, slots=True)
class SymmetricMask:
    """DAPO's bounds on both signs: a token outside is dropped whatever its advantage. A control:
    it drops more tokens than DAPO, and none of its drops prefers a sign."""

    low: float = 0.8
    high: float = 1.28
    aggregation: Aggregation = "token"

    @property
    def weight_interval(self) -> tuple[float, float]:
        return 0.0, self.high

    def token_weights(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return torch.where((ratio < self.low) | (ratio > self.high), 0.0, ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    about: str
    loss: PolicyLoss
    num_updates: int = 16


ARMS: dict[str, Arm] = {
    "cispo": Arm(about="CISPO, weight in [0, 5]", loss=CISPO()),
    "dapo": Arm(about="DAPO, 0.2 / 0.28", loss=DAPO()),
    "dapo-4": Arm(about="DAPO with eps_high 4", loss=DAPO(eps_high=4.0)),
    "grpo": Arm(about="GRPO, 0.2 / 0.2, sample mean", loss=GRPO()),
    "gradient": Arm(about="plain policy gradient, weight 1", loss=REINFORCE()),
    "symmetric": Arm(about="both signs dropped outside [0.8, 1.28]", loss=SymmetricMask()),
    "praise": Arm(about="praise: CISPO with negative advantages x 0.25", loss=Praise()),
    "praise-0": Arm(about="praise without any blame", loss=Praise(blame=0.0)),
    "cispo-2": Arm(about="CISPO, 2 updates a batch", loss=CISPO(), num_updates=2),
    "dapo-2": Arm(about="DAPO, 2 updates a batch", loss=DAPO(), num_updates=2),
    "cispo-1": Arm(
        about="CISPO, 1 update a batch: the plain gradient", loss=CISPO(), num_updates=1
    ),
}

GRID: dict[str, dict[int, tuple[float, ...]]] = {
    "recheck": {
        16: (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3),
        2: (8e-4, 1.6e-3, 3.2e-3),
        1: (8e-4, 1.6e-3, 3.2e-3),
    },
    "ladder": {16: (1e-4, 2e-4, 4e-4, 8e-4)},
    "chain": {16: (5e-5, 1e-4, 2e-4, 4e-4)},
}
"""Learning rates that arms are tuned on, by task and updates a batch."""

RATES: dict[str, dict[str, float]] = {
    "recheck": {
        "cispo": 8e-4,
        "dapo": 4e-4,
        "praise": 8e-4,
        "dapo-4": 8e-4,
        "dapo-2": 1.6e-3,
        "grpo": 4e-4,
        "symmetric": 8e-4,
        "gradient": 4e-4,
        "cispo-2": 3.2e-3,
        "cispo-1": 3.2e-3,
    },
    "ladder": {
        "cispo": 4e-4,
        "dapo": 1e-4,
        "praise": 4e-4,
        "dapo-4": 4e-4,
        "grpo": 1e-4,
        "symmetric": 4e-4,
        "gradient": 2e-4,
    },
    "chain": {"cispo": 2e-4, "dapo": 2e-4, "grpo": 2e-4, "praise": 2e-4},
}
"""Each arm's best learning rate on the tuning seeds (`--tune`)."""
