"""How much better a rollout did than its group."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """A_i = (R_i - mean R) / std R over one group (arXiv 2506.13585, eq. 2); zeros if all equal."""
    if not rewards:
        return []
    mean, std = fmean(rewards), pstdev(rewards)
    if std < 1e-8:
        return [0.0] * len(rewards)
    return [(reward - mean) / std for reward in rewards]
