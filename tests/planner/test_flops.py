from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.planner.flops import (
    decode_flops,
    generation_flops,
    prefill_flops,
    total_flops,
    training_flops,
)
from openm1.planner.models import read_shape, with_absorbed_latent

MODELS = ("minimax-m1", "nano", "deepseek-r1", "qwen3-235b-a22b")
lengths = st.integers(0, 5000)


@given(model=st.sampled_from(MODELS), past=lengths, a=lengths, b=lengths)
def test_tokens_decoded_in_two_goes_cost_the_same(model: str, past: int, a: int, b: int) -> None:
    shape = read_shape(model)
    both = total_flops(decode_flops(shape, a + b, past_tokens=past))
    first = total_flops(decode_flops(shape, a, past_tokens=past))
    assert both == first + total_flops(decode_flops(shape, b, past_tokens=past + a))


@given(model=st.sampled_from(MODELS), past=lengths, new=lengths)
def test_one_token_chunks_are_decoding(model: str, past: int, new: int) -> None:
    """But for lightning's product of each token with itself, which decoding has in the state."""
    shape = read_shape(model)
    lines = prefill_flops(shape, new, past_tokens=past, num_logits=new, chunk_tokens=1)
    own = [x for x in lines if x.layers == "lightning" and x.operation in ("scores", "values")]
    decoded = total_flops(decode_flops(shape, new, past_tokens=past))
    assert total_flops(lines) - total_flops(own) == decoded


def test_m1_against_r1_in_exact_counts() -> None:
    """Both forms of MLA: the report's "25 %" at 100K tokens lies between them."""
    latent = read_shape("deepseek-r1")
    m1, expanded, absorbed = (
        total_flops(generation_flops(shape, prompt_tokens=0, generated_tokens=100_000))
        for shape in (read_shape("minimax-m1"), latent, with_absorbed_latent(latent))
    )
    assert m1 / expanded == pytest.approx(0.344, abs=5e-4)
    assert m1 / absorbed == pytest.approx(0.120, abs=5e-4)


def test_absorbed_latents_are_expanded_for_a_prompt() -> None:
    latent = read_shape("deepseek-r1")
    absorbed = with_absorbed_latent(latent)
    assert prefill_flops(latent, 1000) == prefill_flops(absorbed, 1000)
    again = total_flops(prefill_flops(absorbed, 10, past_tokens=90)) - total_flops(
        prefill_flops(latent, 10, past_tokens=90)
    )
    assert again == 2 * 61 * 90 * (128 * (128 + 128) * 512)


def test_training_is_three_forwards_or_four() -> None:
    shape = read_shape("minimax-m1")
    forward = prefill_flops(shape, 4096, num_logits=4096)
    step = training_flops(shape, num_sequences=2, sequence_tokens=4096)
    assert total_flops(step) == 6 * total_flops(forward)
    again = training_flops(shape, num_sequences=2, sequence_tokens=4096, recompute=True)
    layers = [line for line in forward if line.layers != "head"]
    assert total_flops(again) - total_flops(step) == 2 * total_flops(layers)


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_nonsense_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=f"generated_tokens is {value}"):
        generation_flops(read_shape("nano"), prompt_tokens=0, generated_tokens=value)
