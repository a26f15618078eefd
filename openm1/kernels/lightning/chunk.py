"""Lightning attention in chunks: matrix products inside a chunk, a short recurrence between them.

With m tokens in a chunk, i = 1..m, s the slope and S the state before the chunk:
  O_i = e^{-s i} q_i S + sum_{j<=i} e^{-s(i-j)} (q_i . k_j) v_j
  S  <- e^{-s m} S + sum_j e^{-s(m-j)} k_j^T v_j
The result does not depend on the chunk size. Some chunks are taken at a time, so that what lies
between the products stays in the cache and memory does not grow with the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from openm1.kernels.packing import ChunkGrid, PackedLayout

MAX_CHUNK_TOKENS = 64
# Numbers of q in one group of chunks: 1 MiB in fp32, 1024 tokens of 4 heads of 64.
GROUP_NUMBERS = 2**18


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
    decays = _Decays.of(slope.to(torch.promote_types(q.dtype, torch.float32)), grid)
    carries = need_state or initial_state is not None or len(grid.active) > 1
    states = _States(decays, grid, layout, initial_state, q) if carries else None
    groups = _groups(grid, GROUP_NUMBERS // (grid.size * q[0].numel()))
    sizes = [sum(counts) for counts in groups]
    pieces = [_to_chunks(x, grid, layout).split(sizes) for x in (q, k, v)]
    outputs, first = [], 0
    for counts, *(queries, keys, values) in zip(groups, *pieces, strict=True):
        out = _group(queries, keys, values, first, counts, decays, states)
        outputs.append(out.to(q.dtype))
        first += sum(counts)
    out = _from_chunks(outputs, grid, layout)
    return out, states.last() if states is not None and need_state else None


def _groups(grid: ChunkGrid, most: int) -> list[list[int]]:
    """Slices of rows taken together, each as `grid.active` has it; several have `most` rows."""
    groups: list[list[int]] = []
    for count in grid.active:
        if groups and sum(groups[-1]) + count <= most:
            groups[-1].append(count)
        else:
            groups.append([count])
    return groups


@dataclass(frozen=True)
class _Decays:
    """Powers of each head's decay, in the dtype of the sums."""

    inside: Tensor
    """[H, m, m]: from token j to token i of a chunk, 0 where j is later."""
    query: Tensor
    """[H, m, 1]: from before the chunk to token i."""
    key: Tensor
    """[M, H, m, 1]: from token j to the end of the chunk."""
    chunk: Tensor
    """[M, H, 1, 1]: over the whole chunk."""

    @classmethod
    def of(cls, slope: Tensor, grid: ChunkGrid) -> _Decays:
        steps = torch.arange(1, grid.size + 1, device=slope.device, dtype=slope.dtype)
        gap = steps[:, None] - steps[None, :]  # [m, m]
        # Behind a chunk's last token keys are 0, so any finite factor does.
        left = (grid.chunk_lengths[:, None] - steps).clamp(min=0)  # [M, m]
        return cls(
            inside=torch.exp(-slope[:, None, None] * gap.clamp(min=0)) * (gap >= 0),
            query=torch.exp(-slope[:, None] * steps)[..., None],
            key=torch.exp(-slope[:, None] * left[:, None, :])[..., None],
            chunk=torch.exp(-slope * grid.chunk_lengths[:, None])[..., None, None],
        )


def _group(
    q: Float[Tensor, "M m H D"],
    k: Float[Tensor, "M m H D"],
    v: Float[Tensor, "M m H D"],
    first: int,
    counts: list[int],
    decays: _Decays,
    states: _States | None,
) -> Float[Tensor, "M m H D"]:
    """Outputs of the rows of chunks from `first` on; moves the states on."""
    work = decays.inside.dtype
    q, k, v = (x.transpose(1, 2).to(work).contiguous() for x in (q, k, v))  # [M, H, m, D]
    out = (q @ k.transpose(-1, -2)).mul_(decays.inside) @ v
    if states is not None:
        key_decay = decays.key[first : first + len(k)]
        updates = (k * key_decay).transpose(-1, -2) @ v  # [M, H, D, D]
        out.add_((q * decays.query) @ states.advance(updates, first, counts))
    return out.transpose(1, 2)


class _States:
    """The recurrence over the rows of chunks, in order.

    The sequences that have a chunk j are the first of those that have a chunk j - 1.
    """

    def __init__(
        self,
        decays: _Decays,
        grid: ChunkGrid,
        layout: PackedLayout,
        initial_state: Tensor | None,
        like: Tensor,
    ) -> None:
        self.decay, self.order = decays.chunk, grid.sequence_order
        if initial_state is None:
            heads, dim = like.shape[1:]
            self.state = self.decay.new_zeros(layout.num_sequences, heads, dim, dim)
        else:
            self.state = initial_state.to(self.decay.dtype).index_select(0, self.order)
        self.finished: list[Tensor] = []

    def advance(self, updates: Tensor, first: int, counts: list[int]) -> Tensor:
        """States before each row, [M, H, D, D]; `counts` sequences have the next chunk each."""
        before = []
        for update in updates.split(counts):
            if len(update) < len(self.state):
                self.finished.append(self.state[len(update) :])
                self.state = self.state[: len(update)]
            before.append(self.state)
            decay = self.decay[first : first + len(update)]
            self.state = torch.addcmul(update, decay, self.state)
            first += len(update)
        return torch.cat(before)

    def last(self) -> Tensor:
        """States after each sequence, [N, H, D, D]."""
        longest_first = torch.cat([self.state, *self.finished[::-1]])
        restored = torch.empty_like(self.order)
        restored[self.order] = torch.arange(len(self.order), device=self.order.device)
        return longest_first.index_select(0, restored)


def _to_chunks(
    x: Float[Tensor, "T H D"], grid: ChunkGrid, layout: PackedLayout
) -> Float[Tensor, "M m H D"]:
    """Zeros where a chunk has no token. A single sequence is cut as it lies."""
    if layout.num_sequences == 1:
        missing = grid.gather.numel() - len(x)
        padded = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        return padded.unflatten(0, (-1, grid.size))
    padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return padded.index_select(0, grid.gather).unflatten(0, (-1, grid.size))


def _from_chunks(
    outputs: list[Float[Tensor, "_ m H D"]], grid: ChunkGrid, layout: PackedLayout
) -> Float[Tensor, "T H D"]:
    out = torch.cat(outputs).flatten(0, 1)
    if layout.num_sequences == 1:
        return out[: layout.num_tokens]
    return out.index_select(0, grid.scatter)
