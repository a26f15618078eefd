"""The planner's exact count against torch's, on the real modules. Every difference has a name.

torch's counter sees products of matrices and nothing else, and it sees what is multiplied only to
be masked or cut off again. The planner counts what the mathematics asks for.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openm1.kernels.lightning.chunk import MAX_CHUNK_TOKENS
from openm1.kernels.packing import PackedLayout
from openm1.kernels.paged_attention import TILE_MULTIPLE
from openm1.model.config import SOFTMAX, M1Config, post_norm_config
from openm1.model.m1 import M1ForCausalLM
from openm1.model.moe import DENSE_MAX_MULTIPLY_ADDS
from openm1.planner.attention import causal_pairs
from openm1.planner.flops import CHUNK_TOKENS, FlopLine, decode_flops, prefill_flops
from openm1.planner.models import from_m1
from tests.model.paging import PAGE_TOKENS, PagedSequences
from tests.model.tiny import (
    one_expert_config,
    pre_norm_config,
    random_ids,
    random_model,
    tiny_config,
)

CONFIGS = {
    "hybrid, post-norm": tiny_config(),
    "pre-norm, tied head": pre_norm_config(),
    "all softmax, one expert": one_expert_config(),
    "experts sorted": post_norm_config(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        period=3,
        intermediate_size=512,
        num_local_experts=6,
    ),
}
# No multiples of a chunk, a tile or a page.
PROMPT, MORE = 150, 83

Counts = dict[str, int]
"""FLOPs of "lightning", "softmax" (all that attention does), "experts" (with router), "head"."""


def measured(
    model: M1ForCausalLM, sequence: PagedSequences, ids: torch.Tensor, num_logits: int
) -> Counts:
    """Torch's count of the next tokens of the one sequence."""
    config = model.config
    counter = FlopCounterMode(display=False, depth=None)
    # The fused operator for CPUs is not counted at all; the one made of products is.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        layout, view = PackedLayout([len(ids)], ids.device), sequence.view({0: len(ids)})
        hidden = model.model(ids, layout, view).hidden
        model.logits(hidden[len(ids) - num_logits :])
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    counts = {"lightning": 0, "softmax": 0, "experts": 0}
    for i, kind in enumerate(config.attn_type_list):
        layer = f"M1Model.layers.{i}"
        counts["softmax" if kind == SOFTMAX else "lightning"] += by_module[f"{layer}.self_attn"]
        counts["experts"] += by_module[f"{layer}.block_sparse_moe"]
    counts["head"] = counter.get_total_flops() - by_module["M1Model"]
    assert sum(counts.values()) == counter.get_total_flops()
    return counts


def planned(lines: Iterable[FlopLine]) -> Counts:
    counts = {"lightning": 0, "softmax": 0, "experts": 0, "head": 0}
    for line in lines:
        where = line.layers
        if line.operation in ("router", "experts"):
            where = "experts"
        counts[where] += line.flops
    return counts


def difference(lines: Iterable[FlopLine], named: dict[str, Counts]) -> Counts:
    """What torch should count: the planner's lines and, by name, what is more or less."""
    counts = planned(lines)
    for parts in named.values():
        for where, flops in parts.items():
            counts[where] += flops
    return counts


def prefill_differences(config: M1Config, past: int, new: int) -> dict[str, Counts]:
    heads, dim = config.num_attention_heads, config.head_dim
    lightning, softmax = len(config.lightning_layers), len(config.softmax_layers)
    chunk = min(MAX_CHUNK_TOKENS, new)
    num_chunks = -(-new // chunk)
    padding = num_chunks * chunk - new
    full, rest = divmod(new, chunk)
    masked = num_chunks * chunk**2 - full * causal_pairs(0, chunk) - causal_pairs(0, rest)
    # Short prompts go through torch's operator as one square; what follows a past, through tiles.
    keys = -(-(past + new) // TILE_MULTIPLE) * TILE_MULTIPLE if past else new
    return {
        "the decay of a state is elementwise": {
            "lightning": -lightning * num_chunks * heads * dim**2
        },
        "the last chunk is filled up": {"lightning": lightning * 4 * heads * dim**2 * padding},
        "chunks are whole squares": {"lightning": lightning * 4 * heads * dim * masked},
        "softmax attention multiplies what it masks": {
            "softmax": softmax * 4 * heads * dim * (new * keys - causal_pairs(past, new))
        },
        "small layers run all experts": {"experts": dense_experts(config, new)},
    }


def dense_experts(config: M1Config, new: int) -> int:
    per_token = 3 * config.intermediate_size * config.hidden_size
    if new == 1 or per_token * config.num_local_experts > DENSE_MAX_MULTIPLY_ADDS:
        return 0
    unchosen = config.num_local_experts - config.num_experts_per_tok
    return config.num_hidden_layers * 2 * per_token * unchosen * new


def decode_differences(config: M1Config, past: int) -> dict[str, Counts]:
    heads, dim = config.num_attention_heads, config.head_dim
    lightning, softmax = len(config.lightning_layers), len(config.softmax_layers)
    unused = -(past + 1) % PAGE_TOKENS
    return {
        "the decay of a state is elementwise": {"lightning": -lightning * heads * dim**2},
        "the update of a state is elementwise": {"lightning": -lightning * 2 * heads * dim**2},
        "the last page is filled up": {"softmax": softmax * 4 * heads * dim * unused},
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_prefill_and_decode_are_what_torch_counts(config: M1Config) -> None:
    assert CHUNK_TOKENS == MAX_CHUNK_TOKENS
    model, sequence, shape = random_model(config), PagedSequences(config), from_m1(config, "tiny")
    past = 0
    for new in (PROMPT, MORE):
        (ids,) = random_ids(config, new)
        lines = prefill_flops(shape, new, past_tokens=past)
        named = prefill_differences(config, past, new)
        assert measured(model, sequence, ids, 1) == difference(lines, named)
        past += new
    for _ in range(3):
        (ids,) = random_ids(config, 1)
        lines = decode_flops(shape, 1, past_tokens=past)
        assert measured(model, sequence, ids, 1) == difference(
            lines, decode_differences(config, past)
        )
        past += 1


def test_the_sorted_experts_are_among_the_configs() -> None:
    assert dense_experts(CONFIGS["experts sorted"], PROMPT) == 0
    assert dense_experts(CONFIGS["hybrid, post-norm"], PROMPT) > 0
