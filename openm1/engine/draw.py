"""Drawing tokens from rows of logits: plainly, and from what top-k, top-p and min-p keep.

Nothing a row gets depends on the rows beside it, down to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

# Colder than this is greedy in all but name, and logits divided by less could overflow.
MIN_TEMPERATURE = 1e-6
# Logits worked on at once. On a CPU they stay in its cache, and torch never splits a sum of so few
# over its threads, which would make a row's last bit depend on the rows beside it. Elsewhere this
# bounds the memory.
CPU_BLOCK_SIZE = 2**15
BLOCK_SIZE = 2**24

PlainSampler = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""The signature of `sample_plain`, which a fused kernel may replace."""


class BadLogits(RuntimeError):
    """Rows with NaN, with infinity, or with no finite logit at all. No token was chosen."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(
            f"logits of rows {rows} are NaN, infinite or all minus infinity: the weights are not "
            "finite, or every token is excluded"
        )
        self.rows = rows


def sample_plain(
    logits: Float[Tensor, "S V"],
    temperature: Float[Tensor, " S"],
    draws: Float[Tensor, " S"],
    given: Int[Tensor, " S"],
) -> tuple[Int[Tensor, " S"], Float[Tensor, " S"]]:
    """(tokens, their log-probabilities in fp64): greedy where the temperature is 0, else drawn from
    softmax(logits / temperature). Where `given` is not -1 that token is scored instead.

    A draw inverts the cumulative distribution in fp64; greedy takes the lowest id among equals, and
    is scored at temperature 1. Raises BadLogits.
    """
    best, best_tokens = best_tokens_of(logits)
    tokens = torch.where(given >= 0, given, best_tokens)
    logprobs = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    scale = temperature.clamp(min=MIN_TEMPERATURE).masked_fill(temperature == 0, 1.0)[:, None]
    drawn = (given < 0) & (temperature > 0)
    for rows, part in row_blocks(logits, drawn.nonzero()[:, 0].tolist()):
        cumulative = _weights(part, best[rows], scale[rows]).cumsum_(-1)
        tokens[rows] = _invert(cumulative, draws[rows])
        logprobs[rows] = -cumulative[:, -1].log()
    for rows, part in row_blocks(logits, (~drawn).nonzero()[:, 0].tolist()):
        # Only the sum is wanted of these, and for that the logits' own precision is enough.
        weights = (part - best[rows]).div_(scale[rows].to(part.dtype)).exp_()
        logprobs[rows] = -weights.sum(-1).double().log()
    above_best = logits.gather(1, tokens[:, None]).double() - best
    return tokens, logprobs + (above_best / scale)[:, 0]


def sample_kept(
    logits: Float[Tensor, "S V"],
    temperature: Float[Tensor, " S"],
    draws: Float[Tensor, " S"],
    *,
    top_k: Int[Tensor, " S"],
    top_p: Float[Tensor, " S"],
    min_p: Float[Tensor, " S"],
) -> Int[Tensor, " S"]:
    """Tokens drawn from what is kept: of the top_k likeliest those that first reach top_p of their
    probability, less what is under min_p times the likeliest. Greedy rows take the best.

    Raises BadLogits. Meant for a block of rows: it holds several fp64 copies of `logits`.
    """
    best, best_tokens = best_tokens_of(logits)
    if bool((temperature == 0).all()):
        return best_tokens
    weights = _weights(logits, best, temperature.clamp(min=MIN_TEMPERATURE)[:, None])
    _cut(weights, top_k[:, None], top_p[:, None])
    # The likeliest token weighs 1, and every cut keeps it.
    weights.masked_fill_(weights < min_p[:, None], 0)
    return torch.where(temperature == 0, best_tokens, _invert(weights.cumsum_(-1), draws))


def _cut(weights: Tensor, top_k: Tensor, top_p: Tensor) -> None:
    """Sets to 0 what is beyond the top_k likeliest, and of those beyond the first to reach top_p.

    Among equals those of lower id stay.
    """
    size = weights.shape[-1]
    limit = torch.where(top_k > 0, top_k.clamp(max=size), size)
    if bool(((limit == size) & (top_p == 1)).all()):
        return
    ordered = _descending(weights)
    cumulative = ordered.cumsum(-1)
    # Rounding may take the sum of the likeliest to all: what keeps all must not lose the rest.
    target = torch.where(top_p < 1, top_p * cumulative.gather(1, limit - 1), torch.inf)
    keep = torch.minimum((cumulative < target).sum(-1, keepdim=True) + 1, limit)
    last = ordered.gather(1, keep - 1)
    weights.masked_fill_(weights < last, 0)
    surplus = (weights >= last).sum(-1, keepdim=True) - keep
    if bool((surplus > 0).any()):
        equal = weights == last
        rank_from_behind = equal.flip(-1).cumsum(-1).flip(-1)
        weights.masked_fill_(equal & (rank_from_behind <= surplus), 0)


def best_tokens_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(the highest logit of each row [S, 1], its lowest id [S]); raises BadLogits."""
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        # numpy's is several times as fast as torch's; it too stops at NaN.
        tokens = torch.from_numpy(logits.detach().numpy().argmax(-1))
    else:
        tokens = logits.argmax(-1)
    best = logits.gather(1, tokens[:, None])
    bad = ~best.isfinite()
    if bool(bad.any()):
        raise BadLogits(bad.nonzero()[:, 0].tolist())
    return best, tokens


def _descending(weights: Tensor) -> Tensor:
    if weights.device.type == "cpu":
        # numpy sorts values alone, many times as fast as torch, which sorts their places along.
        return torch.from_numpy(np.sort(weights.numpy(), axis=-1)).flip(-1)
    return weights.sort(dim=-1, descending=True).values


def _weights(logits: Tensor, best: Tensor, scale: Tensor) -> Tensor:
    """exp((logits - best) / scale) in fp64: the likeliest token weighs exactly 1."""
    return (logits - best.double()).div_(scale).exp_()


def _invert(cumulative: Tensor, draws: Tensor) -> Tensor:
    """The first entry of each row whose cumulative weight exceeds its draw's share of the whole."""
    targets = draws[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def row_blocks(logits: Tensor, rows: list[int]) -> Iterator[tuple[list[int], Tensor]]:
    """`rows` of `logits` in blocks, as (their numbers, their logits or a view of them)."""
    size = CPU_BLOCK_SIZE if logits.device.type == "cpu" else BLOCK_SIZE
    step = max(1, size // logits.shape[-1])
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        if block[-1] - block[0] == len(block) - 1:
            yield block, logits[block[0] : block[-1] + 1]
        else:
            yield block, logits[block]
