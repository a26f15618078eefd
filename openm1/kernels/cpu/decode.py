"""One token for each of S sequences, through all layers, in one compiled call.

Threads split a phase by weight rows, by tokens or by heads, and meet between phases. Weights and
cache are read where they lie, by address: nothing is copied, so new weights need no notice.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from openm1.kernels.cpu import vector
from openm1.kernels.cpu.arguments import (
    FP32,
    GATE,
    KEY,
    LOGITS,
    NORM_1,
    NORM_2,
    NORM_OUT,
    OUT,
    QKV,
    QUERY,
    ROUTER,
    VALUE,
    W1,
    W2,
    W3,
    read_arguments,
    read_batch,
    read_cache,
    read_f2,
    read_formats,
    read_shape,
    read_table,
    read_workspace,
)
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
    tile_swiglu,
)
from openm1.kernels.cpu.compile import Job, piece
from openm1.kernels.cpu.vector import FLOAT32, TILE_ROWS


@piece
def share_tokens(formats, count, thread, threads):
    """This thread's tokens. Sixteen packed inputs share cache lines, so they stay together."""
    return share(count, thread, threads, TILE_ROWS if formats.tiles else 1)


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

    first, stop = share_tokens(formats, count, thread, threads)
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
    first, stop = share_tokens(formats, count, thread, threads)
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

    tiles = formats.tiles and formats.cache == vector.BFLOAT16 and queries <= 16
    tiles = tiles and dim % 32 == 0 and cache.page_tokens % ROW_BLOCK == 0
    first, stop = share(batch.first_part[count], thread, threads, 1)
    s = 0
    for part in range(first, stop):
        while part >= batch.first_part[s + 1]:
            s += 1
        length = batch.positions[s] + 1
        splits = (length + SPLIT_TOKENS - 1) // SPLIT_TOKENS
        group = (part - batch.first_part[s]) // splits
        begin = (part - batch.first_part[s]) % splits * SPLIT_TOKENS
        if tiles:
            for r in range(queries):
                at = (group * queries + r) * dim
                pack_tiles(
                    space.projected[s, at : at + dim], ZERO, dim, dim, r, space.query[thread]
                )
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
            tiles,
            address_of(space.query[thread]),
            space.square[thread],
        )
    target += threads
    meet(counter, target)

    first, stop = share_tokens(formats, count, thread, threads)
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
def gate_experts(thread, threads, shape, formats, table, layer, space):
    """silu(W1 x) * W3 x of each expert's rows, these columns; as tiles where they multiply."""
    size, width = shape.hidden_size, shape.expert_width
    starts, counts = space.starts[thread], space.counts[thread]
    first, stop = share(width, thread, threads, ROW_BLOCK)
    for e in range(shape.num_experts):
        if counts[e] == 0:
            continue
        begin, matrix = starts[e], e * width * size * _bytes(formats.linear)
        if formats.tiles:
            tile_swiglu(
                table.addresses[layer, W1] + matrix,
                table.addresses[layer, W3] + matrix,
                2 * size,
                address_of(space.packed) + 2 * begin * size,
                counts[e],
                size,
                first,
                stop,
                width,
                address_of(space.packed_up) + 2 * begin * width,
                space.square[thread],
            )
            continue
        for column, to in ((W1, space.gate), (W3, space.up)):
            at, scale = table.addresses[layer, column], table.scales[layer, column]
            dot_rows(
                formats.linear,
                at + matrix + first * size * _bytes(formats.linear),
                size * _bytes(formats.linear),
                scale + 4 * (e * width + first),
                stop - first,
                address_of(space.rows[begin:]),
                4 * size,
                counts[e],
                size,
                address_of(to[begin:]) + 4 * first,
                4 * width,
            )
        silu_rows(space.gate[begin:], counts[e], first, stop)
        for row in range(begin, begin + counts[e]):
            up, gate = space.up[row, first:stop], space.gate[row, first:stop]
            for i in range(up.size):
                up[i] *= gate[i]


@piece
def expert_layer(thread, threads, counter, target, shape, formats, table, layer, batch, space):
    """mixed = the chosen experts' outputs, this thread's columns; the inputs are in x."""
    count, top_k, size = batch.tokens.size, shape.num_experts_per_tok, shape.hidden_size
    width = shape.expert_width
    starts, counts, places = space.starts[thread], space.counts[thread], space.places[thread]
    align = 16 if formats.tiles else 4
    # Each thread sorts for itself: it is less work than waiting for another to do it.
    sort_by_expert(space.chosen, count, top_k, shape.num_experts, align, starts, counts, places)
    for s in range(count):
        for k in range(top_k):
            # By expert, not by token: rows of one expert share cache lines.
            if space.chosen[s, k] % threads != thread:
                continue
            if formats.tiles:
                pack_tiles(space.x[s], ZERO, size, size, places[s, k], space.packed)
            else:
                copy_row(space.x[s], space.rows[places[s, k]])
    target += threads
    meet(counter, target)

    gate_experts(thread, threads, shape, formats, table, layer, space)
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


@Job
def decode_step(thread, threads, counter, address):
    """Logits [S, V] of the next tokens; the cache then holds these tokens.

    At the address are Shape, Formats, LayerTable, Cache, Batch, Workspace and logits, flattened.
    """
    arguments = read_arguments(address, LOGITS + 1)
    shape, formats, cache = read_shape(arguments), read_formats(arguments), read_cache(arguments)
    table, batch = read_table(arguments), read_batch(arguments)
    space, logits = read_workspace(arguments), read_f2(arguments, LOGITS)
    target = ZERO
    if formats.tiles:
        vector.tile_configure(address_of(space.tile_setup))
    count, size = batch.tokens.size, shape.hidden_size
    first, stop = share_tokens(formats, count, thread, threads)
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
