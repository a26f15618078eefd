"""The response window: when it grows, and what is lowered late in each window.

M1 trained at 40K tokens, then 48K, 56K, 64K, 72K and 80K. It went on when the perplexity of the
generated replies had converged and the 99th percentile of their lengths came near the window, and
lowered the gradient clip and eps_is_high late in each window, where long wrong answers pile up
(arXiv 2506.13585, section 5). It gave no thresholds: those below are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from openm1.rl.losses import CISPO, Loss, Unified


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowGrowth:
    """When the window grows. Without later windows it stays what it is."""

    later_tokens: tuple[int, ...] = ()
    """The windows after the first; M1's are 48, 56, 64, 72 and 80 thousand tokens after 40."""
    near_share: float = 0.9
    """The 99th percentile of lengths is near the window from this share of it on."""
    horizon_steps: int = 10
    """Steps over which perplexity is watched, and the least that a window lasts."""
    perplexity_tolerance: float = 0.02
    """Converged: the means of the horizon's two halves differ by at most this share."""
    late_max_grad_norm: float | None = None
    """The gradient clip from when lengths first come near the window until it grows. None, here and
    below: as at other times."""
    late_eps_is_high: float | None = None

    def __post_init__(self) -> None:
        def need(good: bool, name: str, allowed: str) -> None:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {allowed}")

        need(0 < self.near_share <= 1, "near_share", "above 0 to 1")
        need(self.horizon_steps >= 2, "horizon_steps", "2 or more")
        need(self.perplexity_tolerance >= 0, "perplexity_tolerance", "0 or more")
        clip, eps = self.late_max_grad_norm, self.late_eps_is_high
        need(clip is None or clip > 0, "late_max_grad_norm", "above 0, or None")
        need(eps is None or eps >= 0, "late_eps_is_high", "0 or more, or None")

    def check(self, first_tokens: int, loss: Loss) -> None:
        """Raises ValueError unless windows grow and the loss has what is to be lowered."""
        windows = (first_tokens, *self.later_tokens)
        if any(after <= before for before, after in pairwise(windows)):
            raise ValueError(f"windows are {windows}; allowed are ones that grow")
        if self.late_eps_is_high is None:
            return
        if not isinstance(loss, CISPO | Unified):
            raise ValueError(
                f"late_eps_is_high is {self.late_eps_is_high} with {type(loss).__name__}, which "
                "clips no weights; allowed is None, or a loss of CISPO and Unified"
            )
        if self.late_eps_is_high > loss.eps_is_high:
            raise ValueError(
                f"late_eps_is_high is {self.late_eps_is_high}; allowed is at most the loss's "
                f"eps_is_high of {loss.eps_is_high}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowState:
    """Where a run stands among its windows; part of a checkpoint."""

    index: int = 0
    """0 is the first window."""
    late: bool = False
    """Whether lengths have come near this window."""
    perplexities: tuple[float, ...] = ()
    """Of the last steps in this window, oldest first, the horizon's number at most."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> WindowState:
        return cls(**{**state, "perplexities": tuple(state["perplexities"])})


def window_tokens(growth: WindowGrowth, state: WindowState, first_tokens: int) -> int:
    return (first_tokens, *growth.later_tokens)[state.index]


def advance(
    growth: WindowGrowth,
    state: WindowState,
    *,
    perplexity: float,
    length_p99_tokens: float,
    window_tokens: int,
) -> WindowState:
    """The state after a step; a new window starts with nothing remembered of the one before."""
    near = length_p99_tokens >= growth.near_share * window_tokens
    seen = (*state.perplexities, perplexity)[-growth.horizon_steps :]
    if near and state.index < len(growth.later_tokens) and _converged(growth, seen):
        return WindowState(index=state.index + 1)
    return replace(state, late=state.late or near, perplexities=seen)


def _converged(growth: WindowGrowth, perplexities: tuple[float, ...]) -> bool:
    if len(perplexities) < growth.horizon_steps:
        return False
    half = growth.horizon_steps // 2
    before, after = fmean(perplexities[:half]), fmean(perplexities[-half:])
    return abs(after - before) <= growth.perplexity_tolerance * before


def late_loss(growth: WindowGrowth, state: WindowState, loss: Loss) -> Loss:
    """The loss of the next step: with a lower eps_is_high late in a window, if one is given."""
    if state.late and growth.late_eps_is_high is not None:
        assert isinstance(loss, CISPO | Unified), "WindowGrowth.check was not called"
        return replace(loss, eps_is_high=growth.late_eps_is_high)
    return loss


def late_grad_norm(growth: WindowGrowth, state: WindowState, max_grad_norm: float) -> float:
    """The gradient clip of the next step."""
    lower = growth.late_max_grad_norm
    return min(lower, max_grad_norm) if state.late and lower is not None else max_grad_norm
