"""From logits to tokens. A row's token depends on its logits, its seed and its place alone."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

# Colder than this is greedy in all but name, and logits divided by less could overflow.
MIN_TEMPERATURE = 1e-6


def uniforms(seeds: list[int], steps: list[int]) -> Float[Tensor, " S"]:
    """One number in [0, 1) per row, fp64, from (seed, step) alone.

    A counter-based generator: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) mixed twice.
    """
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
    step = np.array(steps, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = _mix(_mix(seed) + (step + np.uint64(1)) * _GOLDEN)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def child_seed(seed: int, index: int) -> int:
    """An independent seed for the index-th of several samples."""
    start = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    with np.errstate(over="ignore"):
        return int(_mix(_mix(start) ^ np.uint64(index))[0])


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def sample(
    logits: Float[Tensor, "S V"],
    temperature: Float[Tensor, " S"],
    top_k: Int[Tensor, " S"],
    top_p: Float[Tensor, " S"],
    draws: Float[Tensor, " S"],
) -> Int[Tensor, " S"]:
    """One token per row, by inverting its cumulative distribution at `draws`.

    Temperature 0 is argmax, top_k 0 and top_p 1 keep everything.
    """
    greedy = logits.argmax(-1)
    if bool((temperature == 0).all()):
        return greedy
    scaled = logits.double() / temperature.clamp(min=MIN_TEMPERATURE)[:, None]
    if bool((top_k > 0).any()) or bool((top_p < 1).any()):
        scaled = _keep_top(scaled, top_k, top_p)
    cumulative = scaled.softmax(-1).cumsum(-1)
    # The last entry may fall short of 1 by rounding, so the draw is scaled to it.
    targets = draws.to(logits.device)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    drawn = drawn.clamp(max=logits.shape[-1] - 1)
    return torch.where(temperature == 0, greedy, drawn)


def _keep_top(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    ordered, index = torch.sort(scaled, stable=True, dim=-1, descending=True)
    ranks = torch.arange(scaled.shape[-1], device=scaled.device)
    limit = torch.where(top_k > 0, top_k, scaled.shape[-1])
    ordered = ordered.masked_fill(ranks >= limit[:, None], -torch.inf)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    # Rounding may take the sum of the likeliest to 1: a row that keeps all must not lose the rest.
    reach = top_p.masked_fill(top_p == 1, torch.inf)
    ordered = ordered.masked_fill(before >= reach[:, None], -torch.inf)
    return torch.empty_like(scaled).scatter(1, index, ordered)


def token_logprobs(
    logits: Float[Tensor, "S V"], temperature: Float[Tensor, " S"], tokens: Int[Tensor, " S"]
) -> Float[Tensor, " S"]:
    """Log-probability of each row's token under softmax(logits / temperature); greedy rows at 1."""
    scale = temperature.clamp(min=MIN_TEMPERATURE).masked_fill(temperature == 0, 1.0)
    return (logits / scale[:, None]).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
