"""Policy losses: CISPO and the algorithms it is compared with, all through one formula.

With r = pi / pi_old per token, the unified objective (M1 report, arXiv 2506.13585, eq. 6-7) is
  sum_t sg( clip(r_t, 1 - eps_is_low, 1 + eps_is_high) ) * M_t * A_t * log pi(o_t)
  M_t = 0 where A_t > 0 and r_t > 1 + eps_high, or A_t < 0 and r_t < 1 - eps_low; else 1.
Clips are offsets from 1, as in the paper. Without the weight's clip the gradient is PPO's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

Normalisation = Literal["token", "sample"]


class PolicyLoss(Protocol):
    """What an update needs of an algorithm."""

    @property
    def normalisation(self) -> Normalisation:
        """ "token": every token of the batch counts the same; "sample": every sample does."""
        ...

    def token_weights(
        self, ratio: Float[Tensor, " M"], advantages: Float[Tensor, " M"]
    ) -> Float[Tensor, " M"]:
        """The factor of A log pi at each token, without gradient."""
        ...


def unified_weights(
    ratio: Float[Tensor, " M"],
    advantages: Float[Tensor, " M"],
    *,
    eps_is_low: float,
    eps_is_high: float,
    eps_low: float,
    eps_high: float,
) -> Float[Tensor, " M"]:
    """Clipped importance weight times mask; pass math.inf to switch a bound off."""
    weight = ratio.detach().clamp(1 - eps_is_low, 1 + eps_is_high)
    dropped = ((advantages > 0) & (ratio > 1 + eps_high)) | (
        (advantages < 0) & (ratio < 1 - eps_low)
    )
    return weight.masked_fill(dropped, 0.0)


def _check(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} is {getattr(config, name)!r}; allowed is 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class CISPO:
    """Clips importance weights, drops no token (eq. 4-5)."""

    eps_is_low: float = 1.0
    """1 means a lower bound of 0 on the weight, that is none: the report leaves it off."""
    eps_is_high: float = 4.0
    """Never published; ScaleRL (arXiv 2510.13786) found caps of 4, 5 and 8 equal."""
    normalisation: Normalisation = "token"

    def __post_init__(self) -> None:
        _check(self, "eps_is_low", "eps_is_high")

    def token_weights(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return unified_weights(
            ratio,
            advantages,
            eps_is_low=self.eps_is_low,
            eps_is_high=self.eps_is_high,
            eps_low=math.inf,
            eps_high=math.inf,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DAPO:
    """PPO's one-sided mask with a higher upper bound, mean over tokens (arXiv 2503.14476)."""

    eps_low: float = 0.2
    eps_high: float = 0.28
    normalisation: Normalisation = "token"

    def __post_init__(self) -> None:
        _check(self, "eps_low", "eps_high")

    def token_weights(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return _masked_ratio(ratio, advantages, self.eps_low, self.eps_high)


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPO:
    """PPO's symmetric mask, mean over samples (arXiv 2402.03300), without a KL term."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    normalisation: Normalisation = "sample"

    def __post_init__(self) -> None:
        _check(self, "eps_low", "eps_high")

    def token_weights(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return _masked_ratio(ratio, advantages, self.eps_low, self.eps_high)


@dataclass(frozen=True, kw_only=True, slots=True)
class REINFORCE:
    """The plain policy gradient: weight 1 everywhere, however stale the sample."""

    normalisation: Normalisation = "token"

    def token_weights(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return unified_weights(
            ratio, advantages, eps_is_low=0.0, eps_is_high=0.0, eps_low=math.inf, eps_high=math.inf
        )


def _masked_ratio(ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    return unified_weights(
        ratio,
        advantages,
        eps_is_low=math.inf,
        eps_is_high=math.inf,
        eps_low=eps_low,
        eps_high=eps_high,
    )


Loss = CISPO | DAPO | GRPO | REINFORCE


@dataclass(frozen=True)
class LossResult:
    loss: Tensor
    """A sum over this micro-batch's share of the mini-batch; micro-batches add up."""
    weights: Tensor
    """[M], without gradient."""
    ratio: Tensor
    """[M], without gradient."""


def policy_loss(
    config: PolicyLoss,
    logprobs: Float[Tensor, " M"],
    old_logprobs: Float[Tensor, " M"],
    advantages: Float[Tensor, " M"],
    sample_index: Int[Tensor, " M"],
    *,
    num_tokens: int,
    num_samples: int,
) -> LossResult:
    """Minus the objective over M tokens. `num_tokens` and `num_samples` are the mini-batch's."""
    ratio = torch.exp(logprobs.detach() - old_logprobs)
    weights = config.token_weights(ratio, advantages)
    terms = weights * advantages * logprobs
    if config.normalisation == "token":
        return LossResult(-terms.sum() / num_tokens, weights, ratio)
    count = int(sample_index.max()) + 1 if len(sample_index) else 0
    lengths = torch.bincount(sample_index, minlength=count).clamp(min=1)
    return LossResult(-(terms / lengths[sample_index]).sum() / num_samples, weights, ratio)
