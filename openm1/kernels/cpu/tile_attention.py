"""Softmax attention of many bf16 queries with the tile unit (AMX): scores never leave the cache.

Scores are computed transposed, S^T = K Q^T, one row per key and one column per query. So keys are
read as they lie, the softmax runs down the columns without any sum across a vector, and two rows of
weights side by side are already what the tile unit takes as its second operand in O^T = V^T P^T.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic
from torch import Tensor

from openm1.kernels.cpu import vector
from openm1.kernels.cpu.compile import kernel
from openm1.kernels.cpu.softmax import as_exp2, floats, ints, larger
from openm1.kernels.cpu.vector import BFLOAT16, FLOAT32, LANES

QUERIES = 32
"""Taken at a time: two vectors, two tiles. Keys and dimensions come in as many too."""
BLOCK_KEYS = 128
"""Whose scores, weights and values are in the first-level cache together."""
_I64, _I32 = ir.IntType(64), ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
# Palette 1: eight tiles of 16 rows of 64 bytes.
_TILE_SETUP = np.zeros(64, np.uint8)
_TILE_SETUP[0], _TILE_SETUP[48:56] = 1, 16
_TILE_SETUP[16:32].view(np.uint16)[:] = 64


def _make_columns(masked: bool) -> Any:
    """columns(scores, count, weights, scale, peaks, totals, fades, limits), all but two addresses.

    Makes weights of `count` rows (a multiple of 4) of 16 fp32 scores, a row every 128 bytes, and
    updates the columns' statistics, as `paged_attention.soften` does. Weights are bf16, in pairs of
    rows, interleaved. `masked`: rows from a column's int32 limit on count for nothing.
    """

    def codegen(context, builder, signature, args):
        scores, count, weights, scale, peaks, totals, fades, limits = args

        def at(base, index, num_bytes):
            return builder.add(base, builder.mul(index, ir.Constant(_I64, num_bytes)))

        def rows_of(index):
            return [builder.add(index, ir.Constant(_I64, u)) for u in range(4)]

        def load(row):
            return vector._load(builder, at(scores, row, 128), FLOAT32)

        def store(value, address):
            builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)

        last = builder.load(builder.inttoptr(limits, _INTS.as_pointer()), align=4)

        def keep(row, x, other):
            if not masked:
                return x
            one = builder.insert_element(
                ir.Constant(_INTS, ir.Undefined), builder.trunc(row, _I32), ir.Constant(_I32, 0)
            )
            number = builder.shuffle_vector(one, ir.Constant(_INTS, ir.Undefined), ints(0))
            return builder.select(builder.icmp_signed("<", number, last), x, floats(other))

        def highest(index, tops):
            pairs = zip(rows_of(index), tops, strict=True)
            return [larger(builder, keep(row, load(row), -np.inf), top) for row, top in pairs]

        first, *tops = vector._loop(builder, count, 4, [floats(-np.inf)] * 4, highest)
        for top in tops:
            first = larger(builder, top, first)
        scales = vector._splat(builder, scale)
        before = vector._load(builder, peaks, FLOAT32)
        peak = larger(builder, builder.fmul(first, scales), before)
        fade = as_exp2(builder, builder.fsub(before, peak), FLOAT32)
        down = builder.fneg(peak)

        def weigh(index, sums):
            rounded = []
            for row in rows_of(index):
                weight = as_exp2(builder, vector._fma(builder, load(row), scales, down), BFLOAT16)
                bits = builder.bitcast(keep(row, weight, 0.0), _INTS)
                bits = builder.add(bits, ints(0x8000))
                rounded.append(builder.and_(bits, ints(0xFFFF0000)))
            to = at(weights, index, 32)
            for u in (0, 2):
                pair = builder.or_(builder.lshr(rounded[u], ints(16)), rounded[u + 1])
                store(pair, builder.add(to, ir.Constant(_I64, 32 * u)))
            return [
                builder.fadd(total, builder.bitcast(bits, _FLOATS))
                for total, bits in zip(sums, rounded, strict=True)
            ]

        first, *sums = vector._loop(builder, count, 4, [floats(0.0)] * 4, weigh)
        for part in sums:
            first = builder.fadd(first, part)
        total = vector._fma(builder, vector._load(builder, totals, FLOAT32), fade, first)
        for value, address in ((peak, peaks), (total, totals), (fade, fades)):
            store(value, address)
        return context.get_dummy_value()

    @intrinsic
    def columns(typingctx, scores, count, weights, scale, peaks, totals, fades, limits):
        numbers = [types.int64] * 3 + [types.float32] + [types.int64] * 4
        return types.void(*numbers), codegen

    return columns


_columns, _columns_masked = _make_columns(False), _make_columns(True)


@intrinsic
def _merge(typingctx, sums, part, fades, dim):
    """sums[d, q] = sums[d, q] * fades[q] + part[d, q] for QUERIES columns; three addresses."""

    def codegen(context, builder, signature, args):
        total, added, faded, count = args
        places = [ir.Constant(_I64, 64 * half) for half in range(2)]
        factors = [vector._load(builder, builder.add(faded, x), FLOAT32) for x in places]

        def row(index, carried):
            base = builder.mul(index, ir.Constant(_I64, 128))
            for place, factor in zip(places, factors, strict=True):
                offset = builder.add(base, place)
                here = builder.add(total, offset)
                before = vector._load(builder, here, FLOAT32)
                new = vector._load(builder, builder.add(added, offset), FLOAT32)
                value = vector._fma(builder, before, factor, new)
                builder.store(value, builder.inttoptr(here, value.type.as_pointer()), align=4)
            return []

        vector._loop(builder, count, 1, [], row)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@kernel
def _attend(
    queries,
    keys,
    key_bytes,
    values,
    value_bytes,
    num_keys,
    limits,
    scale,
    sums,
    stats,
    dim,
    own,
    own_place,
    setup,
    space,
):
    """Blocks of QUERIES queries against `num_keys` keys, all but `limits` and `own` by address.

    sums [blocks, dim, QUERIES]; stats [blocks, 2, QUERIES]: peaks and totals; limits
    [blocks, QUERIES] int64: how many of these keys each query sees. `own` is scratch for as many
    int32, at `own_place`; `space` for scores, weights, parts of sums and their factors. Compiled
    code must not take an array's address itself: numba would never free that array.
    """
    blocks = len(limits)
    scores, weights = space, space + 4 * QUERIES * BLOCK_KEYS
    fades = space + 6 * QUERIES * BLOCK_KEYS
    part = fades + 4 * QUERIES
    vector.tile_configure(setup)
    for b in range(blocks):
        most, least = limits[b].max(), limits[b].min()
        packed = queries + b * QUERIES * dim * 2
        for j in range(0, min(num_keys, most), BLOCK_KEYS):
            count = min(BLOCK_KEYS, num_keys - j)
            for n in range(0, count, 32):
                here = keys + (j + n) * key_bytes
                vector.tile_dots_2(here, key_bytes, packed, 32 * dim, dim, scores + 128 * n, 128)
            for i in range(QUERIES):
                own[i] = min(max(limits[b, i] - j, 0), BLOCK_KEYS)
            for half in range(2):
                source, target = scores + 64 * half, weights + 32 * count * half
                peaks = stats + (b * 2 * QUERIES + 16 * half) * 4
                totals, fade = peaks + 4 * QUERIES, fades + 64 * half
                limit = own_place + 64 * half
                if least < j + count:
                    _columns_masked(source, count, target, scale, peaks, totals, fade, limit)
                else:
                    _columns(source, count, target, scale, peaks, totals, fade, limit)
            for d in range(0, dim, 32):
                here = values + d * value_bytes + 2 * j
                to = part + 128 * d
                vector.tile_dots_2(here, value_bytes, weights, 32 * count, count, to, 128)
            total = sums + b * dim * QUERIES * 4
            _merge(total, part, fades, dim)
    vector.tile_release()


class TileAttention:
    """Queries of consecutive tokens, and what they have seen so far."""

    def __init__(self, q: Float[Tensor, "t H D"], groups: int, past: int) -> None:
        num_new, num_heads, dim = q.shape
        self.shape, self.groups, self.shared = q.shape, groups, num_heads // groups
        self.dim = -(-dim // 32) * 32
        rows = num_new * self.shared
        self.blocks = -(-rows // QUERIES)
        grouped = q.new_zeros(groups, self.blocks * QUERIES, self.dim)
        # The query heads of a group are rows of one product: row = token * shared + head.
        grouped[:, :rows, :dim] = (
            q.unflatten(1, (groups, self.shared)).transpose(0, 1).reshape(groups, rows, dim)
        )
        # Sixteen rows side by side, pair of columns by pair of columns.
        pairs = grouped.view(groups, -1, 16, self.dim // 2, 2)
        self.queries = pairs.transpose(2, 3).contiguous()
        seen = torch.arange(past + 1, past + num_new + 1).repeat_interleave(self.shared)
        # Rows of padding see what the last row sees.
        self.seen = torch.cat([seen, seen[-1:].expand(self.blocks * QUERIES - rows)])
        self.sums = torch.zeros(groups, self.blocks, self.dim, QUERIES)
        self.stats = torch.zeros(groups, self.blocks, 2, QUERIES)
        self.stats[:, :, 0] = -torch.inf

    def add(self, keys: Float[Tensor, "W G D"], values: Float[Tensor, "W G D"], first: int) -> None:
        """Sees keys from position `first` on; W is a multiple of 32, what is behind them is 0."""
        missing = self.dim - keys.shape[-1]
        if missing:
            keys = torch.nn.functional.pad(keys, (0, missing))
            values = torch.nn.functional.pad(values, (0, missing))
        turned = values.permute(1, 2, 0).contiguous()  # [G, D, W]
        limits = (self.seen - first).view(self.blocks, QUERIES).numpy()
        scale = np.float32(1 / math.sqrt(self.shape[-1]) / math.log(2))
        size = keys.element_size()

        def run(group: int, part: slice) -> None:
            size_of_parts = 4 * QUERIES * (1 + self.dim)
            space = torch.empty(QUERIES * BLOCK_KEYS * 6 + size_of_parts, dtype=torch.uint8)
            own = np.empty(QUERIES, np.int32)
            _attend(
                self.queries[group].view(self.blocks, -1)[part].data_ptr(),
                keys[:, group].data_ptr(),
                keys.stride(0) * size,
                turned[group].data_ptr(),
                turned.stride(1) * size,
                len(keys),
                limits[part],
                scale,
                self.sums[group, part].data_ptr(),
                self.stats[group, part].data_ptr(),
                self.dim,
                own,
                own.ctypes.data,
                _TILE_SETUP.ctypes.data,
                space.data_ptr(),
            )

        threads = min(torch.get_num_threads(), self.blocks)
        cuts = [self.blocks * i // threads for i in range(threads + 1)]
        parts = [slice(a, b) for a, b in pairwise(cuts)]
        work = [(group, part) for group in range(self.groups) for part in parts]
        if threads == 1:
            for group, part in work:
                run(group, part)
        else:
            list(_pool(threads).map(lambda args: run(*args), work))

    def result(self) -> Float[Tensor, "t H D"]:
        """fp32."""
        num_new, _, dim = self.shape
        out = self.sums / self.stats[:, :, 1, None]
        rows = out.transpose(2, 3).flatten(1, 2)[:, : num_new * self.shared, :dim]
        rows = rows.unflatten(1, (num_new, self.shared)).transpose(0, 1)
        return rows.flatten(1, 2)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
