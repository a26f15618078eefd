"""Policy losses: CISPO and the algorithms it is compared with, all through one formula.

With r = pi / pi_anchor per token, the unified objective (M1 report, arXiv 2506.13585, eq. 6-7) is
  sum_t s_t * sg( clip(r_t, 1 - eps_is_low, 1 + eps_is_high) ) * M_t * A_t * log pi(o_t)
  M_t = 0 where A_t > 0 and r_t > 1 + eps_high, or A_t < 0 and r_t < 1 - eps_low; else 1.
Clips are offsets from 1, as in the paper. Without the weight's clip the gradient is PPO's. s_t is
the share of a token in the mean over the batch, which the aggregation decides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Aggregation = Literal["token", "sample", "prompt", "combined"]
"""What counts the same in the mean: "token": every token of the mini-batch; "sample": every
rollout, each a mean over its tokens; "prompt": every prompt, each a mean over the tokens of its
rollouts, which is eq. 4 to the letter; "combined": half "sample", half "token". The report
(section 5) combines the two against long wrong answers without giving a formula; the equal halves
are ours."""

Anchor = Literal["old", "sampler"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioAnchor:
    """Which probabilities stand below the ratio."""

    at: Anchor = "sampler"
    """"sampler": as sampled; the ratio then holds the mismatch between sampler and trainer too.
    "old": recomputed by the trainer before the first update; the ratio is then exactly 1 there."""
    mismatch_cap: float | None = None
    """With "old", multiplies every weight by min(pi_old / pi_sampler, cap), which corrects for the
    mismatch that this anchor leaves out (truncated importance sampling). None leaves it out."""

    def __post_init__(self) -> None:
        if self.at not in get_args(Anchor):
            raise ValueError(f"anchor is {self.at!r}; allowed are {', '.join(get_args(Anchor))}")
        if self.mismatch_cap is None:
            return
        if self.at == "sampler":
            raise ValueError(
                f"mismatch_cap is {self.mismatch_cap} with anchor 'sampler', whose ratio corrects "
                "for the mismatch already; allowed is None, or anchor 'old'"
            )
        if not self.mismatch_cap > 0:
            raise ValueError(f"mismatch_cap is {self.mismatch_cap}; allowed is above 0, or None")


class PolicyLoss(Protocol):
    """What an update needs of an algorithm."""

    @property
    def aggregation(self) -> Aggregation: ...

    @property
    def weight_interval(self) -> tuple[float, float]:
        """The least and the greatest weight that a token which is not dropped can have."""
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


def _check(config: PolicyLoss, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} is {getattr(config, name)!r}; allowed is 0 or more")
    if config.aggregation not in get_args(Aggregation):
        allowed = ", ".join(get_args(Aggregation))
        raise ValueError(f"aggregation is {config.aggregation!r}; allowed are {allowed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Unified:
    """Clip and mask together, each of the four bounds off unless set (eq. 6-7)."""

    eps_is_low: float = math.inf
    eps_is_high: float = math.inf
    eps_low: float = math.inf
    eps_high: float = math.inf
    aggregation: Aggregation = "token"

    def __post_init__(self) -> None:
        _check(self, "eps_is_low", "eps_is_high", "eps_low", "eps_high")

    @property
    def weight_interval(self) -> tuple[float, float]:
        return _interval(self.eps_is_low, self.eps_is_high)

    def token_weights(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return unified_weights(
            ratio,
            advantages,
            eps_is_low=self.eps_is_low,
            eps_is_high=self.eps_is_high,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CISPO:
    """Clips importance weights, drops no token (eq. 4-5)."""

    eps_is_low: float = 1.0
    """1 means a lower bound of 0 on the weight, that is none: the report leaves it off."""
    eps_is_high: float = 4.0
    """Never published; ScaleRL (arXiv 2510.13786) found caps of 4, 5 and 8 equal."""
    aggregation: Aggregation = "token"

    def __post_init__(self) -> None:
        _check(self, "eps_is_low", "eps_is_high")

    @property
    def weight_interval(self) -> tuple[float, float]:
        return _interval(self.eps_is_low, self.eps_is_high)

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
    aggregation: Aggregation = "token"

    def __post_init__(self) -> None:
        _check(self, "eps_low", "eps_high")

    @property
    def weight_interval(self) -> tuple[float, float]:
        return _interval(math.inf, math.inf)

    def token_weights(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return _masked_ratio(ratio, advantages, self.eps_low, self.eps_high)


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPO:
    """PPO's symmetric mask, mean over samples (arXiv 2402.03300), without a KL term."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    aggregation: Aggregation = "sample"

    def __post_init__(self) -> None:
        _check(self, "eps_low", "eps_high")

    @property
    def weight_interval(self) -> tuple[float, float]:
        return _interval(math.inf, math.inf)

    def token_weights(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return _masked_ratio(ratio, advantages, self.eps_low, self.eps_high)


@dataclass(frozen=True, kw_only=True, slots=True)
class PPO:
    """The clipped policy term of PPO, one eps for both sides (arXiv 1707.06347, eq. 7).

    The policy term alone: advantages are the caller's, and there is no value loss.
    """

    eps: float = 0.2
    aggregation: Aggregation = "token"

    def __post_init__(self) -> None:
        _check(self, "eps")

    @property
    def weight_interval(self) -> tuple[float, float]:
        return _interval(math.inf, math.inf)

    def token_weights(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return _masked_ratio(ratio, advantages, self.eps, self.eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class REINFORCE:
    """The plain policy gradient: weight 1 everywhere, however stale the sample."""

    aggregation: Aggregation = "token"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def weight_interval(self) -> tuple[float, float]:
        return _interval(0.0, 0.0)

    def token_weights(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return torch.ones_like(ratio)


def praise_weights(
    ratio: Float[Tensor, " M"],
    advantages: Float[Tensor, " M"],
    *,
    eps_is_high: float,
    blame: float,
) -> Float[Tensor, " M"]:
    """The ratio up to a cap, times `blame` where the advantage is negative."""
    weight = ratio.detach().clamp(max=1 + eps_is_high)
    return torch.where(advantages < 0, blame * weight, weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class Praise:
    """CISPO in which replies below their group's mean count for less than those above it.

    Ours. A wrong reply blames all of its tokens, most of which were right: at a high learning rate
    that is what undoes what the model could do (docs/cispo.md). Rare tokens keep growing, since
    better replies have more of those that help. Without any blame, habits that are wrong and
    frequent stay. Near to it: TOPR (arXiv 2503.14286), whose weights are 1 above the mean and at
    most 1 below.
    """

    eps_is_high: float = 4.0
    blame: float = 0.25
    """The factor on negative advantages, 0 to 1; 1 is CISPO."""
    aggregation: Aggregation = "token"

    def __post_init__(self) -> None:
        _check(self, "eps_is_high", "blame")
        if self.blame > 1:
            raise ValueError(f"blame is {self.blame}; allowed is 0 to 1")

    @property
    def weight_interval(self) -> tuple[float, float]:
        return _interval(math.inf, self.eps_is_high)

    def token_weights(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return praise_weights(ratio, advantages, eps_is_high=self.eps_is_high, blame=self.blame)


def _interval(eps_is_low: float, eps_is_high: float) -> tuple[float, float]:
    """A ratio is never negative, so neither is a weight."""
    return max(0.0, 1 - eps_is_low), 1 + eps_is_high


def _masked_ratio(ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    return unified_weights(
        ratio,
        advantages,
        eps_is_low=math.inf,
        eps_is_high=math.inf,
        eps_low=eps_low,
        eps_high=eps_high,
    )


Loss = CISPO | DAPO | GRPO | PPO | Praise | REINFORCE | Unified


def sample_shares(
    aggregation: Aggregation, num_tokens: Sequence[int], prompts: Sequence[int]
) -> list[float]:
    """For each sample of a mini-batch, the share that each one of its tokens has in the mean.

    `num_tokens` are the samples' loss tokens; equal `prompts` mark samples of one prompt.
    """
    assert all(num_tokens), "a sample without a token to learn from"
    if aggregation == "token":
        return [1 / sum(num_tokens)] * len(num_tokens)
    if aggregation == "sample":
        return [1 / len(num_tokens) / count for count in num_tokens]
    if aggregation == "prompt":
        totals: Counter[int] = Counter()
        for prompt, count in zip(prompts, num_tokens, strict=True):
            totals[prompt] += count
        return [1 / len(totals) / totals[prompt] for prompt in prompts]
    by_sample = sample_shares("sample", num_tokens, prompts)
    by_token = sample_shares("token", num_tokens, prompts)
    return [(a + b) / 2 for a, b in zip(by_sample, by_token, strict=True)]


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
    shares: Float[Tensor, " M"],
    mismatch: Float[Tensor, " M"] | None = None,
) -> LossResult:
    """Minus the objective over M tokens.

    `shares` are `sample_shares` at each token; `mismatch` is the capped factor of `RatioAnchor`.
    """
    ratio = torch.exp(logprobs.detach() - old_logprobs)
    weights = config.token_weights(ratio, advantages)
    scaled = shares * advantages if mismatch is None else shares * advantages * mismatch
    return LossResult(-(scaled * weights * logprobs).sum(), weights, ratio)
