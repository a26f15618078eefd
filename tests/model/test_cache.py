from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from openm1.model.cache import CachePools, CacheView
from openm1.model.size import model_size

from .tiny import one_expert_config, tiny_config

MIB = 2**20
LENGTHS = {"past": [0], "new_tokens": [3]}


def small_pools(**overrides) -> CachePools:
    return CachePools(
        tiny_config(), **({"num_pages": 6, "num_slots": 3, "page_tokens": 4} | overrides)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sizes_in_bytes_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    pools = small_pools(dtype=dtype)
    page = CachePools.page_bytes(pools.config, 4, dtype)
    assert pools.keys.nbytes + pools.values.nbytes == 6 * page
    assert pools.states.nbytes == 3 * CachePools.state_bytes(pools.config, dtype)
    if dtype == torch.bfloat16:
        size = model_size(pools.config)
        assert page == 4 * size.kv_bytes_per_token
        assert CachePools.state_bytes(pools.config, dtype) == size.state_bytes_per_sequence


def test_a_model_of_one_kind_of_layer_has_pools_of_one_kind() -> None:
    softmax_only, lightning_only = one_expert_config(), tiny_config(attn_type_list=(0,) * 6)
    assert CachePools.state_bytes(softmax_only, torch.float32) == 0
    assert CachePools.page_bytes(lightning_only, 64, torch.float32) == 0
    pools = CachePools(lightning_only, num_pages=0, num_slots=2)
    assert pools.keys.numel() == 0
    CacheView(pools, slots=[1], page_tables=[[]], **LENGTHS)
    pools = CachePools(softmax_only, num_pages=2, num_slots=0)
    assert pools.states.numel() == 0
    CacheView(pools, slots=[0], page_tables=[[1]], **LENGTHS)
    pools.release([0], [])


def test_copies_touch_nothing_else() -> None:
    pools = small_pools()
    for pool in (pools.keys, pools.values, pools.states):
        pool.normal_()
    keys, values, states = (x.clone() for x in (pools.keys, pools.values, pools.states))
    pools.copy_page(1, 4)
    pools.copy_state(2, 0)
    pools.clear_state(1)
    keys[:, 4], values[:, 4] = keys[:, 1], values[:, 1]
    states[0], states[1] = states[2], 0.0
    assert torch.equal(pools.keys, keys) and torch.equal(pools.values, values)
    assert torch.equal(pools.states, states)


def test_new_tokens_go_where_the_page_tables_say() -> None:
    pools = small_pools()
    pools.keys.fill_(torch.nan)
    view = CacheView(
        pools, slots=[2, 0], page_tables=[[5, 1], [3, 0, 2]], past=[3, 7], new_tokens=[2, 3]
    )
    assert view.positions.tolist() == [3, 4, 7, 8, 9]
    keys = torch.randn(5, 3, 8)
    view.append(4, keys, keys)
    written = pools.keys[pools.softmax_index[4]]
    places = [(5, 3), (1, 0), (0, 3), (2, 0), (2, 1)]
    for new, place in zip(keys, places, strict=True):
        assert torch.equal(written[place], new)
    assert int(pools.keys.isnan().any(-1).any(-1).sum()) == 2 * 6 * 4 - len(places)


@pytest.mark.parametrize("slots", [[0, 1], [1, 2], [2, 0]], ids=str)
def test_states_are_read_and_written_by_slot(slots: list[int]) -> None:
    pools = small_pools()
    pools.states.normal_()
    before = pools.states.clone()
    view = CacheView(pools, slots=slots, page_tables=[[0], [1]], past=[0, 0], new_tokens=[1, 1])
    layer = pools.config.lightning_layers[1]
    assert torch.equal(view.state(layer), before[slots, 1])
    view.set_state(layer, torch.ones_like(before[slots, 1]))
    before[slots, 1] = 1.0
    assert torch.equal(pools.states, before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"slots": [0, 0]}, "must be distinct"),
        ({"slots": [0, 3]}, "allowed are 0 to 2"),
        ({"slots": [0]}, "one per sequence"),
        ({"page_tables": [[0, 1], [2]]}, "1 pages of 4 tokens cannot hold 5 tokens"),
        ({"page_tables": [[0, 1], [2, 6]]}, "page ids 2 to 6; allowed 0 to 5"),
    ],
)
def test_views_that_do_not_fit_are_refused(wrong: dict, message: str) -> None:
    good = {
        "slots": [0, 1],
        "page_tables": [[0, 1], [2, 3]],
        "past": [3, 4],
        "new_tokens": [4, 1],
    }
    CacheView(small_pools(), **good)
    with pytest.raises(ValueError, match=message):
        CacheView(small_pools(), **(good | wrong))


def test_counts_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="num_pages is -1"):
        small_pools(num_pages=-1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and relies on MADV_DONTNEED")
def test_memory_is_taken_when_written_and_given_back() -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096

    before = resident()
    pools = small_pools(num_pages=400_000, num_slots=400_000, page_tokens=64)
    reserved = pools.keys.nbytes + pools.values.nbytes + pools.states.nbytes
    assert reserved > 5000 * MIB
    assert resident() - before < 16 * MIB
    pools.keys[:, 1000:3000], pools.values[:, 1000:3000], pools.states[:3000] = 1.0, 1.0, 1.0
    full = resident() - before
    assert full > 60 * MIB
    kept = [1999, 2500]
    pools.release(
        [i for i in range(1000, 3000) if i not in kept], [i for i in range(3000) if i != 7]
    )
    assert resident() - before < 16 * MIB
    assert bool((pools.keys[:, kept] == 1.0).all() and (pools.values[:, kept] == 1.0).all())
    assert bool((pools.states[7] == 1.0).all())
