"""Causal softmax attention over a paged past: prefill by blocks, decode over padded pages.

Prefill takes a block of queries and walks over the keys some pages at a time, with the statistics
of an online softmax, so that memory does not grow with the context. With peak m, sum l and output o
so far, the scores s of the next keys give
  m' = max(m, max s),  w = e^(s - m'),  l <- e^(m - m') l + sum w,  o <- e^(m - m') o + w V.
Nothing behind a sequence's length is read as a number: pages may hold NaN there.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Scores of one tile: as many as stay in a core's second-level cache.
TILE_ROWS = 1024
TILE_SCORES = 512 * 1024
# Tiles are padded to a multiple of this; the compiled softmax takes whole vectors.
TILE_MULTIPLE = 64
# Keys gathered at a time, and queries of the compiled kernel: a call takes a few hundredths of a
# second for each key/value head.
GATHER_TOKENS = 4096
COMPILED_ROWS = 16 * 1024


def paged_prefill_attention(
    q: Float[Tensor, "t H D"],
    keys: Float[Tensor, "P p G D"],
    values: Float[Tensor, "P p G D"],
    page_table: Int[Tensor, " n"],
    past: int,
) -> Float[Tensor, "t H D"]:
    """New tokens of one sequence attend to its `past` tokens and, causally, to themselves.

    The keys and values of the new tokens are in their pages already. Scale 1/sqrt(D), query head h
    reads key/value head h // (H / G). Scores, statistics and sums are fp32 (fp64 for fp64 inputs),
    weights have the dtype of `q`. Not differentiable.
    """
    # "medium" is torch's word for fp32 products that may round their inputs to bf16.
    rounds = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    if (q.dtype == torch.bfloat16 or rounds) and _has_tile_unit(q.device.type):
        attend, block_rows = _attend_compiled, COMPILED_ROWS
    else:
        attend, block_rows = _attend_tiles, TILE_ROWS
    block_tokens = max(1, block_rows * keys.shape[2] // q.shape[1])
    out = torch.empty_like(q)
    for start in range(0, len(q), block_tokens):
        stop = min(start + block_tokens, len(q))
        out[start:stop] = attend(q[start:stop], keys, values, page_table, past + start)
    return out


@cache
def _has_tile_unit(device: str) -> bool:
    """Whether there is a compiled kernel for bf16: on CPUs with AMX."""
    if device != "cpu":
        return False
    from openm1.kernels.cpu.tiles import tiles_available

    return tiles_available()


def _attend_compiled(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, past: int
) -> Tensor:
    """A block of consecutive queries, the first with `past` tokens before it."""
    from openm1.kernels.cpu.tile_attention import TileAttention

    attention = TileAttention(q.bfloat16(), keys.shape[2], past)
    total = past + len(q)
    for first in range(0, total, GATHER_TOKENS):
        stop = min(first + GATHER_TOKENS, total)
        width = -(-(stop - first) // TILE_MULTIPLE) * TILE_MULTIPLE
        k, v = (_gather(x, page_table, first, stop, width) for x in (keys, values))
        attention.add(k.bfloat16(), v.bfloat16(), first)
    return attention.result().to(q.dtype)


def _attend_tiles(q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, past: int) -> Tensor:
    """The same as products of tiles, with the softmax of a tile between them."""
    num_new, num_heads, dim = q.shape
    groups = keys.shape[2]
    shared, total = num_heads // groups, past + num_new
    rows = num_new * shared
    work = torch.promote_types(q.dtype, torch.float32)
    # The query heads of a group are rows of one product: row = token * shared + head.
    grouped = q.to(work).unflatten(1, (groups, shared)).transpose(0, 1).reshape(groups, rows, dim)
    seen = torch.arange(past + 1, total + 1, device=q.device).repeat_interleave(shared)
    sums = grouped.new_zeros(groups, rows, dim)
    peaks = grouped.new_full((groups, rows), -torch.inf)
    totals, fades = torch.zeros_like(peaks), torch.empty_like(peaks)
    tile_tokens = min(GATHER_TOKENS, TILE_SCORES // rows) // TILE_MULTIPLE * TILE_MULTIPLE
    scores = grouped.new_empty(rows * tile_tokens)
    weights = scores if q.dtype == work else scores.new_empty(len(scores), dtype=q.dtype)
    for first in range(0, total, tile_tokens):
        stop = min(first + tile_tokens, total)
        width = -(-(stop - first) // TILE_MULTIPLE) * TILE_MULTIPLE
        k, v = (_gather(x, page_table, first, stop, width) for x in (keys, values))
        limits = (seen - first).clamp_(max=width) if stop > past else None
        tile, weight = (x[: rows * width].view(rows, width) for x in (scores, weights))
        for g in range(groups):
            torch.mm(grouped[g], k[:, g].to(work).T, out=tile)
            soften(tile, weight, limits, 1 / math.sqrt(dim), peaks[g], totals[g], fades[g])
            sums[g].mul_(fades[g, :, None]).add_(weight @ v[:, g])
    sums /= totals[..., None]
    return sums.to(q.dtype).unflatten(1, (num_new, shared)).transpose(0, 1).flatten(1, 2)


def _gather(table: Tensor, page_ids: Tensor, first: int, stop: int, width: int = 0) -> Tensor:
    """Tokens `first` to `stop` of the pages in a row, [tokens, G, D], with zeros up to `width`."""
    page_tokens = table.shape[1]
    skip = first // page_tokens
    ids = page_ids[skip : -(-stop // page_tokens)]
    begin, count = first - skip * page_tokens, stop - first
    out = table.new_empty(max(len(ids) * page_tokens, begin + width), *table.shape[2:])
    pages = out[: len(ids) * page_tokens].unflatten(0, (-1, page_tokens))
    torch.index_select(table, 0, ids, out=pages)
    out[begin + count :].zero_()
    return out[begin : begin + max(count, width)]


def soften(
    scores: Float[Tensor, "rows width"],
    weights: Float[Tensor, "rows width"],
    limits: Int[Tensor, " rows"] | None,
    scale: float,
    peaks: Float[Tensor, " rows"],
    totals: Float[Tensor, " rows"],
    fades: Float[Tensor, " rows"],
) -> None:
    """Writes the weights of a tile of scores and updates the rows' statistics.

    `weights` may be `scores` itself. Scores from `limits` on count for nothing; every row must have
    seen a score by the end of its first tile. What was summed up before is to be multiplied by
    `fades`, which is written. Peaks are in units of log 2.
    """
    scale /= math.log(2)
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        from openm1.kernels.cpu.softmax import soften_tile

        soften_tile(scores, weights, limits, scale, peaks, totals, fades)
        return
    wide = scores * scale
    if limits is not None:
        hidden = torch.arange(scores.shape[1], device=scores.device) >= limits[:, None]
        wide.masked_fill_(hidden, -torch.inf)
    peak = torch.maximum(peaks, wide.amax(-1))
    weights.copy_(wide.sub_(peak[:, None]).exp2_())
    torch.exp2(peaks - peak, out=fades)
    totals.mul_(fades).add_(weights.sum(-1, dtype=totals.dtype))
    peaks.copy_(peak)


def paged_decode_attention(
    q: Float[Tensor, "S H D"],
    keys: Float[Tensor, "P p G D"],
    values: Float[Tensor, "P p G D"],
    page_tables: Int[Tensor, "S n"],
    totals: Int[Tensor, " S"],
) -> Float[Tensor, "S H D"]:
    """One query per sequence over its `totals` tokens, the newest included, in fp32 throughout.

    `page_tables` are padded with any page.
    """
    groups = keys.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    k, v = (x[page_tables].flatten(1, 2).to(work) for x in (keys, values))  # [S, L, G, D]
    hidden = torch.arange(k.shape[1], device=q.device) >= totals[:, None]  # [S, L]
    # A weight of 0 would not do: 0 times NaN is NaN.
    v = v.masked_fill(hidden[..., None, None], 0.0)
    grouped = q.to(work).unflatten(1, (groups, -1))  # [S, G, H/G, D]
    scores = torch.einsum("sgrd,slgd->sgrl", grouped, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(hidden[:, None, None, :], -torch.inf).softmax(-1)
    return torch.einsum("sgrl,slgd->sgrd", weights, v).flatten(1, 2).to(q.dtype)
