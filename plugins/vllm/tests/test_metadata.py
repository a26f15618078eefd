"""What the builder makes of a batch: who continues, who starts, what is padding."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from openm1_vllm.attention import LightningMetadataBuilder
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID


def builder() -> LightningMetadataBuilder:
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=8),
        cache_config=SimpleNamespace(mamba_cache_mode="none"),
    )
    return LightningMetadataBuilder(SimpleNamespace(), [], config, torch.device("cpu"))


def batch(lengths: list[int], past: list[int], prefilling: list[bool]) -> CommonAttentionMetadata:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return CommonAttentionMetadata(
        query_start_loc=bounds,
        query_start_loc_cpu=bounds,
        seq_lens=torch.tensor(lengths) + torch.tensor(past),
        num_reqs=len(lengths),
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=100,
        block_table_tensor=torch.arange(len(lengths), dtype=torch.int32)[:, None] + 10,
        slot_mapping=torch.zeros(sum(lengths)),
        is_prefilling=torch.tensor(prefilling),
    )


def test_a_prompt_of_one_token_is_no_decode():
    made = builder().build(0, batch([1, 1, 1, 5], [7, 0, 3, 20], [False, True, True, True]))
    assert made.num_decodes == 1
    assert made.pages.tolist() == [10, 11, 12, 13]
    assert made.layout.lengths == [1, 1, 5]
    assert made.has_state.flatten().tolist() == [False, True, True]


def test_rows_without_tokens_are_padding():
    one = builder()
    made = one.build(0, batch([1, 1, 0, 0], [7, 2, 0, 0], [False] * 4))
    assert made.layout is None
    assert made.pages.tolist() == [10, 11, PAD_SLOT_ID, PAD_SLOT_ID]
    # A graph that was captured with these pages reads the next ones from the same place.
    assert one.build(0, batch([1], [9], [False])).pages.data_ptr() == made.pages.data_ptr()
    mixed = one.build(0, batch([1, 6, 0], [7, 0, 0], [False, True, False]))
    assert (mixed.num_decodes, mixed.layout.lengths) == (1, [6])
    assert mixed.pages.tolist() == [10, 11]
