"""Lightning attention in chunks: matrix products inside a chunk, a short recurrence between them.

With m tokens in a chunk, i = 1..m, s the slope and S the state before the chunk:
  O_i = e^{-s i} q_i S + sum_{j<=i} e^{-s(i-j)} (q_i . k_j) v_j
  S  <- e^{-s m} S + sum_j e^{-s(m-j)} k_j^T v_j
The result does not depend on the chunk size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from openm1.kernels.packing import ChunkGrid, PackedLayout

MAX_CHUNK_TOKENS = 64


def lightning_chunk(
    q: Float[Tensor, "T H D"],
    k: Float[Tensor, "T H D"],
    v: Float[Tensor, "T H D"],
    slope: Float[Tensor, " H"],
    *,
    layout: PackedLayout,
    initial_state: Float[Tensor, "N H D D"] | None = None,
    need_state: bool = True,
    chunk_tokens: int = MAX_CHUNK_TOKENS,
) -> tuple[Float[Tensor, "T H D"], Float[Tensor, "N H D D"] | None]:
    """Outputs in the dtype of `q`, last states in fp32 (fp64 for fp64 inputs). Differentiable.

    States, decays and all sums are fp32 whatever the inputs are: rounded to bf16, the slowest of
    M1's heads would never forget. Without `need_state` the last states are None.
    """
    grid = layout.chunks(min(chunk_tokens, max(layout.lengths)))
    out_dtype = q.dtype
    work = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (_to_chunks(x.to(work), grid) for x in (q, k, v))  # [M, H, m, D]
    slope = slope.to(work)
    steps = torch.arange(1, grid.size + 1, device=q.device, dtype=work)

    gap = steps[:, None] - steps[None, :]  # [m, m]
    decay = torch.exp(-slope[:, None, None] * gap.clamp(min=0)) * (gap >= 0)
    out = (q @ k.transpose(-1, -2) * decay) @ v
    if need_state or initial_state is not None or len(grid.active) > 1:
        last, carried = _between_chunks(q, k, v, slope, steps, grid, layout, initial_state)
        out = out + carried
    else:
        last = None

    out = out.transpose(1, 2).flatten(0, 1).index_select(0, grid.scatter)
    return out.to(out_dtype), last if need_state else None


def _between_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    steps: Tensor,
    grid: ChunkGrid,
    layout: PackedLayout,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Last states [N, H, D, D], and what earlier chunks add to the outputs [M, H, m, D]."""
    left = (grid.chunk_lengths[:, None] - steps).clamp(min=0)  # [M, m]
    key_decay = torch.exp(-slope[None, :, None] * left[:, None, :])  # [M, H, m]
    updates = (k * key_decay[..., None]).transpose(-1, -2) @ v  # [M, H, D, D]
    before, last = _scan(updates, slope, grid, layout, initial_state)
    query_decay = torch.exp(-slope[:, None] * steps)  # [H, m]
    return last, (q * query_decay[..., None]) @ before


def _to_chunks(x: Tensor, grid: ChunkGrid) -> Tensor:
    """[T, H, D] -> [M, H, m, D], zeros where a chunk has no token."""
    padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    rows = padded.index_select(0, grid.gather)
    return rows.unflatten(0, (-1, grid.size)).transpose(1, 2)


def _scan(
    updates: Tensor,
    slope: Tensor,
    grid: ChunkGrid,
    layout: PackedLayout,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """States before each chunk [M, H, D, D] and after each sequence [N, H, D, D]."""
    if initial_state is None:
        state = updates.new_zeros(layout.num_sequences, *updates.shape[1:])
    else:
        state = initial_state.to(updates.dtype).index_select(0, grid.sequence_order)
    decay = torch.exp(-slope * grid.chunk_lengths[:, None].to(slope.dtype))[..., None, None]
    before, finished = [], []
    first = 0
    for count in grid.active:
        if count < len(state):
            finished.append(state[count:])
            state = state[:count]
        before.append(state)
        rows = slice(first, first + count)
        state = decay[rows] * state + updates[rows]
        first += count
    finished.append(state)
    last = torch.cat(finished[::-1])  # longest first
    restored = torch.empty_like(grid.sequence_order)
    restored[grid.sequence_order] = torch.arange(len(last), device=last.device)
    return torch.cat(before), last.index_select(0, restored)
