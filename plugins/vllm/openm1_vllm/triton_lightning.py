"""Lightning attention on a GPU: a prefill of two kernels and a decode of one.

With m tokens in a chunk, i = 1..m, s a head's slope and S the state before the chunk:
  O_i = e^{-s i} q_i S + sum_{j<=i} e^{-s(i-j)} (q_i . k_j) v_j
  S  <- e^{-s m} S + sum_j e^{-s(m-j)} k_j^T v_j
The first kernel walks each sequence and keeps the state before every chunk, the second takes all
chunks at once. States, decays and sums are fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from openm1.kernels.packing import PackedLayout

CHUNK_TOKENS = 64
MAX_COLUMNS = 64
# Three products of the tensor cores' 19-bit numbers, which are as good as one of fp32.
PRECISION = tl.constexpr("tf32x3")


def lightning_prefill_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    layout: PackedLayout,
    initial_state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [T, H, D] in the dtype of `q`, fp32 states [N, H, D, D] after each sequence.

    q, k, v are [T, H, D] with the same strides, the last of them 1. D is a power of two from 16 on.
    """
    _check(q, k, v)
    heads, dim = q.shape[1:]
    bounds = layout.cu_seqlens
    per_sequence = (torch.diff(bounds) + CHUNK_TOKENS - 1) // CHUNK_TOKENS
    first_chunk = torch.cumsum(per_sequence, 0) - per_sequence  # [N]
    num_chunks = sum(-(-length // CHUNK_TOKENS) for length in layout.lengths)
    numbers = torch.arange(num_chunks, device=q.device)
    sequence = torch.searchsorted(first_chunk, numbers, right=True) - 1  # [M]

    before = initial_state.new_empty(num_chunks, heads, dim, dim)
    last = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    out = q.new_empty(q.shape)
    columns = min(dim, MAX_COLUMNS)
    sizes = {"D": dim, "COLUMNS": columns, "CHUNK": CHUNK_TOKENS}
    _states_kernel[(layout.num_sequences * heads, dim // columns)](
        k, v, slopes, bounds, first_chunk, initial_state.contiguous(), before, last,
        heads, *k.stride()[:2], **sizes,
    )  # fmt: skip
    _outputs_kernel[(num_chunks, heads, dim // columns)](
        q, k, v, slopes, bounds, first_chunk, sequence, before, out,
        heads, *q.stride()[:2], **sizes,
    )  # fmt: skip
    return out, last


def lightning_decode_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    states: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """One token a row [S, H, D]: writes `out` (contiguous) and the states [P, H, D, D] of `pages`.

    Rows whose page is negative are left alone. A state is contiguous; pages may lie apart.
    """
    _check(q, k, v)
    rows, heads, dim = q.shape
    columns = min(dim, MAX_COLUMNS)
    _decode_kernel[(rows, heads, dim // columns)](
        q, k, v, slopes, states, pages, out,
        heads, *q.stride()[:2], states.stride(0), D=dim, COLUMNS=columns,
    )  # fmt: skip


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    dim = q.shape[-1]
    if dim < 16 or dim & (dim - 1):
        raise ValueError(f"head_dim is {dim}; allowed are powers of two from 16 on")
    if not (q.stride() == k.stride() == v.stride()) or q.stride(-1) != 1:
        raise ValueError(f"q, k, v have strides {q.stride()}, {k.stride()}, {v.stride()}")


@triton.jit
def _states_kernel(
    k_ptr, v_ptr, slope_ptr, bounds_ptr, first_chunk_ptr, initial_ptr, before_ptr, last_ptr,
    heads, token_stride, head_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program has one sequence, one head and some columns of the state."""
    row = tl.program_id(0).to(tl.int64)
    sequence, head = row // heads, row % heads
    start = tl.load(bounds_ptr + sequence)
    length = tl.load(bounds_ptr + sequence + 1) - start
    slope = tl.load(slope_ptr + head)
    dims = tl.arange(0, D)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tokens = tl.arange(0, CHUNK)
    tile = dims[:, None] * D + columns[None, :]
    state = tl.load(initial_ptr + row * D * D + tile)
    chunk = tl.load(first_chunk_ptr + sequence)
    for first in range(0, length, CHUNK):
        tl.store(before_ptr + (chunk * heads + head) * D * D + tile, state)
        size = tl.minimum(length - first, CHUNK)
        real = tokens < size
        place = (start + first + tokens) * token_stride + head * head_stride
        k = tl.load(k_ptr + place[None, :] + dims[:, None], mask=real[None, :], other=0.0)
        v = tl.load(v_ptr + place[:, None] + columns[None, :], mask=real[:, None], other=0.0)
        left = tl.maximum(size - 1 - tokens, 0).to(tl.float32)
        weighted = k.to(tl.float32) * tl.exp(-slope * left)[None, :]
        update = tl.dot(weighted, v.to(tl.float32), input_precision=PRECISION)
        state = tl.exp(-slope * size.to(tl.float32)) * state + update
        chunk += 1
    tl.store(last_ptr + row * D * D + tile, state)


@triton.jit
def _outputs_kernel(
    q_ptr, k_ptr, v_ptr, slope_ptr, bounds_ptr, first_chunk_ptr, sequence_ptr, before_ptr, out_ptr,
    heads, token_stride, head_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program has one chunk, one head and some columns of the output."""
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    sequence = tl.load(sequence_ptr + chunk)
    number = chunk - tl.load(first_chunk_ptr + sequence)
    start = tl.load(bounds_ptr + sequence) + number * CHUNK
    slope = tl.load(slope_ptr + head)
    dims = tl.arange(0, D)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, CHUNK)
    tokens = start + steps
    real = tokens < tl.load(bounds_ptr + sequence + 1)
    place = tokens * token_stride + head * head_stride
    q = tl.load(q_ptr + place[:, None] + dims[None, :], mask=real[:, None], other=0.0)
    k = tl.load(k_ptr + place[None, :] + dims[:, None], mask=real[None, :], other=0.0)
    v = tl.load(v_ptr + place[:, None] + columns[None, :], mask=real[:, None], other=0.0)
    q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    state = tl.load(
        before_ptr + (chunk * heads + head) * D * D + dims[:, None] * D + columns[None, :]
    )
    gap = steps[:, None] - steps[None, :]
    inside = tl.exp(-slope * tl.maximum(gap, 0).to(tl.float32))
    scores = tl.dot(q, k, input_precision=PRECISION) * tl.where(gap >= 0, inside, 0.0)
    # A chunk's first token sees the state before it one step older.
    carried = tl.exp(-slope * (steps + 1).to(tl.float32))[:, None]
    out = tl.dot(scores, v, input_precision=PRECISION)
    out += carried * tl.dot(q, state, input_precision=PRECISION)
    target = (tokens * heads + head) * D
    tl.store(out_ptr + target[:, None] + columns[None, :], out, mask=real[:, None])


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, slope_ptr, states_ptr, pages_ptr, out_ptr,
    heads, token_stride, head_stride, page_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program has one row, one head and some columns of the state."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    page = tl.load(pages_ptr + row).to(tl.int64)
    if page < 0:
        return
    dims = tl.arange(0, D)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    place = row * token_stride + head * head_stride
    q = tl.load(q_ptr + place + dims).to(tl.float32)
    k = tl.load(k_ptr + place + dims).to(tl.float32)
    v = tl.load(v_ptr + place + columns).to(tl.float32)
    tile = states_ptr + page * page_stride + head * D * D
    tile += dims[:, None] * D + columns[None, :]
    state = tl.exp(-tl.load(slope_ptr + head)) * tl.load(tile) + k[:, None] * v[None, :]
    tl.store(tile, state)
    tl.store(out_ptr + (row * heads + head) * D + columns, tl.sum(q[:, None] * state, axis=0))
