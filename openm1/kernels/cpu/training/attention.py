"""Causal softmax attention a few queries at a time, over keys and values that stay in the cache.

Scores are never kept: for the gradient they are computed again from q, k and each query's
log-sum-exp. With p the weights, o the output and g its gradient:
  dv_j = sum_i p_ij g_i;  ds_ij = p_ij (g_i . v_j - g_i . o_i);  dq_i = sum_j ds_ij k_j / sqrt(D)
Source: FlashAttention-2 (arXiv 2307.08691), section 3.1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from openm1.kernels.cpu import softmax, vector
from openm1.kernels.cpu.blocks import STEP, address_of, copy_row
from openm1.kernels.cpu.compile import kernel, piece
from openm1.kernels.cpu.training.sharing import arrays, over_sequences, trains_on_cpu
from openm1.kernels.cpu.vector import FLOAT32, LANES
from openm1.kernels.packing import PackedLayout

QUERIES = 8
"""Taken at a time: so many rows of scores are between two products."""
MAX_TOKENS = 1024
"""In longer sequences what is gone through again and again leaves the cache."""


def fits(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> bool:
    """Whether `causal_attention` is for these: short, fp32, on the CPU, a gradient wanted."""
    small = q.shape[-1] % LANES == 0 and max(layout.lengths) <= MAX_TOKENS
    return small and trains_on_cpu(q, k, v)


def causal_attention(
    q: Float[Tensor, "T H D"],
    k: Float[Tensor, "T G D"],
    v: Float[Tensor, "T G D"],
    layout: PackedLayout,
) -> Float[Tensor, "T H D"]:
    """Each packed sequence attends to itself, scale 1/sqrt(D); D is a multiple of LANES."""
    return _Attention.apply(q, k, v, layout)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:2])
        ctx.bounds = np.array([*layout.starts, layout.num_tokens])
        num_units = layout.num_sequences * k.shape[1]
        over_sequences(_forward, num_units, ctx.bounds, *arrays(q, k, v, out, sums))
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        results = [torch.empty_like(x) for x in (q, k, v)]
        given = arrays(q, k, v, out, sums, grads[0].contiguous(), *results)
        over_sequences(_backward, (len(ctx.bounds) - 1) * k.shape[1], ctx.bounds, *given)
        return *results, None


_score_keys = vector.make_weighted_sum(QUERIES, 2, FLOAT32, adds=False)
_sum_rows = vector.make_weighted_sum(QUERIES, 1, FLOAT32, adds=False, whole=True)
_add_rows = vector.make_weighted_sum(QUERIES, 1, FLOAT32, whole=True)
WIDTH = np.int64(LANES)


@piece
def multiply_scores(x, turned, size, out):
    """out[i, j] = x[i] . row j, for the first `size` rows as columns of `turned`."""
    x_row, turned_row, out_row = 4 * x.shape[1], 4 * turned.shape[1], 4 * out.shape[1]
    for j in range(0, 4 * size, 8 * LANES):
        to = address_of(out) + j
        b, count = address_of(turned) + j, np.int64(x.shape[1])
        _score_keys(address_of(x), x_row, STEP, b, turned_row, count, to, out_row, 2 * WIDTH)


@piece
def sum_weighted(weights, rows, row_bytes, count, out):
    """out[i] = sum_j weights[i, j] row j; `rows` is an address."""
    weights_row, out_row = 4 * weights.shape[1], 4 * out.shape[1]
    for d in range(0, 4 * out.shape[1], 4 * LANES):
        p, v, to = address_of(weights), rows + d, address_of(out) + d
        _sum_rows(p, weights_row, STEP, v, row_bytes, count, to, out_row, WIDTH)


@piece
def add_turned(weights, x, count, out):
    """out[j] += sum_i weights[i, j] x[i]."""
    weights_row, x_row, size = 4 * weights.shape[1], 4 * x.shape[1], np.int64(QUERIES)
    for j in range(0, count, QUERIES):
        at = address_of(weights) + 4 * j
        for d in range(0, x_row, 4 * LANES):
            v, to = address_of(x) + d, address_of(out[j]) + d
            _add_rows(at, STEP, weights_row, v, x_row, size, to, x_row, WIDTH)


@piece
def clear(row):
    for i in range(row.size):
        row[i] = 0.0


@piece
def take_rows(x, first, count, head, out):
    """A head's rows, zeros behind them."""
    for i in range(out.shape[0]):
        if i < count:
            copy_row(x[first + i, head], out[i])
        else:
            clear(out[i])


@piece
def turn(x, first, count, head, out):
    """A head's rows as columns, zeros behind them."""
    for d in range(out.shape[0]):
        to = out[d]
        for j in range(count):
            to[j] = x[first + j, head, d]
        clear(to[count:])


@piece
def dot(a, b):
    total = np.float32(0.0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@piece
def flaw(row):
    """0, or NaN where a number is not finite."""
    total = np.float32(0.0)
    for i in range(row.size):
        total += row[i] * np.float32(0.0)
    return total


@piece
def round_up(count, multiple):
    return (count + multiple - 1) // multiple * multiple


@piece
def widest(bounds, first_unit, stop_unit, groups):
    """Of the sequences of these units, in whole steps of scores."""
    longest = 0
    for n in range(first_unit // groups, (stop_unit + groups - 1) // groups):
        longest = max(longest, bounds[n + 1] - bounds[n])
    return round_up(longest, softmax.ROUND)


@kernel
def _forward(first_unit, stop_unit, bounds, q, k, v, out, sums):
    heads, dim, groups = q.shape[1], q.shape[2], k.shape[1]
    longest = widest(bounds, first_unit, stop_unit, groups)
    keys, scores = np.empty((dim, longest), np.float32), np.empty((QUERIES, longest), np.float32)
    queries, mixed = np.empty((QUERIES, dim), np.float32), np.empty((QUERIES, dim), np.float32)
    # The scores are weighed by powers of 2.
    log_2, lowest = np.float32(math.log(2.0)), np.float32(-np.inf)
    scale = np.float32(1.0 / math.sqrt(dim)) / log_2
    totals, flaws = np.empty(QUERIES, np.float32), np.empty(QUERIES, np.float32)
    for unit in range(first_unit, stop_unit):
        n, group = unit // groups, unit % groups
        start, length = bounds[n], bounds[n + 1] - bounds[n]
        turn(k, start, length, group, keys)
        values = address_of(v) + 4 * (start * groups + group) * dim
        for first in range(0, length, QUERIES):
            count = min(QUERIES, length - first)
            seen = first + count
            size = round_up(seen, softmax.ROUND)
            for head in range(heads // groups * group, heads // groups * (group + 1)):
                take_rows(q, start + first, count, head, queries)
                multiply_scores(queries, keys, size, scores)
                for i in range(count):
                    # What weighs the scores takes no notice of NaN.
                    flaws[i] = flaw(scores[i, : first + i + 1])
                    at, limit = address_of(scores[i]), first + i + 1
                    peak, totals[i] = softmax.row_masked_f32(at, at, size, limit, scale, lowest)
                    sums[start + first + i, head] = peak * log_2 + np.log(totals[i])
                sum_weighted(scores, values, 4 * groups * dim, seen, mixed)
                for i in range(count):
                    row, to = mixed[i], out[start + first + i, head]
                    for d in range(to.size):
                        to[d] = row[d] / totals[i] + flaws[i]


@kernel
def _backward(first_unit, stop_unit, bounds, q, k, v, out, sums, grad, to_q, to_k, to_v):
    heads, dim, groups = q.shape[1], q.shape[2], k.shape[1]
    longest = widest(bounds, first_unit, stop_unit, groups)
    keys, values = np.empty((dim, longest), np.float32), np.empty((dim, longest), np.float32)
    to_keys, to_values = (
        np.empty((longest, dim), np.float32),
        np.empty((longest, dim), np.float32),
    )
    weights, slopes = (
        np.empty((QUERIES, longest), np.float32),
        np.empty((QUERIES, longest), np.float32),
    )
    queries, above = np.empty((QUERIES, dim), np.float32), np.empty((QUERIES, dim), np.float32)
    mixed, scale = np.empty((QUERIES, dim), np.float32), np.float32(1.0 / math.sqrt(dim))
    for unit in range(first_unit, stop_unit):
        n, group = unit // groups, unit % groups
        start, length = bounds[n], bounds[n + 1] - bounds[n]
        turn(k, start, length, group, keys)
        turn(v, start, length, group, values)
        to_keys[:] = 0.0
        to_values[:] = 0.0
        rows = address_of(k) + 4 * (start * groups + group) * dim
        for first in range(0, length, QUERIES):
            count = min(QUERIES, length - first)
            seen = first + count
            size = round_up(seen, softmax.ROUND)
            for head in range(heads // groups * group, heads // groups * (group + 1)):
                take_rows(q, start + first, count, head, queries)
                take_rows(grad, start + first, count, head, above)
                multiply_scores(queries, keys, size, weights)
                multiply_scores(above, values, size, slopes)
                for i in range(QUERIES):
                    limit = first + i + 1 if i < count else 0
                    clear(weights[i, limit:size])
                    clear(slopes[i, limit:size])
                for i in range(count):
                    row, slope = weights[i, : first + i + 1], slopes[i, : first + i + 1]
                    total = sums[start + first + i, head]
                    mean = dot(above[i], out[start + first + i, head])
                    for j in range(row.size):
                        row[j] = vector.exp_f32(row[j] * scale - total)
                        slope[j] = row[j] * (slope[j] - mean) * scale
                add_turned(weights, above, seen, to_values)
                add_turned(slopes, queries, seen, to_keys)
                sum_weighted(slopes, rows, 4 * groups * dim, seen, mixed)
                for i in range(count):
                    copy_row(mixed[i], to_q[start + first + i, head])
        for j in range(length):
            copy_row(to_keys[j], to_k[start + j, group])
            copy_row(to_values[j], to_v[start + j, group])
