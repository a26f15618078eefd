"""What the builder makes of a batch: who continues, who starts, what is padding."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from openm1_vllm.attention import LightningMetadataBuilder
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID


def builder(mode: str = "none", graph: int = 8) -> LightningMetadataBuilder:
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=graph),
        cache_config=SimpleNamespace(
            mamba_cache_mode=mode, hash_block_size=64, cache_hit_alignment_tokens=64
        ),
        speculative_config=None,
    )
    spec = SimpleNamespace(
        block_size=64, num_prefill_checkpoint_blocks=1, prefill_checkpoint_alignment=1
    )
    return LightningMetadataBuilder(spec, [], config, torch.device("cpu"))


def table(num_rows: int, first: int) -> torch.Tensor:
    """Pages of up to 256 tokens of each sequence: 10, 110, 210, 310 of the first one."""
    rows = torch.arange(num_rows, dtype=torch.int32)[:, None] + first
    return rows + 100 * torch.arange(4, dtype=torch.int32)


def batch(lengths: list[int], past: list[int], prefilling: list[bool]) -> CommonAttentionMetadata:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    ends = torch.tensor(lengths) + torch.tensor(past)
    return CommonAttentionMetadata(
        query_start_loc=bounds,
        query_start_loc_cpu=bounds,
        seq_lens=ends,
        seq_lens_cpu_upper_bound=ends,
        num_reqs=len(lengths),
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=100,
        block_table_tensor=table(len(lengths), 10),
        slot_mapping=torch.zeros(sum(lengths)),
        is_prefilling=torch.tensor(prefilling),
    )


def test_a_prompt_of_one_token_is_no_decode():
    made = builder().build(0, batch([1, 1, 1, 5], [7, 0, 3, 20], [False, True, True, True]))
    assert made.num_decodes == 1
    assert made.pages.tolist() == [10, 11, 12, 13]
    assert made.first.layout.lengths == [1, 1, 5]
    assert made.first.rows == slice(1, 8)
    assert made.second is None
    assert made.has_state.flatten().tolist() == [False, True, True]


def test_rows_without_tokens_are_padding():
    one = builder()
    made = one.build(0, batch([1, 1, 0, 0], [7, 2, 0, 0], [False] * 4))
    assert made.first is None
    assert made.pages.tolist() == [10, 11, PAD_SLOT_ID, PAD_SLOT_ID]
    # A graph that was captured with these pages reads the next ones from the same place.
    assert one.build(0, batch([1], [9], [False])).pages.data_ptr() == made.pages.data_ptr()
    mixed = one.build(0, batch([1, 6, 0], [7, 0, 0], [False, True, False]))
    assert (mixed.num_decodes, mixed.first.layout.lengths) == (1, [6])
    assert mixed.pages.tolist() == [10, 11]


def test_without_graphs_padding_is_looked_for_where_rows_are_empty():
    one = builder(graph=0)
    full = one.build(0, batch([1, 1], [7, 2], [False] * 2))
    assert (full.padding, full.pages.tolist()) == (None, [10, 11])
    assert one.update_block_table(full, table(2, 20), torch.zeros(0)).pages.tolist() == [20, 21]
    padded = one.build(0, batch([1, 0], [7, 0], [False] * 2))
    assert padded.pages.tolist() == [10, PAD_SLOT_ID]


def test_other_groups_of_layers_have_other_pages_only():
    one = builder("align")
    made = one.build(0, batch([1, 1, 7], [70, 64, 3], [False, False, True]))
    assert made.pages.tolist() == [110, 111, 12]
    other = one.update_block_table(made, table(3, 20), torch.zeros(0))
    assert other.pages.tolist() == [120, 121, 22]
    assert (other.first, other.num_decodes) == (made.first, 2)
    decodes = one.build(0, batch([1, 1, 0], [70, 64, 0], [False] * 3))
    again = one.update_block_table(decodes, table(3, 20), torch.zeros(0))
    assert again.pages.tolist() == [120, 121, PAD_SLOT_ID]


def test_a_prompt_is_cut_where_the_prefix_cache_keeps_its_state():
    one = builder("align")
    made = one.build(0, batch([1, 200, 30, 130], [70, 0, 0, 64], [False, True, True, True]))
    # The last whole block of the first ends at 192; the second has none; of the third, at 64, the
    # block that ends at 192 does.
    assert made.first.layout.lengths == [192, 30, 128]
    assert made.second.layout.lengths == [8, 2]
    tokens = [*range(1, 193), *range(201, 231), *range(231, 359)]
    assert made.first.rows.tolist() == tokens
    assert made.second.rows.tolist() == [*range(193, 201), 359, 360]
    assert made.kept.tolist() == [0, 2]
    assert made.pages.tolist() == [110, 311, 12, 313]
    assert made.kept_pages.tolist() == [211, 213]
    other = one.update_block_table(made, table(4, 20), torch.zeros(0))
    assert other.kept_pages.tolist() == [221, 223]
    assert made.has_state.flatten().tolist() == [False, False, True]


def test_tokens_of_a_lone_prompt_are_taken_as_they_lie():
    made = builder("align").build(0, batch([200], [0], [True]))
    assert made.first.rows == slice(0, 192)
    assert made.second.rows == slice(192, 200)
