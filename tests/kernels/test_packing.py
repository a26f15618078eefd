from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openm1.kernels.packing import PackedLayout

lengths_of_batches = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def tokens_by_sequence(lengths: list[int]) -> list[list[int]]:
    """The indices each sequence owns in the packed row."""
    index = iter(range(sum(lengths)))
    return [[next(index) for _ in range(length)] for length in lengths]


@given(lengths_of_batches)
@settings(max_examples=50)
def test_positions_and_boundaries(lengths: list[int]) -> None:
    layout = PackedLayout(lengths)
    owned = tokens_by_sequence(lengths)
    assert layout.positions.tolist() == [t for length in lengths for t in range(length)]
    assert layout.starts == [tokens[0] for tokens in owned]
    assert layout.last_tokens.tolist() == [tokens[-1] for tokens in owned]
    again = PackedLayout.from_cu_seqlens(layout.cu_seqlens, layout.num_tokens)
    assert again.lengths == lengths


@given(lengths_of_batches, st.integers(1, 50))
@settings(max_examples=100)
def test_chunks_hold_every_token_once(lengths: list[int], size: int) -> None:
    layout = PackedLayout(lengths)
    grid = layout.chunks(size)
    total = layout.num_tokens
    # Scatter undoes gather, so each token is somewhere and no two share a cell.
    assert torch.equal(grid.gather[grid.scatter], torch.arange(total))
    rows = [[t for t in row if t != total] for row in grid.gather.view(-1, size).tolist()]
    assert sorted(t for row in rows for t in row) == list(range(total))
    assert grid.chunk_lengths.tolist() == [len(row) for row in rows]
    # Chunk j of the n-th longest sequence is row n of the j-th block of rows.
    owned = [tokens_by_sequence(lengths)[n] for n in grid.sequence_order.tolist()]
    assert [len(tokens) for tokens in owned] == sorted(lengths, reverse=True)
    first = 0
    for j, count in enumerate(grid.active):
        for n in range(count):
            assert rows[first + n] == owned[n][j * size : (j + 1) * size]
        first += count
    assert first == len(rows)


@given(lengths_of_batches)
@settings(max_examples=50)
def test_buckets_hold_every_token_once(lengths: list[int]) -> None:
    layout = PackedLayout(lengths)
    real = [gather.flatten()[scatter] for gather, scatter in layout.length_buckets]
    assert torch.equal(torch.cat(real)[layout.bucket_order], torch.arange(sum(lengths)))
    rows = [row for gather, _ in layout.length_buckets for row in gather.tolist()]
    unpadded = [[t for t in row if t != layout.num_tokens] for row in rows]
    assert sorted(unpadded) == tokens_by_sequence(lengths)
    # Padding is behind the tokens and never more than they are.
    for row, tokens in zip(rows, unpadded, strict=True):
        assert row[: len(tokens)] == tokens
        assert len(row) < 2 * len(tokens) or len(row) == 1


@pytest.mark.parametrize("bounds", [[0], [1, 4], [0, 3], [[0, 4]]])
def test_wrong_boundaries_are_refused(bounds: list) -> None:
    with pytest.raises(ValueError, match="cu_seqlens is"):
        PackedLayout.from_cu_seqlens(torch.tensor(bounds), 4)


@pytest.mark.parametrize("bounds", [[0, 2, 2, 4], [0, 5, 4]])
def test_empty_sequences_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths are"):
        PackedLayout.from_cu_seqlens(torch.tensor(bounds), 4)
