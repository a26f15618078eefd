from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openm1.kernels.packing import PackedLayout
from openm1.model.cache import CacheView
from openm1.model.config import M1_40K, PRESETS, M1Config
from openm1.model.lightning_attention import layer_slopes
from openm1.model.m1 import M1ForCausalLM

from .paging import PagedSequences
from .reference import alibi_slopes, read_checkpoint, reference_logits
from .tiny import one_expert_config, pre_norm_config, random_ids, random_model, tiny_config

# Logits here are of unit scale; fp32 rounding passes through up to six layers with scales above 1.
REFERENCE_ERROR = 2e-5
# Two fp32 paths through the same model.
PATHS_ERROR = 2e-5
FP64_ERROR = 1e-12

CONFIGS = {
    "post-norm": tiny_config(),
    "pre-norm": pre_norm_config(),
    "one expert": one_expert_config(),
}


def logits_of(
    model: M1ForCausalLM, sequences: list[Tensor], view: CacheView | None
) -> list[Tensor]:
    """One forward pass over packed sequences."""
    layout = PackedLayout([len(ids) for ids in sequences])
    with torch.no_grad():
        hidden = model.model(torch.cat(sequences), layout, view).hidden
        return list(model.logits(hidden).split(layout.lengths))


def in_parts(
    model: M1ForCausalLM, cache: PagedSequences, parts: dict[int, list[Tensor]]
) -> dict[int, Tensor]:
    """Runs each slot's parts one after another, all slots that have one left side by side."""
    results: dict[int, list[Tensor]] = {slot: [] for slot in parts}
    for step in range(max(len(pieces) for pieces in parts.values())):
        batch = {slot: pieces[step] for slot, pieces in parts.items() if step < len(pieces)}
        view = cache.view({slot: len(ids) for slot, ids in batch.items()})
        outputs = logits_of(model, list(batch.values()), view)
        for slot, out in zip(batch, outputs, strict=True):
            results[slot].append(out)
    return {slot: torch.cat(outputs) for slot, outputs in results.items()}


def largest_difference(ours: Tensor, other: Tensor) -> float:
    return float((ours.detach().double() - other.detach().double()).abs().max())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_the_references(config: M1Config, tmp_path: Path) -> None:
    """More tokens than one chunk holds, so that the recurrence between chunks is in it."""
    model = random_model(config)
    model.save_pretrained(tmp_path / "model")
    (ids,) = random_ids(config, 90)
    truth = reference_logits(*read_checkpoint(tmp_path / "model"), ids.tolist())
    with torch.no_grad():
        ours = model(ids[None])[0]
    assert 0.5 < truth.std() < 5.0
    assert largest_difference(ours, torch.from_numpy(truth)) < REFERENCE_ERROR


def test_slopes_are_alibis() -> None:
    for heads in (1, 4, 6, 12, 64):
        config = tiny_config(num_attention_heads=heads, num_key_value_heads=1)
        factors = layer_slopes(config, 2).double() / (1 - 2 / 5 + 1e-5)
        expected = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
        torch.testing.assert_close(factors, expected, rtol=1e-6, atol=0)
    # The slowest head of M1 forgets one part in twenty thousand per token, not nothing.
    assert 4.9e-5 < float(layer_slopes(M1_40K, 78)[-1]) < 5.0e-5


def test_packed_sequences_are_separate_sequences() -> None:
    model = random_model(tiny_config())
    sequences = random_ids(model.config, 70, 1, 33, 2)
    alone = [logits_of(model, [ids], None)[0] for ids in sequences]
    for packed, expected in zip(logits_of(model, sequences, None), alone, strict=True):
        assert largest_difference(packed, expected) < PATHS_ERROR


def test_rows_of_a_batch_are_sequences() -> None:
    model = random_model(tiny_config())
    ids = torch.stack(random_ids(model.config, 12, 12))
    out = model(ids)
    assert out.shape == (2, 12, 61) and out.dtype == torch.float32
    for row, expected in zip(ids, out, strict=True):
        assert largest_difference(model(row[None])[0], expected) < PATHS_ERROR


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_prefill_in_parts_and_decode_are_one_pass(config: M1Config) -> None:
    """Slots and pages out of order, parts of one and of many tokens, new sequences beside old ones.

    Whatever has not been written is NaN: behind the lengths, in pages of others, in free slots.
    """
    model = random_model(config)
    sequences = dict(zip((2, 0, 3), random_ids(config, 90, 20, 7), strict=True))
    cuts = {2: [70, 1, 13, 1, 1, 1, 1, 1, 1], 0: [1, 14, 1, 1, 1, 1, 1], 3: [1] * 7}
    parts = {slot: list(ids.split(cuts[slot])) for slot, ids in sequences.items()}
    results = in_parts(model, PagedSequences(config), parts)
    for slot, ids in sequences.items():
        (whole,) = logits_of(model, [ids], None)
        assert largest_difference(results[slot], whole) < PATHS_ERROR


def test_prefill_in_parts_is_one_pass_in_fp64() -> None:
    """Rotary tables are fp32 in every path, so nothing but the order of sums can differ."""
    model = random_model(tiny_config(), dtype=torch.float64)
    (ids,) = random_ids(model.config, 90)
    cache = PagedSequences(model.config, dtype=torch.float64)
    parts = in_parts(model, cache, {0: list(ids.split([66, 1, 1, 20, 1, 1]))})
    (whole,) = logits_of(model, [ids], None)
    assert largest_difference(parts[0], whole) < FP64_ERROR


def test_copies_of_a_state_and_of_the_last_page_continue() -> None:
    """Two sequences share the full pages of a prompt; what one writes the other does not see."""
    model = random_model(tiny_config())
    prompt, first, second = random_ids(model.config, 30, 5, 5)
    cache = PagedSequences(model.config)
    in_parts(model, cache, {1: [prompt]})
    cache.fork(1, 0)
    results = in_parts(model, cache, {0: list(first.split(1)), 1: [second]})
    for slot, ids in ((0, first), (1, second)):
        (whole,) = logits_of(model, [torch.cat([prompt, ids])], None)
        assert largest_difference(results[slot], whole[30:]) < PATHS_ERROR


def test_a_bf16_model_keeps_fp32_states_and_head() -> None:
    config = tiny_config()
    model = random_model(config, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.float32
    cache = PagedSequences(config, dtype=torch.bfloat16)
    (ids,) = random_ids(config, 24)
    logits = in_parts(model, cache, {0: list(ids.split([20, 1, 1, 1, 1]))})[0]
    assert logits.dtype == torch.float32
    state = cache.pools.states[0]
    assert state.dtype == torch.float32
    # It was never rounded on the way either.
    assert not torch.equal(state, state.bfloat16().float())
    assert cache.pools.keys.dtype == cache.pools.values.dtype == torch.bfloat16
    wide = random_model(config)
    wide.load_state_dict(model.state_dict())
    # bf16 keeps 8 bits; six layers of it stay well below the logits' unit scale.
    assert largest_difference(logits, wide(ids[None])[0]) < 0.3


def test_the_balance_loss_is_only_taken_for_training() -> None:
    model = random_model(tiny_config())
    ids, layout = random_ids(model.config, 9)[0], PackedLayout([9])
    assert float(model.model(ids, layout).aux_loss.detach()) > 1.0
    with torch.no_grad():
        assert float(model.model(ids, layout).aux_loss) == 0.0


def test_every_parameter_gets_a_gradient() -> None:
    model = random_model(tiny_config())
    sequences = random_ids(model.config, 40, 9)
    output = model.model(torch.cat(sequences), PackedLayout([40, 9]))
    loss = model.logits(output.hidden).logsumexp(-1).mean() + output.aux_loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_initialisation_is_repeatable() -> None:
    config = tiny_config()
    first, again, other = (M1ForCausalLM(config, seed=seed) for seed in (3, 3, 4))
    for name, parameter in first.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name])
        assert parameter.ndim == 1 or not torch.equal(parameter, other.state_dict()[name])


def test_decays_survive_the_meta_device_and_copies() -> None:
    model = M1ForCausalLM(tiny_config(), device="meta")
    moved = copy.deepcopy(model).to_empty(device="cpu").bfloat16()
    for layer in model.config.lightning_layers:
        slopes = moved.model.layers[layer].self_attn._slopes
        assert slopes.dtype == torch.float32
        assert torch.equal(slopes, layer_slopes(model.config, layer))


@pytest.mark.parametrize("shape", [(0, 4), (1, 0)])
def test_empty_inputs_are_refused(shape: tuple[int, int]) -> None:
    model = M1ForCausalLM(PRESETS["nano"], device="meta")
    with pytest.raises(ValueError, match="input_ids has shape"):
        model(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("token", [-1, 61])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {token} is outside 0\.\.60"):
        random_model(tiny_config())(torch.tensor([[3, token]]))
