"""How sequences of different lengths lie in one packed row of T tokens, and how they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


class PackedLayout:
    """Boundaries of N sequences packed back to back, with the index tables derived from them.

    The tables are built once per batch and shared by all layers.
    """

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu") -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths are {lengths}; allowed is a non-empty list of at least 1")
        self.lengths = lengths
        self.device = torch.device(device)
        self._grids: dict[int, ChunkGrid] = {}

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, num_tokens: int) -> PackedLayout:
        """From boundaries [N+1] that start at 0, rise strictly and end at `num_tokens`."""
        bounds = cu_seqlens.tolist()
        if cu_seqlens.ndim != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != num_tokens:
            raise ValueError(
                f"cu_seqlens is {bounds}; it must start at 0 and end at the number of packed "
                f"tokens, {num_tokens}"
            )
        return cls([b - a for a, b in pairwise(bounds)], cu_seqlens.device)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def starts(self) -> list[int]:
        """First token of each sequence."""
        starts, total = [], 0
        for length in self.lengths:
            starts.append(total)
            total += length
        return starts

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[N+1] int64."""
        return torch.tensor([*self.starts, self.num_tokens], device=self.device)

    @cached_property
    def positions(self) -> Tensor:
        """[T] int64: place of each token in its own sequence."""
        starts = torch.tensor(self.starts, device=self.device)
        lengths = torch.tensor(self.lengths, device=self.device)
        index = torch.arange(self.num_tokens, device=self.device)
        return index - torch.repeat_interleave(starts, lengths)

    @cached_property
    def last_tokens(self) -> Tensor:
        """[N] int64: index of each sequence's last token."""
        return self.cu_seqlens[1:] - 1

    @cached_property
    def length_buckets(self) -> list[tuple[Tensor, Tensor]]:
        """Sequences grouped by length within a factor of two, for padded batches.

        Each bucket is (gather [n, L], scatter [m]): `gather` indexes the T tokens, with T itself
        for padding; `scatter` picks the m real tokens out of the flattened [n * L]. Concatenated
        over the buckets they stand in another order than packed; `bucket_order` undoes that.
        """
        return [self._bucket(members) for members in self._bucket_members]

    @cached_property
    def bucket_order(self) -> Tensor:
        """[T]: index into the concatenated bucket tokens for each packed token."""
        tokens = [
            torch.arange(self.starts[i], self.starts[i] + self.lengths[i])
            for members in self._bucket_members
            for i in members
        ]
        order = torch.empty(self.num_tokens, dtype=torch.int64)
        order[torch.cat(tokens)] = torch.arange(self.num_tokens)
        return order.to(self.device)

    @cached_property
    def _bucket_members(self) -> list[list[int]]:
        by_size: dict[int, list[int]] = {}
        for i, length in enumerate(self.lengths):
            by_size.setdefault((length - 1).bit_length(), []).append(i)
        return list(by_size.values())

    def _bucket(self, members: list[int]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([self.lengths[i] for i in members])
        starts = torch.tensor([self.starts[i] for i in members])
        steps = torch.arange(int(lengths.max()))
        real = steps < lengths[:, None]
        gather = torch.where(real, starts[:, None] + steps, self.num_tokens)
        return gather.to(self.device), real.flatten().nonzero()[:, 0].to(self.device)

    def chunks(self, size: int) -> ChunkGrid:
        """All sequences cut into chunks of at most `size` tokens."""
        if size not in self._grids:
            self._grids[size] = _chunk_grid(self, size)
        return self._grids[size]


@dataclass(frozen=True)
class ChunkGrid:
    """M chunks of `size` tokens, ordered by their number inside their sequence.

    Sequences are taken longest first, so that the ones which still have a chunk j are a prefix, and
    the recurrence over j is a loop over slices.
    """

    size: int
    gather: Tensor
    """[M * size] int64 into the T tokens; T marks padding."""
    scatter: Tensor
    """[T] int64 into [M * size]: where each packed token went."""
    chunk_lengths: Tensor
    """[M] int64: real tokens of each chunk."""
    sequence_order: Tensor
    """[N] int64: the sequences, longest first."""
    active: tuple[int, ...]
    """Per chunk number j: how many sequences have one."""


def _chunk_grid(layout: PackedLayout, size: int) -> ChunkGrid:
    order = sorted(range(layout.num_sequences), key=lambda i: -layout.lengths[i])
    lengths = torch.tensor([layout.lengths[i] for i in order])
    starts = torch.tensor([layout.starts[i] for i in order])
    num_chunks = -(-lengths // size)
    active, first, real = [], [], []
    for j in range(int(num_chunks[0])):
        count = int((num_chunks > j).sum())
        active.append(count)
        first.append(starts[:count] + j * size)
        real.append((lengths[:count] - j * size).clamp(max=size))
    chunk_lengths = torch.cat(real)
    steps = torch.arange(size)
    inside = steps < chunk_lengths[:, None]
    gather = torch.where(inside, torch.cat(first)[:, None] + steps, layout.num_tokens).flatten()
    scatter = torch.empty(layout.num_tokens, dtype=torch.int64)
    cells = inside.flatten().nonzero()[:, 0]
    scatter[gather[cells]] = cells
    return ChunkGrid(
        size=size,
        gather=gather.to(layout.device),
        scatter=scatter.to(layout.device),
        chunk_lengths=chunk_lengths.to(layout.device),
        sequence_order=torch.tensor(order, device=layout.device),
        active=tuple(active),
    )
