"""Lightning attention on a CPU: a decode step in one pass, a prefill by the tile unit (AMX).

The prefill's formulas are those of `triton_lightning`. Operands of its products are bf16: q, k and
v as they are, decayed scores and the state before a chunk rounded, decayed values in two parts, so
that states are as good as by fp32 operands. Sums, states and decays are fp32.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray

from openm1.kernels.cpu import vector
from openm1.kernels.cpu.blocks import load_row, store_row, to_bf16
from openm1.kernels.cpu.compile import kernel, piece
from openm1.kernels.cpu.vector import BFLOAT16, FLOAT32
from openm1.kernels.packing import PackedLayout
from openm1_vllm.cpu import TILE_SETUP, in_threads, tiles

CHUNK_TOKENS = 64
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
"""How numbers are stored, for a kernel."""
BLOCK = 32
"""Rows and columns of a product that are computed together: two tiles each way."""


def lightning_decode_cpu(
    qkv: torch.Tensor,
    slopes: torch.Tensor,
    states: torch.Tensor,
    pages: torch.Tensor,
    count: int,
    out: torch.Tensor,
) -> None:
    """One token a row: fills the first `count` rows of `out` [S, H D] and moves the fp32 states
    [P, H, D, D] of `pages` on, where they lie; a state is contiguous, pages may lie apart.

    Rows of `qkv` [S, H 3 D] are packed per head as [q | k | v], bf16 or fp32; sums are fp32. It is
    called once a layer for every token: what Python does here shows.
    """
    kind = KINDS.get(qkv.dtype)
    if kind is None or not (qkv.is_contiguous() and out.is_contiguous()):
        raise ValueError(
            f"qkv is {qkv.dtype} with strides {qkv.stride()}, out has {out.stride()}; allowed are "
            f"contiguous rows of {', '.join(map(str, KINDS))}"
        )
    places = qkv.data_ptr(), out.data_ptr(), states.data_ptr(), slopes.data_ptr(), pages.data_ptr()
    _, heads, dim, _ = states.shape
    page_bytes = 4 * states.stride(0)

    def rows(first: int, stop: int) -> None:
        # Given, not made by the kernel: only so its loops become vectors.
        scratch = np.empty((4, dim), np.float32)
        _decode(kind, *places, page_bytes, heads, dim, scratch, first, stop)

    in_threads(rows, count, 1)


def can_prefill(q: torch.Tensor) -> bool:
    """Whether `lightning_prefill_cpu` takes q, k, v of this kind on this CPU."""
    return q.dtype == torch.bfloat16 and q.shape[-1] % BLOCK == 0 and tiles()


def lightning_prefill_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    layout: PackedLayout,
    initial_state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [T, H, D] in bf16, fp32 states [N, H, D, D] after each sequence.

    q, k, v are bf16 [T, H, D] with the same strides, the last of them 1; D is a multiple of BLOCK.
    """
    if not can_prefill(q):
        raise ValueError(
            f"q is {q.dtype} with heads of {q.shape[-1]}; allowed are bf16, multiples of {BLOCK} "
            "and CPUs with a tile unit"
        )
    if not (q.stride() == k.stride() == v.stride()) or q.stride(-1) != 1:
        raise ValueError(f"q, k, v have strides {q.stride()}, {k.stride()}, {v.stride()}")
    # Bytes from token to token and from head to head.
    strides = q.element_size() * q.stride(0), q.element_size() * q.stride(1)
    heads, dim = q.shape[1:]
    out, states = q.new_empty(q.shape), initial_state.clone(memory_format=torch.contiguous_format)
    bounds, decays = np.array([*layout.starts, layout.num_tokens]), slopes.numpy()
    places = [x.data_ptr() for x in (q, k, v, out, states)]
    setup, size = TILE_SETUP.ctypes.data, _scratch_bytes(dim)

    def items(first: int, stop: int) -> None:
        scratch = torch.zeros(size, dtype=torch.uint8)
        powers = np.zeros((2, 2 * CHUNK_TOKENS), np.float32)
        at = scratch.data_ptr()
        _prefill(*places, *strides, heads, dim, bounds, decays, powers, setup, at, first, stop)

    in_threads(items, layout.num_sequences * heads, 1)
    return out, states


@kernel
def _decode(kind, qkv, out, states, slopes, pages, page_bytes, heads, dim, scratch, first, stop):
    size = 4 if kind == FLOAT32 else 2
    slope = carray(vector.pointer_f32(slopes), (heads,))
    page = carray(vector.pointer_i32(pages), (stop,))
    query, key, value, total = scratch[0], scratch[1], scratch[2], scratch[3]
    for s in range(first, stop):
        state = states + np.int64(page[s]) * page_bytes
        following = states + np.int64(page[min(s + 1, stop - 1)]) * page_bytes
        for h in range(heads):
            # States come from memory: the next one is asked for row by row while this one moves.
            ahead = state + 4 * dim * dim if h + 1 < heads else following
            decay = np.float32(np.exp(-np.float64(slope[h])))
            at = qkv + 3 * size * (s * heads + h) * dim
            load_row(kind, at, dim, query)
            load_row(kind, at + size * dim, dim, key)
            load_row(kind, at + 2 * size * dim, dim, value)
            for j in range(dim):
                total[j] = 0.0
            for i in range(dim):
                for line in range(0, 4 * dim, 64):
                    vector.fetch(ahead + 4 * i * dim + line)
                row = carray(vector.pointer_f32(state + 4 * i * dim), (dim,))
                for j in range(dim):
                    new = decay * row[j] + key[i] * value[j]
                    row[j] = new
                    total[j] += query[i] * new
            store_row(kind, out + size * (s * heads + h) * dim, dim, total)
            state += 4 * dim * dim


# A prefill's scratch is tables one after the other. Packed ones are as `vector.tile_dots_2` takes
# them: columns in groups of 16, in a group a row of 16 words, of two numbers, for each two terms.


@piece
def _tables(at, dim):
    """Addresses: keys packed, keys turned, values packed, decayed values packed in two parts, state
    packed, scores, weights, two parts of the output, two of what the state gains, a last chunk."""
    words = 2 * CHUNK_TOKENS * dim
    keys, turned, values = at, at + words, at + 2 * words
    faded, rest, state = at + 3 * words, at + 4 * words, at + 5 * words
    scores = state + 2 * dim * dim
    weights = scores + 4 * CHUNK_TOKENS * CHUNK_TOKENS
    inner = weights + 2 * CHUNK_TOKENS * CHUNK_TOKENS
    outer = inner + 2 * words
    added = outer + 2 * words
    last = added + 8 * dim * dim
    return keys, turned, values, faded, rest, state, scores, weights, inner, outer, added, last


def _scratch_bytes(dim: int) -> int:
    return 12 * 2 * CHUNK_TOKENS * dim + 10 * dim * dim + 6 * CHUNK_TOKENS * CHUNK_TOKENS


@kernel
def _prefill(
    q, k, v, out, states, token_bytes, head_bytes, heads, dim,
    bounds, slopes, powers, setup, scratch, first, stop,
):  # fmt: skip
    """Items first to stop, a sequence and a head each; addresses and byte strides."""
    tables = _tables(scratch, dim)
    last = tables[11]
    vector.tile_configure(setup)
    for item in range(first, stop):
        sequence, head = item // heads, item % heads
        _powers(np.float64(slopes[head]), powers)
        state = states + 4 * item * dim * dim
        for start in range(bounds[sequence], bounds[sequence + 1], CHUNK_TOKENS):
            count = min(bounds[sequence + 1] - start, CHUNK_TOKENS)
            at = start * token_bytes + head * head_bytes
            to = out + 2 * (start * heads + head) * dim
            if count == CHUNK_TOKENS:
                _chunk(
                    q + at, k + at, v + at, token_bytes, count, dim, state, to, 2 * heads * dim,
                    powers, tables,
                )  # fmt: skip
            else:
                # Tiles are read whole: what lies behind the last token must be zeros.
                size = 2 * CHUNK_TOKENS * dim
                _copy_rows(q + at, token_bytes, count, dim, last)
                _copy_rows(k + at, token_bytes, count, dim, last + size)
                _copy_rows(v + at, token_bytes, count, dim, last + 2 * size)
                _chunk(
                    last, last + size, last + 2 * size, 2 * dim, count, dim, state, to,
                    2 * heads * dim, powers, tables,
                )  # fmt: skip
    vector.tile_release()


@piece
def _powers(slope, powers):
    """powers[0, n] = decay^n; powers[1, n] = decay^(CHUNK_TOKENS - 1 - n), 0 behind them."""
    for n in range(CHUNK_TOKENS + 1):
        powers[0, n] = np.float32(np.exp(-slope * n))
    for n in range(CHUNK_TOKENS):
        powers[1, n] = powers[0, CHUNK_TOKENS - 1 - n]


@piece
def _copy_rows(source, stride, count, dim, target):
    """`count` rows of bf16, then zeros up to a whole chunk."""
    for i in range(CHUNK_TOKENS):
        to = carray(vector.pointer_u16(target + 2 * i * dim), (dim,))
        if i < count:
            row = carray(vector.pointer_u16(source + i * stride), (dim,))
            for d in range(dim):
                to[d] = row[d]
        else:
            for d in range(dim):
                to[d] = 0


@piece
def _chunk(q, k, v, stride, count, dim, state, out, out_stride, powers, tables):
    """One head's outputs of a chunk; moves the state on."""
    keys, turned, values, faded, rest, before, scores, weights, inner, outer, added, _ = tables
    rows = (count + BLOCK - 1) // BLOCK * BLOCK
    _pack_keys(k, stride, rows, dim, keys, turned)
    _pack_values(v, stride, rows, count, dim, powers[0], values, faded, rest)
    _pack_state(state, dim, before)
    group, wide = 32 * CHUNK_TOKENS, 32 * dim
    for i in range(0, rows, BLOCK):
        queries = q + i * stride
        for j in range(0, i + BLOCK, BLOCK):
            to = scores + 4 * (i * CHUNK_TOKENS + j)
            here = keys + j // 16 * wide
            vector.tile_dots_2(queries, stride, here, wide, dim, to, 4 * CHUNK_TOKENS)
        _fade_scores(scores, i, powers[1], weights)
        mine = weights + 2 * i * CHUNK_TOKENS
        for d in range(0, dim, BLOCK):
            place = 4 * (i * dim + d)
            here = values + d // 16 * group
            vector.tile_dots_2(
                mine, 2 * CHUNK_TOKENS, here, group, i + BLOCK, inner + place, 4 * dim
            )
            here = before + d // 16 * wide
            vector.tile_dots_2(queries, stride, here, wide, dim, outer + place, 4 * dim)
    _sum_outputs(inner, outer, count, dim, powers[0], out, out_stride)
    _move_on(state, powers[0, count], turned, faded, rest, rows, dim, added)


@piece
def _move_on(state, decay, turned, faded, rest, rows, dim, added):
    """state = decay state + K^T V of the chunk, V being as old as it then is."""
    group, size = 32 * CHUNK_TOKENS, dim * dim
    for i in range(0, dim, BLOCK):
        keys = turned + 2 * i * CHUNK_TOKENS
        for d in range(0, dim, BLOCK):
            here, to = d // 16 * group, added + 4 * (i * dim + d)
            vector.tile_dots_2(keys, 2 * CHUNK_TOKENS, faded + here, group, rows, to, 4 * dim)
            to += 4 * size
            vector.tile_dots_2(keys, 2 * CHUNK_TOKENS, rest + here, group, rows, to, 4 * dim)
    old = carray(vector.pointer_f32(state), (size,))
    new = carray(vector.pointer_f32(added), (size,))
    more = carray(vector.pointer_f32(added + 4 * size), (size,))
    for i in range(size):
        old[i] = decay * old[i] + (new[i] + more[i])


@piece
def _pack_keys(k, stride, rows, dim, packed, turned):
    """Keys as columns, packed, and a row for each of their dimensions."""
    for t in range(0, rows, 16):
        for d in range(0, dim, 32):
            to = packed + 2 * t * dim + 32 * d
            vector.transpose_tile(k + t * stride + 2 * d, stride, to, 64)
            for pair in range(16):
                place = turned + 2 * ((d + 2 * pair) * CHUNK_TOKENS + t)
                vector.separate_bf16(to + 64 * pair, place, place + 2 * CHUNK_TOKENS)


@piece
def _pack_values(v, stride, rows, count, dim, powers, packed, faded, rest):
    """Values as they are, and as old as they are at the end of the chunk: rounded, and what
    rounding left of them."""
    for t in range(0, rows, 2):
        first = powers[count - 1 - t] if t < count else np.float32(0.0)
        second = powers[count - 2 - t] if t + 1 < count else np.float32(0.0)
        for d in range(0, dim, 16):
            a, place = v + t * stride + 2 * d, d // 16 * 32 * CHUNK_TOKENS + 32 * t
            vector.pair_bf16(a, a + stride, packed + place)
            vector.pair_scaled(a, a + stride, first, second, faded + place, rest + place)


@piece
def _pack_state(state, dim, packed):
    for i in range(0, dim, 2):
        for d in range(0, dim, 16):
            a = state + 4 * (i * dim + d)
            vector.pair_floats(a, a + 4 * dim, packed + 2 * d * dim + 32 * i)


@piece
def _fade_scores(scores, first, fades, weights):
    """BLOCK rows of scores times their decays; `fades` is 0 where a key is later than its query."""
    width = first + BLOCK
    for i in range(first, first + BLOCK):
        source = carray(vector.pointer_f32(scores + 4 * i * CHUNK_TOKENS), (width,))
        target = carray(vector.pointer_u16(weights + 2 * i * CHUNK_TOKENS), (width,))
        fade = fades[CHUNK_TOKENS - 1 - i : CHUNK_TOKENS - 1 - i + width]
        for j in range(width):
            target[j] = to_bf16(source[j] * fade[j])


@piece
def _sum_outputs(inner, outer, count, dim, powers, out, out_stride):
    """A chunk's first token sees the state before it one step older."""
    for i in range(count):
        a = carray(vector.pointer_f32(inner + 4 * i * dim), (dim,))
        b = carray(vector.pointer_f32(outer + 4 * i * dim), (dim,))
        target = carray(vector.pointer_u16(out + i * out_stride), (dim,))
        decay = powers[i + 1]
        for d in range(dim):
            target[d] = to_bf16(a[d] + decay * b[d])
