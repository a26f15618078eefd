"""The softmax of a tile of attention scores, in one sweep while the tile is in the cache.

In torch's own operators it is five passes and takes as long as the two products around it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic
from torch import Tensor

from openm1.kernels.cpu import vector
from openm1.kernels.cpu.compile import kernel
from openm1.kernels.cpu.vector import BFLOAT16, FLOAT32, LANES

UNROLL = 4
ROUND = UNROLL * LANES
"""Rows have a multiple of this many scores."""

# 2^x for |x| <= 1/2, the polynomials of least largest relative error: 8e-8, and 8e-5 where the
# result is rounded to bf16, which is off by up to 4e-3 itself.
_EXP2 = {
    FLOAT32: (1.0000000717, 0.6931469671, 0.2402211972, 0.0555071327, 0.0096755413, 0.0013276472),
    BFLOAT16: (0.9999280735, 0.6932609857, 0.2426111221, 0.0551716680),
}
_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


def floats(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def ints(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _largest_lane(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    best, *others = vectors
    for other in others:
        best = larger(builder, best, other)
    top = builder.extract_element(best, ir.Constant(_I32, 0))
    for lane in range(1, LANES):
        top = larger(builder, top, builder.extract_element(best, ir.Constant(_I32, lane)))
    return top


def as_exp2(builder: ir.IRBuilder, x: ir.Value, kind: int) -> ir.Value:
    """2^x for x at most 0; 2^-126 for what is below that."""
    x = larger(builder, x, floats(-126.0))
    whole = vector._call(builder, f"llvm.rint.v{LANES}f32", _FLOATS, [x])
    rest = builder.fsub(x, whole)
    last, *factors = reversed(_EXP2[kind])
    series = floats(last)
    for factor in factors:
        series = vector._fma(builder, series, rest, floats(factor))
    power = builder.shl(builder.fptosi(whole, _INTS), ints(23))
    return builder.bitcast(builder.add(builder.bitcast(series, _INTS), power), _FLOATS)


def _store(builder: ir.IRBuilder, address: ir.Value, x: ir.Value, kind: int) -> ir.Value:
    """Stores `x`, which is not negative, and returns it as it was rounded."""
    if kind == FLOAT32:
        builder.store(x, builder.inttoptr(address, _FLOATS.as_pointer()), align=4)
        return x
    bits = builder.add(builder.bitcast(x, _INTS), ints(0x8000))
    stored = ir.VectorType(_I16, LANES)
    short = builder.trunc(builder.lshr(bits, ints(16)), stored)
    builder.store(short, builder.inttoptr(address, stored.as_pointer()), align=2)
    return builder.bitcast(builder.and_(bits, ints(0xFFFF0000)), _FLOATS)


def _make_row(kind: int, masked: bool) -> Any:
    """row(scores, weights, size, limit, scale, peak) -> (new peak, sum of weights).

    Turns `size` fp32 scores (a multiple of ROUND) into 2^(score * scale - new peak), the new peak
    being the largest of `peak` and all scores times `scale`. The first two are addresses.
    `masked`: scores from `limit` on count for nothing, and their weights are 0.
    """

    def codegen(context, builder, signature, args):
        scores, weights, size, limit, scale, peak = args

        def address(base, index, num_bytes):
            return builder.add(base, builder.mul(index, ir.Constant(_I64, num_bytes)))

        def places(index):
            """Of several vectors, so that none waits for another's end."""
            return [builder.add(index, ir.Constant(_I64, LANES * u)) for u in range(UNROLL)]

        def load(place):
            return vector._load(builder, address(scores, place, 4), FLOAT32)

        def keep(place, x, other):
            if not masked:
                return x
            mask = vector._tail_mask(builder, builder.sub(limit, place))
            return builder.select(mask, x, floats(other))

        def highest(index, tops):
            pairs = zip(places(index), tops, strict=True)
            return [larger(builder, keep(at, load(at), -np.inf), top) for at, top in pairs]

        tops = vector._loop(builder, size, ROUND, [floats(-np.inf)] * UNROLL, highest)
        peak = larger(builder, builder.fmul(_largest_lane(builder, tops), scale), peak)
        scales = vector._splat(builder, scale)
        down = vector._splat(builder, builder.fneg(peak))

        def weigh(index, sums):
            new = []
            for at, total in zip(places(index), sums, strict=True):
                weight = as_exp2(builder, vector._fma(builder, load(at), scales, down), kind)
                to = address(weights, at, 4 if kind == FLOAT32 else 2)
                stored = _store(builder, to, keep(at, weight, 0.0), kind)
                new.append(builder.fadd(total, stored))
            return new

        sums = vector._loop(builder, size, ROUND, [floats(0.0)] * UNROLL, weigh)
        summed = vector._pairwise(builder, sums)
        parts = [
            builder.extract_element(summed, ir.Constant(ir.IntType(32), i)) for i in range(UNROLL)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = builder.fadd(total, part)
        return context.make_tuple(builder, signature.return_type, [peak, total])

    @intrinsic
    def row(typingctx, scores, weights, size, limit, scale, peak):
        integers, floats = [types.int64] * 4, [types.float32] * 2
        return types.UniTuple(types.float32, 2)(*integers, *floats), codegen

    return row


row_f32, row_masked_f32 = _make_row(FLOAT32, False), _make_row(FLOAT32, True)
row_bf16, row_masked_bf16 = _make_row(BFLOAT16, False), _make_row(BFLOAT16, True)


@kernel
def _soften_rows(scores, weights, to_bf16, size, limits, scale, peaks, totals, fades):
    weight_bytes = 2 if to_bf16 else 4
    for i in range(peaks.size):
        source, target = scores + 4 * i * size, weights + weight_bytes * i * size
        limit = limits[i] if limits.size > 0 else size
        before = peaks[i]
        if to_bf16 and limit < size:
            peak, total = row_masked_bf16(source, target, size, limit, scale, before)
        elif to_bf16:
            peak, total = row_bf16(source, target, size, limit, scale, before)
        elif limit < size:
            peak, total = row_masked_f32(source, target, size, limit, scale, before)
        else:
            peak, total = row_f32(source, target, size, limit, scale, before)
        fade = np.float32(2.0) ** (before - peak)
        peaks[i] = peak
        fades[i] = fade
        totals[i] = totals[i] * fade + total


def soften_tile(
    scores: Tensor,
    weights: Tensor,
    limits: Tensor | None,
    scale: float,
    peaks: Tensor,
    totals: Tensor,
    fades: Tensor,
) -> None:
    """`kernels.paged_attention.soften` for contiguous fp32 scores on the CPU, `scale` in units of
    log 2; weights are fp32, then possibly the scores' own memory, or bf16."""
    size = scores.shape[1]
    assert size % ROUND == 0 and scores.is_contiguous() and weights.is_contiguous()
    assert weights.dtype in (torch.float32, torch.bfloat16)
    _soften_rows(
        scores.data_ptr(),
        weights.data_ptr(),
        weights.dtype == torch.bfloat16,
        size,
        np.empty(0, np.int64) if limits is None else limits.numpy(),
        np.float32(scale),
        peaks.numpy(),
        totals.numpy(),
        fades.numpy(),
    )
