"""Lightning attention token by token, the state in registers: the same recurrence four times.

With o_t = q_t S_t and S_t = d S_(t-1) + k_t^T v_t, all gradients are outputs of that recurrence,
with what it is given in other places:

  dq, forward in time:  query do, key v, value k
  dk, back in time:     query v, key do, value q
  dv, back in time:     query k, key q, value do

So a state of D x D is all that is carried, in whichever direction. For small heads this is less
work than products over chunks of tokens are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable

from openm1.kernels.cpu import vector
from openm1.kernels.cpu.blocks import address_of, sigmoid, silu
from openm1.kernels.cpu.compile import kernel, piece
from openm1.kernels.cpu.training.norm import ONE
from openm1.kernels.cpu.training.sharing import arrays, over_sequences, trains_on_cpu
from openm1.kernels.cpu.vector import FLOAT32, LANES
from openm1.kernels.packing import PackedLayout

HEAD_DIMS = (16, 32, 64)
"""Sizes of heads whose state stays near; larger ones are better in chunks."""
BLOCK_TOKENS = 64
"""Tokens whose activations are computed at a time, and stay in the nearest cache."""
UNIT_HEADS = 4
"""Heads that are gone through side by side: a unit of work is so many of one sequence."""


def fits(projected: Tensor, dim: int) -> bool:
    """Whether `lightning_silu` is for heads of `dim`: fp32 on the CPU, and a gradient wanted."""
    return dim in HEAD_DIMS and trains_on_cpu(projected)


def lightning_silu(
    projected: Float[Tensor, "T 3HD"], slope: Float[Tensor, " H"], layout: PackedLayout
) -> Float[Tensor, "T HD"]:
    """Attention over packed sequences with q, k, v = silu(projected), per head as [q | k | v]."""
    return _Lightning.apply(projected, slope, layout)


class _Lightning(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, slope: Tensor, layout: PackedLayout) -> Tensor:
        projected = projected.contiguous()
        # Minus what a state loses from one token to the next: as a number of fp32 more exact than
        # what it keeps.
        fades = torch.expm1(-slope)
        ctx.save_for_backward(projected, fades)
        ctx.bounds = np.array([*layout.starts, layout.num_tokens])
        out = projected.new_empty(len(projected), projected.shape[1] // 3)
        given = arrays(projected, fades, out)
        over_sequences(_forward, _num_units(ctx.bounds, fades), ctx.bounds, *given)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        projected, fades = ctx.saved_tensors
        to_projected = torch.empty_like(projected)
        given = arrays(projected, fades, grads[0].contiguous(), to_projected)
        over_sequences(_backward, _num_units(ctx.bounds, fades), ctx.bounds, *given)
        return to_projected, None, None


def _num_units(bounds: np.ndarray, fades: Tensor) -> int:
    return (len(bounds) - 1) * -(-len(fades) // UNIT_HEADS)


def _make_scan(dim: int) -> Any:
    """scan(q, q_stride, k, k_stride, v, v_stride, out, out_stride, count, fade, state).

    `count` tokens of one head, LANES columns of v, out and the state [dim, dim]; all are addresses
    of fp32 and strides in bytes, which may be negative. The state is moved on.
    """
    num_sums = 4  # So that one addition need not wait for the last one's end.

    def build(builder, q, q_stride, k, k_stride, v, v_stride, out, out_stride, count, fade, state):
        def number(base, index):
            at = builder.add(base, vector._const(4 * index))
            value = builder.load(builder.inttoptr(at, ir.FloatType().as_pointer()), align=4)
            return vector._splat(builder, value)

        def at_token(base, stride, index):
            return builder.add(base, builder.mul(stride, index))

        fade = number(fade, 0)
        places = [builder.add(state, vector._const(4 * dim * i)) for i in range(dim)]

        def token(index, rows):
            queries, keys = at_token(q, q_stride, index), at_token(k, k_stride, index)
            values = vector._load(builder, at_token(v, v_stride, index), FLOAT32)
            new, sums = [], [ir.Constant(values.type, None)] * num_sums
            for i, row in enumerate(rows):
                row = vector._fma(builder, row, fade, row)
                row = vector._fma(builder, number(keys, i), values, row)
                which = i % num_sums
                sums[which] = vector._fma(builder, number(queries, i), row, sums[which])
                new.append(row)
            halves = [builder.fadd(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
            store(builder.fadd(*halves), at_token(out, out_stride, index))
            return new

        def store(value, address):
            builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)

        before = [vector._load(builder, place, FLOAT32) for place in places]
        for row, place in zip(vector._loop(builder, count, 1, before, token), places, strict=True):
            store(row, place)

    codegen = vector._outlined(f"openm1_scan_{dim}", 11, build)

    @intrinsic
    def scan(typingctx, q, q_stride, k, k_stride, v, v_stride, out, out_stride, count, fade, state):
        return types.void(*[types.int64] * 11), codegen

    return scan


_scan_16, _scan_32, _scan_64 = (_make_scan(dim) for dim in HEAD_DIMS)


@piece
def scan(dim, q, k, v, strides, out, out_stride, count, fade, state):
    """All columns of a head; q, k and v are addresses with strides of their own."""
    a, b, c = strides
    for column in range(0, 4 * dim, 4 * LANES):
        values, to, at = v + column, out + column, state + column
        if dim == 16:
            _scan_16(q, a, k, b, values, c, to, out_stride, count, fade, at)
        elif dim == 32:
            _scan_32(q, a, k, b, values, c, to, out_stride, count, fade, at)
        else:
            _scan_64(q, a, k, b, values, c, to, out_stride, count, fade, at)


@piece
def activate(projected, first, count, columns, out):
    """silu of some tokens' columns."""
    for t in range(count):
        row, to = projected[first + t, columns[0] : columns[1]], out[t]
        for i in range(row.size):
            to[i] = silu(row[i])


@piece
def unit_heads(unit, heads):
    """The sequence of a unit, and its heads."""
    blocks = (heads + UNIT_HEADS - 1) // UNIT_HEADS
    first = unit % blocks * UNIT_HEADS
    return unit // blocks, first, min(first + UNIT_HEADS, heads)


@kernel
def _forward(first_unit, stop_unit, bounds, projected, fades, out):
    heads = fades.size
    dim = projected.shape[1] // (3 * heads)
    states = np.empty((UNIT_HEADS, dim, dim), np.float32)
    scratch = np.empty((BLOCK_TOKENS, UNIT_HEADS * 3 * dim), np.float32)
    row_bytes, out_bytes = np.int64(4 * scratch.shape[1]), np.int64(4 * heads * dim)
    for unit in range(first_unit, stop_unit):
        n, first, stop = unit_heads(unit, heads)
        columns = (3 * dim * first, 3 * dim * stop)
        states[:] = 0.0
        for begin in range(bounds[n], bounds[n + 1], BLOCK_TOKENS):
            count = min(BLOCK_TOKENS, bounds[n + 1] - begin)
            activate(projected, begin, count, columns, scratch)
            for h in range(first, stop):
                q = address_of(scratch) + 12 * dim * (h - first)
                k, v = q + 4 * dim, q + 8 * dim
                to = address_of(out) + begin * out_bytes + 4 * dim * h
                strides = (row_bytes, row_bytes, row_bytes)
                fade, state = address_of(fades[h:]), address_of(states[h - first])
                scan(dim, q, k, v, strides, to, out_bytes, count, fade, state)


@kernel
def _backward(first_unit, stop_unit, bounds, projected, fades, grad, to_projected):
    heads = fades.size
    dim = projected.shape[1] // (3 * heads)
    states = np.empty((2, UNIT_HEADS, dim, dim), np.float32)
    scratch = np.empty((BLOCK_TOKENS, UNIT_HEADS * 3 * dim), np.float32)
    row_bytes, grad_bytes = np.int64(4 * scratch.shape[1]), np.int64(4 * heads * dim)
    to_bytes = 3 * grad_bytes
    for unit in range(first_unit, stop_unit):
        n, first, stop = unit_heads(unit, heads)
        columns = (3 * dim * first, 3 * dim * stop)
        start, end = bounds[n], bounds[n + 1]
        states[:] = 0.0
        for begin in range(start, end, BLOCK_TOKENS):
            count = min(BLOCK_TOKENS, end - begin)
            activate(projected, begin, count, columns, scratch)
            for h in range(first, stop):
                q = address_of(scratch) + 12 * dim * (h - first)
                k, v = q + 4 * dim, q + 8 * dim
                above = address_of(grad) + begin * grad_bytes + 4 * dim * h
                to = address_of(to_projected) + begin * to_bytes + 12 * dim * h
                strides = (grad_bytes, row_bytes, row_bytes)
                fade, state = address_of(fades[h:]), address_of(states[0, h - first])
                scan(dim, above, v, k, strides, to, to_bytes, count, fade, state)
        states[:] = 0.0
        for block in range((end - start - 1) // BLOCK_TOKENS, -1, -1):
            begin = start + block * BLOCK_TOKENS
            count = min(BLOCK_TOKENS, end - begin)
            last = count - 1
            activate(projected, begin, count, columns, scratch)
            for h in range(first, stop):
                q = address_of(scratch) + last * row_bytes + 12 * dim * (h - first)
                k, v = q + 4 * dim, q + 8 * dim
                above = address_of(grad) + (begin + last) * grad_bytes + 4 * dim * h
                to = address_of(to_projected) + (begin + last) * to_bytes + 12 * dim * h
                fade = address_of(fades[h:])
                to_k, state = to + 4 * dim, address_of(states[0, h - first])
                strides = (-row_bytes, -grad_bytes, -row_bytes)
                scan(dim, v, above, q, strides, to_k, -to_bytes, count, fade, state)
                to_v, state = to + 8 * dim, address_of(states[1, h - first])
                strides = (-row_bytes, -row_bytes, -grad_bytes)
                scan(dim, k, q, above, strides, to_v, -to_bytes, count, fade, state)
            for t in range(begin, begin + count):
                row = projected[t, columns[0] : columns[1]]
                to_row = to_projected[t, columns[0] : columns[1]]
                for i in range(row.size):
                    share = sigmoid(row[i])
                    to_row[i] *= share * (ONE + row[i] * (ONE - share))
