"""The pieces of a decode step. Each takes its thread's share of rows, tokens or heads.

Activations are fp32 whatever the weights are; with the tile unit, inputs of products are rounded to
bf16 first. Arrays are workspace, addresses are weights and cache. Rows of workspace behind the last
token are scratch: products of four inputs at a time may read and write them.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from openm1.kernels.cpu import vector
from openm1.kernels.cpu.compile import piece
from openm1.kernels.cpu.vector import BFLOAT16, FLOAT32, LANES

# Weight rows are shared out between threads in runs of two tiles.
ROW_BLOCK = 2 * vector.TILE_ROWS
# Tokens of context that one thread attends to at a time. Fixed, so that the order of the sums does
# not depend on the number of threads.
SPLIT_TOKENS = 256

# Constants as arguments: a plain 0 is a type of its own, and would be compiled for as such.
ZERO, ONE = np.int64(0), np.int64(1)
# From one fp32 number to the next.
STEP = np.int64(4)


@piece
def address_of(array):
    """Signed, as all addresses here: each kind of integer would be compiled for by itself."""
    return np.int64(array.ctypes.data)


@piece
def share(total, thread, num_threads, block):
    """This thread's range of `total` rows, in whole blocks."""
    blocks = (total + block - 1) // block
    first = blocks * thread // num_threads * block
    stop = blocks * (thread + 1) // num_threads * block
    return min(first, total), min(stop, total)


@piece
def wait_for(counter, target):
    """Waits until others have counted up to `target`."""
    spins = 0
    while vector.atomic_load(counter) < target:
        vector.pause()
        spins += 1
        if vector.HAS_YIELD and spins > 256 and spins % 32 == 0:
            # The other thread may be waiting for this very core.
            vector.give_up_core()


@piece
def meet(counter, target):
    """Waits until all threads have come here: `counter` counts arrivals since the step began."""
    vector.atomic_add(counter, ONE)
    wait_for(counter, target)


@piece
def load_row(kind, address, size, out):
    """Stored elements as floats."""
    if kind == FLOAT32:
        source = carray(vector.pointer_f32(address), (size,))
        for i in range(size):
            out[i] = source[i]
    else:
        bits = carray(vector.pointer_u16(address), (size,))
        for i in range(size):
            out[i] = vector.bits_float(np.uint32(bits[i]) << np.uint32(16))


@piece
def copy_row(source, target):
    for i in range(source.size):
        target[i] = source[i]


@piece
def to_bf16(x):
    """Bits of the nearest bf16, ties to even; NaN stays NaN."""
    bits = vector.float_bits(x)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded) if x == x else np.uint16(0x7FC0)


@piece
def store_row(kind, address, size, row):
    """Floats as stored elements."""
    if kind == FLOAT32:
        target = carray(vector.pointer_f32(address), (size,))
        for i in range(size):
            target[i] = row[i]
    else:
        bits = carray(vector.pointer_u16(address), (size,))
        for i in range(size):
            bits[i] = to_bf16(row[i])


@piece
def pack_tiles(row, first, stop, size, index, packed):
    """Input `index`, columns first to stop, as the tile unit reads it.

    `packed` holds groups of 16 inputs; in a group, blocks of 32 columns; in a block, 16 pairs of
    columns, each pair of all 16 inputs side by side.
    """
    to = address_of(packed) + 2 * ((index // 16) * 16 * size + (index % 16) * 2)
    for block in range(first // 32, stop // 32):
        vector.pack_block(address_of(row) + 128 * block, to + 1024 * block)


@piece
def dot_rows(kind, w, w_stride, scales, count, x, x_stride, num_inputs, size, out, out_stride):
    """out[m, n] = w[n] . x[m] for `count` weight rows; addresses and byte strides."""
    n = 0
    if num_inputs == 1:
        while n + 8 <= count:
            at, to, scale = w + n * w_stride, out + 4 * n, scales + 4 * n
            if kind == FLOAT32:
                vector.dots_8x1_f32(at, w_stride, x, x_stride, size, scale, to, out_stride)
            elif kind == BFLOAT16:
                vector.dots_8x1_bf16(at, w_stride, x, x_stride, size, scale, to, out_stride)
            else:
                vector.dots_8x1_i8(at, w_stride, x, x_stride, size, scale, to, out_stride)
            n += 8
    else:
        while n + 4 <= count:
            at, scale = w + n * w_stride, scales + 4 * n
            for m in range(0, num_inputs, 4):
                here, to = x + m * x_stride, out + m * out_stride + 4 * n
                if kind == FLOAT32:
                    vector.dots_4x4_f32(at, w_stride, here, x_stride, size, scale, to, out_stride)
                elif kind == BFLOAT16:
                    vector.dots_4x4_bf16(at, w_stride, here, x_stride, size, scale, to, out_stride)
                else:
                    vector.dots_4x4_i8(at, w_stride, here, x_stride, size, scale, to, out_stride)
            n += 4
    while n < count:
        at, scale = w + n * w_stride, scales + 4 * n
        for m in range(num_inputs):
            here, to = x + m * x_stride, out + m * out_stride + 4 * n
            if kind == FLOAT32:
                vector.dots_1x1_f32(at, w_stride, here, x_stride, size, scale, to, out_stride)
            elif kind == BFLOAT16:
                vector.dots_1x1_bf16(at, w_stride, here, x_stride, size, scale, to, out_stride)
            else:
                vector.dots_1x1_i8(at, w_stride, here, x_stride, size, scale, to, out_stride)
        n += 1


@piece
def tile_products(w, w_stride, packed, group_bytes, m, num_inputs, size, out):
    """out[n, i] = w[n] . x[m + i] for ROW_BLOCK rows; returns how many inputs were taken, 16 or 32.

    `out` is the address of ROW_BLOCK rows of as many floats.
    """
    here = packed + (m // 16) * group_bytes
    if m + 16 < num_inputs:
        vector.tile_dots_2(w, w_stride, here, group_bytes, size, out, 4 * ROW_BLOCK)
        return 32
    vector.tile_dots_1(w, w_stride, here, group_bytes, size, out, 4 * ROW_BLOCK)
    return 16


@piece
def tile_rows(w, w_stride, packed, num_inputs, size, out, out_stride, scratch):
    """`dot_rows` for ROW_BLOCK rows of bf16 weights and packed inputs, by the tile unit."""
    m = 0
    products, turned = address_of(scratch), address_of(scratch[ROW_BLOCK:])
    while m < num_inputs:
        width = tile_products(w, w_stride, packed, 32 * size, m, num_inputs, size, products)
        for i in range(0, width, 16):
            for n in range(0, ROW_BLOCK, 16):
                here = products + 4 * (n * ROW_BLOCK + i)
                there = turned + 4 * (i * ROW_BLOCK + n)
                vector.transpose_tile(here, 4 * ROW_BLOCK, there, 4 * ROW_BLOCK)
        for i in range(min(width, num_inputs - m)):
            row = carray(vector.pointer_f32(out + (m + i) * out_stride), (ROW_BLOCK,))
            copy_row(scratch[ROW_BLOCK + i], row)
        m += width


@piece
def tile_swiglu(w1, w3, w_stride, packed, num_inputs, size, first, stop, width, out, scratch):
    """silu(W1 x) * W3 x for columns first to stop of `width`, packed again at `out`.

    Products come out with a row for each column: two rows side by side are how the next product
    takes them.
    """
    gate, up = scratch[:ROW_BLOCK], scratch[ROW_BLOCK:]
    for n in range(first, stop, ROW_BLOCK):
        a, b, m = w1 + n * w_stride, w3 + n * w_stride, 0
        while m < num_inputs:
            products = address_of(gate)
            taken = tile_products(a, w_stride, packed, 32 * size, m, num_inputs, size, products)
            products = address_of(up)
            tile_products(b, w_stride, packed, 32 * size, m, num_inputs, size, products)
            for i in range(0, taken, 16):
                block = out + 2 * (m + i) * width + 32 * n
                for pair in range(ROW_BLOCK // 2):
                    words = carray(vector.pointer_u32(block + 64 * pair), (16,))
                    gate_0, gate_1 = gate[2 * pair, i : i + 16], gate[2 * pair + 1, i : i + 16]
                    up_0, up_1 = up[2 * pair, i : i + 16], up[2 * pair + 1, i : i + 16]
                    for lane in range(16):
                        low = to_bf16(silu(gate_0[lane]) * up_0[lane])
                        high = to_bf16(silu(gate_1[lane]) * up_1[lane])
                        words[lane] = np.uint32(low) | np.uint32(high) << np.uint32(16)
            m += taken


@piece
def project(
    kind, w, scales, first, stop, x, num_inputs, size, out, out_stride, tiles, packed, scratch
):
    """out[m, n] = w[n] . x[m] for weight rows first to stop; `out` is the address of out[0, 0].

    With `tiles`, whole blocks of rows take the inputs from `packed`.
    """
    w_stride = size * (4 if kind == FLOAT32 else 2 if kind == BFLOAT16 else 1)
    n = first
    if tiles:
        while n + ROW_BLOCK <= stop:
            at, to = w + n * w_stride, out + 4 * n
            tile_rows(at, w_stride, packed, num_inputs, size, to, out_stride, scratch)
            n += ROW_BLOCK
    if n < stop:
        at, scale, to = w + n * w_stride, scales + 4 * n, out + 4 * n
        x_at, x_stride = address_of(x), 4 * x.shape[1]
        dot_rows(
            kind, at, w_stride, scale, stop - n, x_at, x_stride, num_inputs, size, to, out_stride
        )


@piece
def rms_scale(x, eps, size):
    """1 / sqrt(mean(x^2) + eps)."""
    total = np.float32(0.0)
    for i in range(size):
        total += x[i] * x[i]
    return np.float32(1.0) / np.sqrt(total / np.float32(size) + np.float32(eps))


@piece
def rms_norm(x, weight, eps, size, out):
    """out = weight * x / sqrt(mean(x^2) + eps)."""
    scale = rms_scale(x, eps, size)
    for i in range(size):
        out[i] = x[i] * scale * weight[i]


@piece
def sigmoid(x):
    return np.float32(1.0) / (np.float32(1.0) + vector.exp_f32(-x))


@piece
def sigmoid_rows(out, num_inputs, first, stop):
    # Loops run over slices from 0: LLVM vectorises only where it sees that no index is negative.
    for m in range(num_inputs):
        row = out[m, first:stop]
        for n in range(row.size):
            row[n] = sigmoid(row[n])


@piece
def silu(x):
    return x / (np.float32(1.0) + vector.exp_f32(-x))


@piece
def silu_rows(out, num_inputs, first, stop):
    for m in range(num_inputs):
        row = out[m, first:stop]
        for n in range(row.size):
            row[n] = silu(row[n])


@piece
def lightning_head(qkv, state_address, decay, dim, out):
    """One token of one head: S = decay S + k v, out = q S. `qkv` is [q | k | v]."""
    state = carray(vector.pointer_f32(state_address), (dim, dim))
    q, k, v = qkv[:dim], qkv[dim : 2 * dim], qkv[2 * dim :]
    for j in range(dim):
        out[j] = 0.0
    for i in range(dim):
        row = state[i]
        for j in range(dim):
            value = decay * row[j] + k[i] * v[j]
            row[j] = value
            out[j] += q[i] * value


@piece
def rotate(head, cosines, sines):
    """Rotary position of one head, in halves."""
    half = cosines.size
    for i in range(half):
        a, b = head[i], head[half + i]
        head[i] = a * cosines[i] - b * sines[i]
        head[half + i] = b * cosines[i] + a * sines[i]


@piece
def largest(address, count):
    """Of `count` floats; NaN if any is NaN."""
    whole = count // LANES * LANES
    best = vector.largest_f32(address, whole)
    rest = carray(vector.pointer_f32(address + 4 * whole), (count - whole,))
    for value in rest:
        # A NaN on either side stays.
        if value > best or value != value:
            best = value
    return best


@piece
def score_tiles(keys, row_bytes, count, packed, num_queries, dim, scores, begin, scratch):
    """scores[r, begin + n] = q[r] . key[n] for up to 16 packed queries, by the tile unit.

    Keys are read in blocks of ROW_BLOCK; what lies behind the last one is read and not used.
    """
    products, turned = address_of(scratch), address_of(scratch[ROW_BLOCK:])
    for n in range(0, count, ROW_BLOCK):
        at = keys + n * row_bytes
        vector.tile_dots_1(at, row_bytes, packed, ZERO, dim, products, 4 * ROW_BLOCK)
        for half in range(0, ROW_BLOCK, 16):
            here = products + 4 * half * ROW_BLOCK
            vector.transpose_tile(here, 4 * ROW_BLOCK, turned + 4 * half, 4 * ROW_BLOCK)
        for r in range(num_queries):
            copy_row(scratch[ROW_BLOCK + r], scores[r, begin + n : begin + n + ROW_BLOCK])


@piece
def attend_split(
    kind,
    keys,
    values,
    row_bytes,
    pages,
    page_tokens,
    first,
    stop,
    q,
    num_queries,
    dim,
    scores,
    out,
    tiles,
    packed,
    scratch,
):
    """Softmax attention of one key/value head's queries over tokens first to stop.

    `keys` and `values` are addresses of the head's row of token 0 of page 0; `row_bytes` separates
    tokens. out[r] = [sum of weights times values | largest score | sum of weights]. With `tiles`,
    which needs pages of whole ROW_BLOCKs, queries are taken from `packed`.
    """
    count, scale = stop - first, np.float32(1.0) / np.sqrt(np.float32(dim))
    q_stride, score_stride, out_stride = 4 * dim, 4 * scores.shape[1], 4 * out.shape[1]
    token = first
    while token < stop:
        inside = token % page_tokens
        run = min(page_tokens - inside, stop - token)
        at = keys + (pages[token // page_tokens] * page_tokens + inside) * row_bytes
        begin = token - first
        if tiles:
            score_tiles(at, row_bytes, run, packed, num_queries, dim, scores, begin, scratch)
        else:
            to = address_of(scores) + 4 * begin
            dot_rows(
                kind, at, row_bytes, ZERO, run, q, q_stride, num_queries, dim, to, score_stride
            )
        token += run
    for r in range(num_queries):
        row = scores[r, :count]
        best = largest(address_of(row), count)
        total = np.float32(0.0)
        for i in range(row.size):
            row[i] = vector.exp_f32((row[i] - best) * scale)
            total += row[i]
        for d in range(dim):
            out[r, d] = 0.0
        out[r, dim], out[r, dim + 1] = best * scale, total
    token = first
    while token < stop:
        inside = token % page_tokens
        run = min(page_tokens - inside, stop - token)
        at = values + (pages[token // page_tokens] * page_tokens + inside) * row_bytes
        p = address_of(scores) + 4 * (token - first)
        sum_values(
            kind, p, score_stride, at, row_bytes, run, address_of(out), out_stride, num_queries, dim
        )
        token += run


@piece
def sum_values(kind, p, p_stride, v, v_stride, count, out, out_stride, num_queries, dim):
    """out[r] += sum_n p[r, n] v[n]; addresses and byte strides."""
    element = 4 if kind == FLOAT32 else 2
    d = 0
    while d + 4 * LANES <= dim and num_queries >= 4:
        for r in range(0, num_queries - 3, 4):
            weights, to = p + r * p_stride, out + r * out_stride + 4 * d
            values = v + d * element
            if kind == FLOAT32:
                vector.weighted_sum_4x4_f32(
                    weights, p_stride, STEP, values, v_stride, count, to, out_stride, 4 * LANES
                )
            else:
                vector.weighted_sum_4x4_bf16(
                    weights, p_stride, STEP, values, v_stride, count, to, out_stride, 4 * LANES
                )
        d += 4 * LANES
    wide, d = d, 0
    while d < dim:
        width = min(LANES, dim - d)
        # Queries that came in fours have their leading dimensions already.
        done = num_queries // 4 * 4 if d < wide else 0
        for r in range(done, num_queries):
            weights, to = p + r * p_stride, out + r * out_stride + 4 * d
            values = v + d * element
            if kind == FLOAT32:
                vector.weighted_sum_1x1_f32(
                    weights, p_stride, STEP, values, v_stride, count, to, out_stride, width
                )
            else:
                vector.weighted_sum_1x1_bf16(
                    weights, p_stride, STEP, values, v_stride, count, to, out_stride, width
                )
        d += LANES


@piece
def merge_splits(parts, first, stop, r, dim, out):
    """Puts the splits' partial attentions of one query together."""
    best = np.float32(-np.inf)
    for i in range(first, stop):
        best = max(best, parts[i, r, dim])
    total = np.float32(0.0)
    for d in range(dim):
        out[d] = 0.0
    for i in range(first, stop):
        weight = vector.exp_f32(parts[i, r, dim] - best)
        total += weight * parts[i, r, dim + 1]
        for d in range(dim):
            out[d] += weight * parts[i, r, d]
    for d in range(dim):
        out[d] /= total


@piece
def route(logits, num_experts, top_k, chosen, gates):
    """The top_k likeliest experts of one token and their renormalised probabilities.

    The softmax over all experts cancels in the renormalisation.
    """
    for k in range(top_k):
        best = -1
        for e in range(num_experts):
            taken = False
            for j in range(k):
                taken = taken or chosen[j] == e
            if not taken and (best < 0 or logits[e] > logits[best]):
                best = e
        chosen[k] = best
    total = np.float32(0.0)
    for k in range(top_k):
        gates[k] = vector.exp_f32(logits[chosen[k]] - logits[chosen[0]])
        total += gates[k]
    for k in range(top_k):
        gates[k] /= total


@piece
def sort_by_expert(chosen, num_tokens, top_k, num_experts, align, starts, counts, places):
    """Rows of each expert side by side, its first at a multiple of `align`.

    places[t, k] is the row of token t's k-th expert.
    """
    for e in range(num_experts):
        counts[e] = 0
    for t in range(num_tokens):
        for k in range(top_k):
            counts[chosen[t, k]] += 1
    at = 0
    for e in range(num_experts):
        starts[e] = at
        at += (counts[e] + align - 1) // align * align
        counts[e] = 0
    for t in range(num_tokens):
        for k in range(top_k):
            e = chosen[t, k]
            places[t, k] = starts[e] + counts[e]
            counts[e] += 1
