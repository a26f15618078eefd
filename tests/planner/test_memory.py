"""Predicted bytes against those that are allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openm1.engine.cache.hybrid import CacheSizes
from openm1.model.cache import PAGE_TOKENS, CachePools
from openm1.model.config import M1Config
from openm1.model.int8 import quantize_int8
from openm1.model.m1 import M1ForCausalLM
from openm1.planner.devices import DEVICES
from openm1.planner.fleet import most_sequences, room_tokens, serving_layout, smallest_fleet
from openm1.planner.memory import FORMATS, Layout, serving_memory, training_memory, weight_bytes
from openm1.planner.models import from_m1, read_shape, with_absorbed_latent
from openm1.train.optim import AdamWConfig, make_optimizer
from tests.model.tiny import (
    one_expert_config,
    pre_norm_config,
    random_ids,
    random_model,
    tiny_config,
)

CONFIGS = {
    "post-norm": tiny_config(),
    "tied": pre_norm_config(),
    "one expert": one_expert_config(),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def allocated(model: M1ForCausalLM) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", DTYPES)
def test_weights_are_as_allocated(config: M1Config, name: str) -> None:
    shape, model = from_m1(config, "tiny"), random_model(config, dtype=DTYPES[name])
    assert weight_bytes(shape.weights(), FORMATS[name], Layout()) == allocated(model)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_int8_weights_are_as_allocated(config: M1Config) -> None:
    shape, model = from_m1(config, "tiny"), random_model(config, dtype=torch.bfloat16)
    quantize_int8(model, torch.stack(random_ids(config, 4)))
    assert weight_bytes(shape.weights(), FORMATS["int8"], Layout()) == allocated(model)


def test_m1_in_bf16_is_the_published_checkpoint_with_an_fp32_head() -> None:
    shape = read_shape("m1-80k")
    head = 2 * shape.head_params
    assert weight_bytes(shape.weights(), FORMATS["bfloat16"], Layout()) == 912_210_767_872 + head


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", DTYPES)
def test_pages_and_states_are_as_allocated(config: M1Config, name: str) -> None:
    tokens, sequences = 3 * PAGE_TOKENS - 5, 4
    pools = CachePools(config, num_pages=3 * sequences, num_slots=sequences, dtype=DTYPES[name])
    memory = serving_memory(
        from_m1(config, "tiny"),
        FORMATS[name],
        Layout(),
        num_sequences=sequences,
        context_tokens=tokens,
    )
    assert memory.cache_bytes == pools.keys.nbytes + pools.values.nbytes
    assert memory.state_bytes == pools.states.nbytes


def test_gradients_and_moments_are_as_allocated() -> None:
    config = tiny_config()
    model = random_model(config)
    optimizer = make_optimizer(model, AdamWConfig())
    model(torch.stack(random_ids(config, 64))).sum().backward()
    memory = training_memory(
        from_m1(config, "tiny"), FORMATS["float32"], Layout(), num_tokens=64, recompute=False
    )
    # An expert that no token chose has a gradient too: experts are stacked.
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert memory.gradients_bytes == sum(g.nbytes for g in gradients)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert memory.optimizer_bytes == sum(t.nbytes for t in moments)


def test_layouts_divide_the_whole() -> None:
    shape, format_ = read_shape("minimax-m1"), FORMATS["bfloat16"]
    request: dict[str, Any] = {"num_sequences": 8, "context_tokens": 65_536}
    one = serving_memory(shape, format_, Layout(), **request)
    eight = serving_memory(shape, format_, Layout(tensor=8), **request)
    assert eight.cache_bytes * 8 == one.cache_bytes and eight.state_bytes * 8 == one.state_bytes
    # Norms and routers are on all of them.
    assert one.weights_bytes < eight.weights_bytes * 8 < 1.002 * one.weights_bytes
    # Twice as many devices as key/value heads hold each head twice.
    sixteen = serving_memory(shape, format_, Layout(tensor=16), **request)
    assert sixteen.cache_bytes == eight.cache_bytes
    assert sixteen.state_bytes * 2 == eight.state_bytes
    copies = serving_memory(shape, format_, Layout(tensor=8, data=4), **request)
    assert copies.cache_bytes * 4 == eight.cache_bytes
    assert copies.weights_bytes == eight.weights_bytes
    spread = serving_memory(shape, format_, Layout(tensor=8, data=4, expert=32), **request)
    assert spread.weights_bytes < copies.weights_bytes / 3


def test_a_latent_is_on_every_device() -> None:
    shape = with_absorbed_latent(read_shape("deepseek-r1"))
    one, eight = (
        serving_memory(shape, FORMATS["fp8"], Layout(tensor=n), num_sequences=1, context_tokens=64)
        for n in (1, 8)
    )
    assert one.cache_bytes == eight.cache_bytes == 64 * 61 * 576 * 2


def test_checkpointing_and_sharding_save_memory() -> None:
    shape, format_ = read_shape("minimax-m1"), FORMATS["bfloat16"]
    kept, again = (
        training_memory(shape, format_, Layout(), num_tokens=4096, recompute=recompute)
        for recompute in (False, True)
    )
    assert again.activations_bytes < kept.activations_bytes / 10
    whole, sharded = (
        training_memory(shape, format_, Layout(data=64, shard=shard), num_tokens=1, recompute=True)
        for shard in ("nothing", "all")
    )
    for part in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
        assert getattr(sharded, part) == getattr(whole, part) // 64


def test_what_the_vendor_says_about_a_million_tokens() -> None:
    """int8 experts on 8 x 96 GB, bf16 on 8 x 141 GB; bf16 not on 8 x 96 GB."""
    shape = read_shape("minimax-m1")

    def devices(weights: str, device: str) -> int | None:
        fit = smallest_fleet(
            shape, FORMATS[weights], DEVICES[device], num_sequences=1, context_tokens=2**20
        )
        return fit and fit.layout.num_devices

    assert devices("int8-experts", "h20") == 8
    assert devices("bfloat16", "h200") == 8
    assert devices("bfloat16", "h20") == 16


def test_the_engine_and_the_planner_find_room_for_as_many_tokens() -> None:
    config = tiny_config()
    shape, format_, budget = from_m1(config, "tiny"), FORMATS["float32"], 10**7
    sizes = CacheSizes(
        page_tokens=PAGE_TOKENS,
        page_bytes=CachePools.page_bytes(config, PAGE_TOKENS, torch.float32),
        state_bytes=CachePools.state_bytes(config, torch.float32),
        budget_bytes=budget,
    )
    weights = weight_bytes(shape.weights(), format_, Layout())
    assert sizes.longest_tokens == room_tokens(shape, format_, Layout(), weights + budget)
    longest = sizes.longest_tokens
    assert sizes.bytes_for(longest) <= budget < sizes.bytes_for(longest + 1)


def test_the_longest_sequence_fits_and_one_page_more_does_not() -> None:
    shape, format_, layout = read_shape("minimax-m1"), FORMATS["int8-experts"], serving_layout(8)
    memory = 72 * 10**9
    longest = room_tokens(shape, format_, layout, memory)
    assert longest is not None

    def need(tokens: int) -> int:
        return serving_memory(
            shape, format_, layout, num_sequences=1, context_tokens=tokens
        ).total_bytes

    assert need(longest) <= memory < need(longest + 1)


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    shape, format_, layout = read_shape("minimax-m1"), FORMATS["int8-experts"], serving_layout(8)
    most = most_sequences(shape, format_, DEVICES["h800"], layout, context_tokens=40_000)
    sizes = [
        serving_memory(shape, format_, layout, num_sequences=n, context_tokens=40_000).total_bytes
        for n in (most, most + 1)
    ]
    assert sizes[0] <= 0.9 * 80e9 < sizes[1]


@pytest.mark.parametrize(
    "bad", [{"tensor": 0}, {"pipeline": -1}, {"expert": 3, "tensor": 8}, {"expert": 4}]
)
def test_senseless_layouts_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Layout(**bad)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="pipeline is 9"):
        serving_memory(
            read_shape("nano"),
            FORMATS["float32"],
            Layout(pipeline=9),
            num_sequences=1,
            context_tokens=1,
        )


def test_quantised_weights_are_not_trained() -> None:
    with pytest.raises(ValueError, match="quantised"):
        training_memory(read_shape("nano"), FORMATS["fp8"], Layout(), num_tokens=1, recompute=False)
