"""What a batch of updates did to the rare token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class RareTokens:
    """Weights of the marks that check, summed over the updates of a batch, by advantage's sign."""

    up: float = 0.0
    """Weight times advantage where it is positive."""
    down: float = 0.0
    up_whole: float = 0.0
    """The same with every weight the plain ratio: what a loss without clip or mask would have."""
    down_whole: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, ratio: Tensor, weights: Tensor, advantages: Tensor, rare: Tensor) -> None:
        """`rare` [M] bool says which of the tokens are rare ones."""
        ratio, weights, advantages = ratio[rare], weights[rare], advantages[rare]
        good = advantages > 0
        self.up += float((weights * advantages)[good].sum())
        self.down -= float((weights * advantages)[~good].sum())
        self.up_whole += float((ratio * advantages)[good].sum())
        self.down_whole -= float((ratio * advantages)[~good].sum())
        for name, which in (("up", good), ("down", ~good)):
            self._count(name, int(which.sum()))
            self._count(f"{name}_dropped", int((weights[which] == 0).sum()))

    def _count(self, name: str, number: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    @property
    def net(self) -> float:
        """What is left upwards of all weight: 1 if nothing pushes down, 0 if both sides cancel."""
        total = self.up + self.down
        return (self.up - self.down) / total if total else 0.0

    def metrics(self) -> dict[str, float]:
        whole = self.up_whole + self.down_whole
        return {
            "net": self.net,
            "up": self.up,
            "down": self.down,
            "net_whole": (self.up_whole - self.down_whole) / whole if whole else 0.0,
            "up_dropped": self._share("up"),
            "down_dropped": self._share("down"),
        }

    def _share(self, name: str) -> float:
        return self.counts.get(f"{name}_dropped", 0) / max(self.counts.get(name, 0), 1)


def group_advantages(reward: Tensor, group: Tensor) -> Tensor:
    """[R] -> [R]: `openm1.rl.advantage.group_advantages` on tensors, zeros where all are equal."""
    size = int((group == group[0]).sum())
    by_group = reward.double().view(-1, size)
    deviation = by_group.std(1, keepdim=True, correction=0)
    centred = by_group - by_group.mean(1, keepdim=True)
    return torch.where(deviation < 1e-8, 0.0, centred / deviation.clamp(min=1e-8)).flatten().float()
