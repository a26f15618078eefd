"""What a decode step is given, and how it crosses from Python into compiled code."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import carray

from openm1.kernels.cpu import vector
from openm1.kernels.cpu.blocks import ROW_BLOCK, SPLIT_TOKENS
from openm1.kernels.cpu.compile import piece
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
    square: np.ndarray  # [threads, 2 ROW_BLOCK, ROW_BLOCK]
    query: np.ndarray  # uint16 [threads, 16 D], queries of one key/value head as tiles
    tile_setup: np.ndarray  # 64 bytes, read by address only


def flatten(*parts: NamedTuple | np.ndarray) -> np.ndarray:
    """All fields as one array of int64, four each: a number, or an array's address and sizes."""
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
def read_arguments(address, num_fields):
    """What `flatten` made."""
    return carray(vector.pointer_i64(address), (num_fields, 4))


@piece
def read_f2(a, field):
    return carray(vector.pointer_f32(a[field, 0]), (a[field, 1], a[field, 2]))


@piece
def read_d2(a, field):
    return carray(vector.pointer_f64(a[field, 0]), (a[field, 1], a[field, 2]))


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
def read_u2(a, field):
    return carray(vector.pointer_u16(a[field, 0]), (a[field, 1], a[field, 2]))


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
        read_u2(a, n + 23),
        read_u1(a, n + 24),
    )


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
        square=floats(threads, 2 * ROW_BLOCK, ROW_BLOCK),
        query=np.zeros((threads, 16 * shape.head_dim), np.uint16),
        tile_setup=setup,
    )
