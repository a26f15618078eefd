"""One token for each of S sequences, through all layers, in one compiled call.

Threads split a phase by weight rows, by tokens or by heads, and meet between phases. Weights and
cache are read where they lie, by address: nothing is copied, so new weights need no notice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import carray

from openm1.kernels.cpu import vector
from openm1.kernels.cpu.blocks import (
    ONE,
    ROW_BLOCK,
    SPLIT_TOKENS,
    ZERO,
    address_of,
    attend_split,
    copy_row,
    dot_rows,
    lightning_head,
    load_row,
    meet,
    merge_splits,
    pack_tiles,
    project,
    rms_norm,
    rotate,
    route,
    share,
    sigmoid_rows,
    silu_rows,
    sort_by_expert,
    store_row,
)
from openm1.kernels.cpu.compile import kernel, piece
from openm1.kernels.cpu.vector import FLOAT32


class Shape(NamedTuple):
    """The model's sizes; names as in `M1Config`."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    expert_width: int
    vocab_size: int
    eps: float
    output_norm_eps: float
    postnorm: bool


class Formats(NamedTuple):
    """`vector.FLOAT32`, `BFLOAT16` or `INT8` of each kind of tensor; routers are fp32."""

    linear: int
    norm: int
    embedding: int
    head: int
    cache: int
    tiles: bool
    """Whether the tile unit multiplies; bf16 weights and widths of whole tiles only."""


class LayerTable(NamedTuple):
    """One row per layer: addresses of its weights, with those of int8 scales behind."""

    full: np.ndarray  # [L] 1 softmax, 0 lightning
    ordinal: np.ndarray  # [L] which of its kind
    addresses: np.ndarray  # [L, 10], order below
    scales: np.ndarray  # [L, 10]
    residual: np.ndarray  # [L, 4] fp32: attention alpha, beta, experts' alpha, beta
    decay: np.ndarray  # [L, H] fp32: exp(-slope)
    frequencies: np.ndarray  # [R / 2] fp64, of the rotary angles
    final_norm: int
    embedding: int
    head: int


# Columns of `addresses`. A lightning layer has its qkv projection, output gate and output norm
# where a softmax layer has query, key and value projections.
NORM_1, QUERY, KEY, VALUE, OUT, NORM_2, ROUTER, W1, W3, W2 = (np.int64(i) for i in range(10))
QKV, GATE, NORM_OUT = QUERY, KEY, VALUE
FP32 = np.int64(FLOAT32)


class Cache(NamedTuple):
    """Addresses of `CachePools`, and the bytes between its layers and slots."""

    keys: int
    values: int
    layer_bytes: int
    page_tokens: int
    states: int
    slot_bytes: int


class Batch(NamedTuple):
    tokens: np.ndarray  # [S]
    positions: np.ndarray  # [S] tokens in the cache before this one
    slots: np.ndarray  # [S]
    pages: np.ndarray  # [S] addresses of int64 page ids
    first_part: np.ndarray  # [S + 1] attention parts of the rows before


class Workspace(NamedTuple):
    """Scratch; rows are rounded up so that products of four inputs stay inside."""

    hidden: np.ndarray  # [S, C]
    x: np.ndarray  # [S, C]
    projected: np.ndarray  # [S, 4 H D]
    attended: np.ndarray  # [S, H D]
    mixed: np.ndarray  # [S, C]
    router: np.ndarray  # [S, E]
    chosen: np.ndarray  # [S, K] int64
    gates: np.ndarray  # [S, K]
    rows: np.ndarray  # [R, C] inputs sorted by expert
    up: np.ndarray  # [R, F]
    gate: np.ndarray  # [R, F]
    down: np.ndarray  # [R, C]
    parts: np.ndarray  # [U, H / G, D + 2]
    cosines: np.ndarray  # [S, R / 2]
    sines: np.ndarray  # [S, R / 2]
    packed: np.ndarray  # uint16, the inputs of a product as tiles
    packed_up: np.ndarray  # uint16
    starts: np.ndarray  # [threads, E] int64
    counts: np.ndarray  # [threads, E] int64
    places: np.ndarray  # [threads, S, K] int64
    scores: np.ndarray  # [threads, H / G, SPLIT_TOKENS]
    vector: np.ndarray  # [threads, max(C, H D)]
    square: np.ndarray  # [threads, ROW_BLOCK, ROW_BLOCK]
    tile_setup: np.ndarray  # 64 bytes, read by address only


@piece
def embed(shape, formats, table, batch, space, first, stop):
    width = 4 if formats.embedding == FLOAT32 else 2
    for s in range(first, stop):
        at = table.embedding + batch.tokens[s] * shape.hidden_size * width
        load_row(formats.embedding, at, shape.hidden_size, space.hidden[s])
        for i in range(table.frequencies.size):
            angle = batch.positions[s] * table.frequencies[i]
            space.cosines[s, i] = np.cos(angle)
            space.sines[s, i] = np.sin(angle)


@piece
def norm_tokens(shape, formats, address, source, space, thread, first, stop):
    """x = RMS(source) for these tokens, packed as well where the tile unit multiplies."""
    size, weight = shape.hidden_size, space.vector[thread]
    if first < stop:
        load_row(formats.norm, address, size, weight)
    for s in range(first, stop):
        rms_norm(source[s], weight, shape.eps, size, space.x[s])
        if formats.tiles:
            pack_tiles(space.x[s], ZERO, size, size, s, space.packed)


@piece
def project_columns(shape, formats, table, layer, column, width, to, space, thread, threads, count):
    """This thread's share of projected[:, to : to + width] = x W^T."""
    first, stop = share(width, thread, threads, ROW_BLOCK)
    project(
        formats.linear,
        table.addresses[layer, column],
        table.scales[layer, column],
        first,
        stop,
        space.x,
        count,
        shape.hidden_size,
        address_of(space.projected) + 4 * to,
        4 * space.projected.shape[1],
        formats.tiles,
        address_of(space.packed),
        space.square[thread],
    )
    return to + first, to + stop


@piece
def lightning_layer(
    thread, threads, counter, target, shape, formats, table, layer, cache, batch, space
):
    """attended = sigmoid(gate) * RMS(o); returns the number of the last barrier."""
    count, size = batch.tokens.size, shape.num_heads * shape.head_dim
    dim, heads = shape.head_dim, shape.num_heads
    a, b = project_columns(
        shape, formats, table, layer, QKV, 3 * size, ZERO, space, thread, threads, count
    )
    silu_rows(space.projected, count, a, b)
    a, b = project_columns(
        shape, formats, table, layer, GATE, size, 3 * size, space, thread, threads, count
    )
    sigmoid_rows(space.projected, count, a, b)
    target += threads
    meet(counter, target)

    first, stop = share(count * heads, thread, threads, 1)
    for unit in range(first, stop):
        s, h = unit // heads, unit % heads
        at = cache.states + batch.slots[s] * cache.slot_bytes
        at += (table.ordinal[layer] * heads + h) * dim * dim * 4
        qkv = space.projected[s, 3 * dim * h : 3 * dim * (h + 1)]
        out = space.attended[s, dim * h : dim * (h + 1)]
        lightning_head(qkv, at, table.decay[layer, h], dim, out)
    target += threads
    meet(counter, target)

    first, stop = share(count, thread, threads, 1)
    weight = space.vector[thread]
    if first < stop:
        load_row(formats.norm, table.addresses[layer, NORM_OUT], size, weight)
    for s in range(first, stop):
        row, gate = space.attended[s], space.projected[s, 3 * size :]
        rms_norm(row, weight, shape.output_norm_eps, size, row)
        for i in range(size):
            row[i] *= gate[i]
        if formats.tiles:
            pack_tiles(row, ZERO, size, size, s, space.packed)
    target += threads
    meet(counter, target)
    return target


@piece
def page_table(batch, cache, s):
    count = batch.positions[s] // cache.page_tokens + 1
    return carray(vector.pointer_i64(batch.pages[s]), (count,))


@piece
def softmax_layer(
    thread, threads, counter, target, shape, formats, table, layer, cache, batch, space
):
    """attended = causal attention of each token over its pages; returns the last barrier."""
    count, size = batch.tokens.size, shape.num_heads * shape.head_dim
    dim, groups = shape.head_dim, shape.num_kv_heads
    kv_size, queries = groups * dim, shape.num_heads // groups
    for column, width, to in (
        (QUERY, size, ZERO),
        (KEY, kv_size, size),
        (VALUE, kv_size, size + kv_size),
    ):
        project_columns(
            shape, formats, table, layer, column, width, to, space, thread, threads, count
        )
    target += threads
    meet(counter, target)

    element = 4 if formats.cache == FLOAT32 else 2
    keys = cache.keys + table.ordinal[layer] * cache.layer_bytes
    values = cache.values + table.ordinal[layer] * cache.layer_bytes
    first, stop = share(count, thread, threads, 1)
    for s in range(first, stop):
        row = space.projected[s]
        for head in range(shape.num_heads + groups):
            rotate(row[head * dim : (head + 1) * dim], space.cosines[s], space.sines[s])
        page = page_table(batch, cache, s)[batch.positions[s] // cache.page_tokens]
        token = page * cache.page_tokens + batch.positions[s] % cache.page_tokens
        at = token * kv_size * element
        store_row(formats.cache, keys + at, kv_size, row[size : size + kv_size])
        store_row(formats.cache, values + at, kv_size, row[size + kv_size :])
    target += threads
    meet(counter, target)

    first, stop = share(batch.first_part[count], thread, threads, 1)
    s = 0
    for part in range(first, stop):
        while part >= batch.first_part[s + 1]:
            s += 1
        length = batch.positions[s] + 1
        splits = (length + SPLIT_TOKENS - 1) // SPLIT_TOKENS
        group = (part - batch.first_part[s]) // splits
        begin = (part - batch.first_part[s]) % splits * SPLIT_TOKENS
        attend_split(
            formats.cache,
            keys + group * dim * element,
            values + group * dim * element,
            kv_size * element,
            page_table(batch, cache, s),
            cache.page_tokens,
            begin,
            min(begin + SPLIT_TOKENS, length),
            address_of(space.projected[s, group * queries * dim :]),
            queries,
            dim,
            space.scores[thread],
            space.parts[part],
        )
    target += threads
    meet(counter, target)

    first, stop = share(count, thread, threads, 1)
    for s in range(first, stop):
        splits = (batch.first_part[s + 1] - batch.first_part[s]) // groups
        for head in range(shape.num_heads):
            begin = batch.first_part[s] + head // queries * splits
            out = space.attended[s, head * dim : (head + 1) * dim]
            merge_splits(space.parts, begin, begin + splits, head % queries, dim, out)
        if formats.tiles:
            pack_tiles(space.attended[s], ZERO, size, size, s, space.packed)
    target += threads
    meet(counter, target)
    return target


@piece
def add_residual(shape, space, alpha, beta, count, first, stop):
    """hidden = alpha * residual + beta * mixed, in these columns."""
    for s in range(count):
        hidden, mixed = space.hidden[s, first:stop], space.mixed[s, first:stop]
        source = space.x[s, first:stop] if shape.postnorm else hidden
        for i in range(hidden.size):
            hidden[i] = alpha * source[i] + beta * mixed[i]


@piece
def route_tokens(shape, table, layer, space, first, stop):
    size, experts = shape.hidden_size, shape.num_experts
    for s in range(first, stop):
        if experts == 1:
            space.chosen[s, 0], space.gates[s, 0] = 0, 1.0
            continue
        x, out = address_of(space.x[s]), address_of(space.router[s])
        router = table.addresses[layer, ROUTER]
        dot_rows(FP32, router, 4 * size, ZERO, experts, x, ZERO, ONE, size, out, ZERO)
        route(space.router[s], experts, shape.num_experts_per_tok, space.chosen[s], space.gates[s])


@piece
def expert_layer(thread, threads, counter, target, shape, formats, table, layer, batch, space):
    """mixed = the chosen experts' outputs, this thread's columns; the inputs are in x."""
    count, top_k, size = batch.tokens.size, shape.num_experts_per_tok, shape.hidden_size
    width = shape.expert_width
    starts, counts, places = space.starts[thread], space.counts[thread], space.places[thread]
    align = 16 if formats.tiles else 4
    # Each thread sorts for itself: it is less work than waiting for another to do it.
    sort_by_expert(space.chosen, count, top_k, shape.num_experts, align, starts, counts, places)
    first, stop = share(count, thread, threads, 1)
    for s in range(first, stop):
        for k in range(top_k):
            place = places[s, k]
            copy_row(space.x[s], space.rows[place])
            if formats.tiles:
                pack_tiles(space.x[s], ZERO, size, size, place, space.packed)
    target += threads
    meet(counter, target)

    first, stop = share(width, thread, threads, ROW_BLOCK)
    for e in range(shape.num_experts):
        if counts[e] == 0:
            continue
        begin = starts[e]
        for column, to in ((W1, space.gate), (W3, space.up)):
            project(
                formats.linear,
                table.addresses[layer, column] + e * width * size * _bytes(formats.linear),
                table.scales[layer, column] + 4 * e * width,
                first,
                stop,
                space.rows[begin:],
                counts[e],
                size,
                address_of(to[begin:]),
                4 * width,
                formats.tiles,
                address_of(space.packed) + 2 * begin * size,
                space.square[thread],
            )
        silu_rows(space.gate[begin:], counts[e], first, stop)
        for row in range(begin, begin + counts[e]):
            up, gate = space.up[row, first:stop], space.gate[row, first:stop]
            for i in range(up.size):
                up[i] *= gate[i]
            if formats.tiles:
                pack_tiles(space.up[row], first, stop, width, row, space.packed_up)
    target += threads
    meet(counter, target)

    first, stop = share(size, thread, threads, ROW_BLOCK)
    for e in range(shape.num_experts):
        if counts[e] == 0:
            continue
        begin = starts[e]
        project(
            formats.linear,
            table.addresses[layer, W2] + e * width * size * _bytes(formats.linear),
            table.scales[layer, W2] + 4 * e * size,
            first,
            stop,
            space.up[begin:],
            counts[e],
            width,
            address_of(space.down[begin:]),
            4 * size,
            formats.tiles,
            address_of(space.packed_up) + 2 * begin * width,
            space.square[thread],
        )
    for s in range(count):
        mixed = space.mixed[s, first:stop]
        for i in range(mixed.size):
            mixed[i] = 0.0
        for k in range(top_k):
            down, gate = space.down[places[s, k], first:stop], space.gates[s, k]
            for i in range(mixed.size):
                mixed[i] += gate * down[i]
    return target, first, stop


@piece
def _bytes(kind):
    return 4 if kind == FLOAT32 else 2 if kind == vector.BFLOAT16 else 1


def flatten(*parts: NamedTuple | np.ndarray) -> np.ndarray:
    """All fields as one array of int64, four each: a number, or an array's address and sizes.

    numba takes each argument of a call apart by itself while it holds the GIL; of dozens of arrays
    that would take longer than a layer.
    """
    fields = [f for part in parts for f in (part if isinstance(part, tuple) else (part,))]
    out = np.zeros((len(fields), 4), np.int64)
    for row, value in zip(out, fields, strict=True):
        if isinstance(value, np.ndarray):
            row[0], row[1 : 1 + value.ndim] = value.ctypes.data, value.shape
        elif isinstance(value, float):
            row[0] = np.float64(value).view(np.int64)
        else:
            row[0] = value
    return out


def _first_fields(*kinds: type) -> list[int]:
    counts = [len(kind._fields) for kind in kinds]  # pyright: ignore[reportAttributeAccessIssue]
    return [sum(counts[:i]) for i in range(len(counts) + 1)]


# Where each part begins in the flattened arguments.
SHAPE, FORMATS, TABLE, CACHE, BATCH, SPACE, LOGITS = _first_fields(
    Shape, Formats, LayerTable, Cache, Batch, Workspace
)


@piece
def read_f1(a, field):
    return carray(vector.pointer_f32(a[field, 0]), (a[field, 1],))


@piece
def read_f2(a, field):
    return carray(vector.pointer_f32(a[field, 0]), (a[field, 1], a[field, 2]))


@piece
def read_f3(a, field):
    return carray(vector.pointer_f32(a[field, 0]), (a[field, 1], a[field, 2], a[field, 3]))


@piece
def read_d1(a, field):
    return carray(vector.pointer_f64(a[field, 0]), (a[field, 1],))


@piece
def read_i1(a, field):
    return carray(vector.pointer_i64(a[field, 0]), (a[field, 1],))


@piece
def read_i2(a, field):
    return carray(vector.pointer_i64(a[field, 0]), (a[field, 1], a[field, 2]))


@piece
def read_i3(a, field):
    return carray(vector.pointer_i64(a[field, 0]), (a[field, 1], a[field, 2], a[field, 3]))


@piece
def read_u1(a, field):
    return carray(vector.pointer_u16(a[field, 0]), (a[field, 1],))


@piece
def read_shape(a):
    n = SHAPE
    return Shape(
        a[n, 0],
        a[n + 1, 0],
        a[n + 2, 0],
        a[n + 3, 0],
        a[n + 4, 0],
        a[n + 5, 0],
        a[n + 6, 0],
        a[n + 7, 0],
        vector.bits_double(a[n + 8, 0]),
        vector.bits_double(a[n + 9, 0]),
        a[n + 10, 0] != 0,
    )


@piece
def read_formats(a):
    n = FORMATS
    return Formats(a[n, 0], a[n + 1, 0], a[n + 2, 0], a[n + 3, 0], a[n + 4, 0], a[n + 5, 0] != 0)


@piece
def read_table(a):
    n = TABLE
    return LayerTable(
        read_i1(a, n),
        read_i1(a, n + 1),
        read_i2(a, n + 2),
        read_i2(a, n + 3),
        read_f2(a, n + 4),
        read_f2(a, n + 5),
        read_d1(a, n + 6),
        a[n + 7, 0],
        a[n + 8, 0],
        a[n + 9, 0],
    )


@piece
def read_cache(a):
    n = CACHE
    return Cache(a[n, 0], a[n + 1, 0], a[n + 2, 0], a[n + 3, 0], a[n + 4, 0], a[n + 5, 0])


@piece
def read_batch(a):
    n = BATCH
    return Batch(
        read_i1(a, n), read_i1(a, n + 1), read_i1(a, n + 2), read_i1(a, n + 3), read_i1(a, n + 4)
    )


@piece
def read_workspace(a):
    n = SPACE
    return Workspace(
        read_f2(a, n),
        read_f2(a, n + 1),
        read_f2(a, n + 2),
        read_f2(a, n + 3),
        read_f2(a, n + 4),
        read_f2(a, n + 5),
        read_i2(a, n + 6),
        read_f2(a, n + 7),
        read_f2(a, n + 8),
        read_f2(a, n + 9),
        read_f2(a, n + 10),
        read_f2(a, n + 11),
        read_f3(a, n + 12),
        read_f2(a, n + 13),
        read_f2(a, n + 14),
        read_u1(a, n + 15),
        read_u1(a, n + 16),
        read_i2(a, n + 17),
        read_i2(a, n + 18),
        read_i3(a, n + 19),
        read_f3(a, n + 20),
        read_f2(a, n + 21),
        read_f3(a, n + 22),
        read_u1(a, n + 23),
    )


@kernel
def decode_step(thread, threads, counter, arguments):
    """Logits [S, V] of the next tokens; the cache then holds these tokens.

    `arguments` are Shape, Formats, LayerTable, Cache, Batch, Workspace and the logits, flattened.
    """
    shape, formats, cache = read_shape(arguments), read_formats(arguments), read_cache(arguments)
    table, batch = read_table(arguments), read_batch(arguments)
    space, logits = read_workspace(arguments), read_f2(arguments, LOGITS)
    target = ZERO
    if formats.tiles:
        vector.tile_configure(address_of(space.tile_setup))
    count, size = batch.tokens.size, shape.hidden_size
    first, stop = share(count, thread, threads, 1)
    columns = share(size, thread, threads, ROW_BLOCK)
    embed(shape, formats, table, batch, space, first, stop)
    for layer in range(table.full.size):
        norm = table.addresses[layer, NORM_1]
        norm_tokens(shape, formats, norm, space.hidden, space, thread, first, stop)
        target += threads
        meet(counter, target)
        if table.full[layer]:
            target = softmax_layer(
                thread, threads, counter, target, shape, formats, table, layer, cache, batch, space
            )
        else:
            target = lightning_layer(
                thread, threads, counter, target, shape, formats, table, layer, cache, batch, space
            )
        project(
            formats.linear,
            table.addresses[layer, OUT],
            table.scales[layer, OUT],
            columns[0],
            columns[1],
            space.attended,
            count,
            shape.num_heads * shape.head_dim,
            address_of(space.mixed),
            4 * size,
            formats.tiles,
            address_of(space.packed),
            space.square[thread],
        )
        scale = table.residual[layer]
        add_residual(shape, space, scale[0], scale[1], count, columns[0], columns[1])
        target += threads
        meet(counter, target)

        norm = table.addresses[layer, NORM_2]
        norm_tokens(shape, formats, norm, space.hidden, space, thread, first, stop)
        route_tokens(shape, table, layer, space, first, stop)
        target += threads
        meet(counter, target)
        target, a, b = expert_layer(
            thread, threads, counter, target, shape, formats, table, layer, batch, space
        )
        add_residual(shape, space, scale[2], scale[3], count, a, b)
        target += threads
        meet(counter, target)

    norm_tokens(shape, formats, table.final_norm, space.hidden, space, thread, first, stop)
    target += threads
    meet(counter, target)
    a, b = share(shape.vocab_size, thread, threads, ROW_BLOCK)
    project(
        formats.head,
        table.head,
        ZERO,
        a,
        b,
        space.x,
        count,
        size,
        address_of(logits),
        4 * shape.vocab_size,
        formats.tiles and formats.head == vector.BFLOAT16,
        address_of(space.packed),
        space.square[thread],
    )
    if formats.tiles:
        vector.tile_release()


def make_workspace(
    shape: Shape, formats: Formats, rotary_pairs: int, *, rows: int, parts: int, threads: int
) -> Workspace:
    """For up to `rows` sequences and `parts` attention parts."""
    size, heads = shape.hidden_size, shape.num_heads * shape.head_dim
    experts, top_k, width = shape.num_experts, shape.num_experts_per_tok, shape.expert_width
    queries = shape.num_heads // shape.num_kv_heads
    s = rows + 4
    # Each expert's rows begin at a multiple of the inputs that are multiplied together.
    r = rows * top_k + 16 * min(experts, rows * top_k) + 4
    groups = -(-max(rows, r) // 16)
    in_fours = -(-queries // 4) * 4

    def floats(*sizes: int) -> np.ndarray:
        return np.zeros(sizes, np.float32)

    # Palette 1: eight tiles of 16 rows of 64 bytes.
    setup = np.zeros(64, np.uint8)
    setup[0] = 1
    setup[16:32].view(np.uint16)[:] = 64
    setup[48:56] = 16
    return Workspace(
        hidden=floats(s, size),
        x=floats(s, size),
        projected=floats(s, 4 * heads),
        attended=floats(s, heads),
        mixed=floats(s, size),
        router=floats(s, experts),
        chosen=np.zeros((s, top_k), np.int64),
        gates=floats(s, top_k),
        rows=floats(r, size),
        up=floats(r, width),
        gate=floats(r, width),
        down=floats(r, size),
        parts=floats(parts, in_fours, shape.head_dim + 2),
        cosines=floats(s, rotary_pairs),
        sines=floats(s, rotary_pairs),
        packed=np.zeros(groups * 16 * max(size, heads) if formats.tiles else 0, np.uint16),
        packed_up=np.zeros(groups * 16 * width if formats.tiles else 0, np.uint16),
        starts=np.zeros((threads, experts), np.int64),
        counts=np.zeros((threads, experts), np.int64),
        places=np.zeros((threads, s, top_k), np.int64),
        scores=floats(threads, in_fours, SPLIT_TOKENS),
        vector=floats(threads, max(size, heads)),
        square=floats(threads, ROW_BLOCK, ROW_BLOCK),
        tile_setup=setup,
    )
