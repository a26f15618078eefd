"""The fused CPU decode against the model in torch, and against itself in other company."""

from __future__ import annotations

import pytest
import torch

from openm1.engine.cache.hybrid import CachedSequence
from openm1.engine.cpu_runner import CpuRunner, unsupported
from openm1.engine.draw import BadLogits, sample_plain
from openm1.model.cache import CachePools
from openm1.model.int8 import Int8Matrix, quantize_int8
from openm1.model.m1 import M1ForCausalLM

from .tiny import hybrid_config, hybrid_model

# Random layers amplify what the order of sums does to the last bits.
FP32_ERROR = 2e-4
BF16_ERROR = 0.05
# Whole tiles of the tile unit, where there is one.
WHOLE = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8}  # fmt: skip
# Whole tiles in attention too, whose pages must then hold as many keys.
WIDE = WHOLE | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
SHAPES = {
    "hybrid": {},
    "whole tiles": WHOLE,
    "whole tiles, heads too": WIDE,
    "wide heads": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 80},
    "one query a group": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 20},
    "llama": {
        "attn_type_list": (1, 1, 1, 1),
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "postnorm": False,
        "tie_word_embeddings": True,
        "rotary_dim": 8,
    },
    "lightning only": {"attn_type_list": (0, 0, 0, 0)},
    "odd widths": {"hidden_size": 37, "intermediate_size": 19},
    "three experts": {"num_experts_per_tok": 3},
}


def new_runner(
    model: M1ForCausalLM, rows: int, tokens: int, threads: int = 1
) -> tuple[CpuRunner, list[CachedSequence]]:
    """Sequences with shuffled pages and slots in poisoned pools; states start from zero."""
    page_tokens = 32 if model.config.head_dim == 64 else 8
    each = -(-tokens // page_tokens)
    pools = CachePools(
        model.config,
        num_pages=rows * each + 3,
        num_slots=rows + 2,
        page_tokens=page_tokens,
        dtype=model.dtype,
    )
    for table in (pools.keys, pools.values, pools.states):
        table.fill_(torch.nan)
    order = torch.randperm(rows * each + 3).tolist()
    slots = torch.randperm(rows + 2).tolist()
    sequences = []
    for row in range(rows):
        pools.states[slots[row]] = 0
        sequences.append(
            CachedSequence(
                pages=order[row * each : (row + 1) * each],
                slot=slots[row],
                num_tokens=0,
                num_cached=0,
                branch_point=None,
                epoch=0,
            )
        )
    return CpuRunner(model, pools, threads), sequences


def decode_all(
    runner: CpuRunner, sequences: list[CachedSequence], ids: torch.Tensor
) -> torch.Tensor:
    """Logits [B, T, V] of every position, one token at a time."""
    steps = []
    for column in ids.T.tolist():
        steps.append(runner.decode(column, sequences).clone())
        for sequence in sequences:
            sequence.num_tokens += 1
    return torch.stack(steps, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_decoding_gives_the_logits_of_a_full_forward_pass(shape: str, threads: int) -> None:
    model = hybrid_model(**SHAPES[shape])
    ids = torch.randint(0, 96, (5, 21))
    runner, sequences = new_runner(model, 5, 21, threads)
    torch.testing.assert_close(
        decode_all(runner, sequences, ids), model(ids), atol=FP32_ERROR, rtol=FP32_ERROR
    )


@torch.inference_mode()
def test_contexts_longer_than_one_split_agree_too() -> None:
    model = hybrid_model(num_hidden_layers=2, attn_type_list=(1, 0), max_position_embeddings=4096)
    ids = torch.randint(0, 96, (2, 600))
    runner, sequences = new_runner(model, 2, 600, 2)
    torch.testing.assert_close(
        decode_all(runner, sequences, ids), model(ids), atol=FP32_ERROR, rtol=FP32_ERROR
    )


@pytest.mark.parametrize("shape", ["hybrid", "whole tiles", "whole tiles, heads too", "llama"])
@torch.inference_mode()
def test_bf16_weights_are_closer_to_fp32_than_bf16_activations_are(shape: str) -> None:
    """Of a model whose weights are exact in bf16, so that only arithmetic differs."""
    model = hybrid_model(**SHAPES[shape])
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())
    short = hybrid_model(torch.bfloat16, **SHAPES[shape])
    short.load_state_dict(model.state_dict())
    # More rows than a tile has, so that an expert may get more, too.
    ids = torch.randint(0, 96, (40, 35))
    runner, sequences = new_runner(short, 40, 35)
    exact = model(ids).log_softmax(-1)
    ours = (decode_all(runner, sequences, ids).log_softmax(-1) - exact).abs()
    torchs = (short(ids).log_softmax(-1) - exact).abs()
    # A token whose router is nearly undecided may go elsewhere; it says nothing about precision.
    assert ours.median() < BF16_ERROR
    assert ours.median() <= torchs.median() * 1.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["hybrid", "whole tiles", "whole tiles, heads too"])
@torch.inference_mode()
def test_company_and_threads_change_no_bit(shape: str, dtype: torch.dtype) -> None:
    model = hybrid_model(dtype, **SHAPES[shape])
    ids = torch.randint(0, 96, (70, 36))
    alone = [decode_all(*new_runner(model, 1, 36), ids[row : row + 1]) for row in range(19)]
    for rows, threads in ((70, 2), (33, 1), (19, 1), (19, 2), (3, 2), (2, 1)):
        together = decode_all(*new_runner(model, rows, 36, threads), ids[:rows])
        assert torch.equal(together[:19], torch.cat(alone[:rows]))


@torch.inference_mode()
def test_new_weights_are_seen_at_once_and_a_copied_head_after_notice() -> None:
    model, other = hybrid_model(), M1ForCausalLM(hybrid_config(), seed=7).eval()
    ids = torch.randint(0, 96, (2, 5))
    runner, sequences = new_runner(model, 2, 5)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(
        decode_all(runner, sequences, ids), other(ids), atol=FP32_ERROR, rtol=FP32_ERROR
    )
    short = hybrid_model(torch.bfloat16)
    short.lm_head.weight.copy_(short.lm_head.weight.bfloat16().float())
    runner, sequences = new_runner(short, 1, 3)
    before = runner.decode([9], sequences).clone()
    short.lm_head.weight.mul_(2)
    runner.weights_changed()
    runner.pools.states.zero_()
    torch.testing.assert_close(runner.decode([9], sequences), 2 * before)


def test_what_it_cannot_run_is_said() -> None:
    model = hybrid_model(torch.float64)
    assert "float64" in str(unsupported(model))
    with pytest.raises(ValueError, match="float64"):
        new_runner(model, 1, 1)


def sampled(logits: torch.Tensor, temperature: list[float], given: list[int], draws: list[float]):
    columns = (
        torch.tensor(temperature, dtype=torch.float64),
        torch.tensor(draws, dtype=torch.float64),
        torch.tensor(given),
    )
    runner, _ = new_runner(hybrid_model(), 1, 1, threads=2)
    return runner.sample(logits, *columns), sample_plain(logits, *columns)


@pytest.mark.parametrize("size", [1, 5, 16, 96, 4096, 4099, 30_011])
def test_sampling_agrees_with_the_reference(size: int) -> None:
    # A slice of wider rows, as when the model has more ids than its tokenizer.
    logits = (torch.randn(40, size + 9) * 4)[:, :size]
    temperature = [(0.0, 1.0, 0.3, 2.5)[i % 4] for i in range(40)]
    given = [i % size if i % 7 == 0 else -1 for i in range(40)]
    draws = torch.rand(40, dtype=torch.float64).tolist()
    (tokens, logprobs), (expected, reference) = sampled(logits, temperature, given, draws)
    # In fp32 a draw may fall on the other side of a boundary, which at 40 draws is rare.
    assert (tokens != expected).sum() <= 1
    same = tokens == expected
    torch.testing.assert_close(logprobs[same], reference[same], atol=2e-5, rtol=1e-5)


def test_sampling_takes_the_lowest_of_equals_and_never_what_has_no_weight() -> None:
    logits = torch.full((3, 9000), -torch.inf)
    logits[:, [4500, 8000]] = 2.0
    (tokens, _), _ = sampled(logits, [0.0, 1.0, 1.0], [-1, -1, -1], [0.5, 0.0, 1 - 1e-12])
    assert tokens.tolist() == [4500, 4500, 8000]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 15, 4095, 4096, 8999])
def test_rows_without_a_distribution_are_named(bad: float, place: int) -> None:
    logits = torch.randn(3, 9000)
    logits[1, place] = bad
    with pytest.raises(BadLogits) as caught:
        sampled(logits, [0.0, 1.0, 0.0], [-1, -1, -1], [0.5] * 3)
    assert caught.value.rows == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_int8_weights_give_what_their_full_matrices_give(dtype: torch.dtype) -> None:
    """Against a model that holds the rounded weights in full."""
    ids = torch.randint(0, 96, (4, 12))
    model, full = hybrid_model(dtype, **WHOLE), hybrid_model(**WHOLE)
    quantize_int8(model, ids)
    state = {name: tensor.float() for name, tensor in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Int8Matrix):
            rows = module.rows * module.scales[..., None]
            state[name if rows.ndim == 3 else f"{name}.weight"] = rows
    full.load_state_dict(state)
    runner, sequences = new_runner(model, 4, 12)
    ours = decode_all(runner, sequences, ids)
    difference = (ours.log_softmax(-1) - full(ids).log_softmax(-1)).abs()
    # bf16 rounds keys and values.
    assert difference.median() < (FP32_ERROR if dtype == torch.float32 else BF16_ERROR)
