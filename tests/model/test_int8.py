"""int8 weights: close to the full ones, and honest about how close."""

from __future__ import annotations

import pytest
import torch

from openm1.model.int8 import Int8Matrix, is_int8, quantize_int8
from openm1.model.m1 import M1ForCausalLM

from .tiny import tiny_config

# Half a step of 1/127 of the largest weight of a row.
HALF_STEP = 0.5 / 127


def test_each_weight_is_within_half_a_step_of_its_row() -> None:
    weight = torch.randn(3, 20, 17) * torch.logspace(-3, 2, 20)[:, None]
    matrix = Int8Matrix(weight)
    error = (matrix.full() - weight).abs() / weight.abs().amax(-1, keepdim=True)
    assert error.max() <= HALF_STEP * 1.001
    assert torch.equal(matrix[1], matrix.full()[1])
    assert matrix.rows.abs().amax(-1).eq(127).all()


def test_rows_of_zeros_stay_zeros() -> None:
    assert torch.equal(Int8Matrix(torch.zeros(4, 8)).full(), torch.zeros(4, 8))


def test_as_a_layer_it_is_the_product_with_the_full_matrix() -> None:
    matrix, x = Int8Matrix(torch.randn(9, 16)), torch.randn(5, 16)
    torch.testing.assert_close(matrix(x), x @ matrix.full().T)


def test_a_quantized_model_is_smaller_close_and_says_how_close() -> None:
    model = M1ForCausalLM(tiny_config(), seed=1).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 24))
    with torch.no_grad():
        before = model(ids).double().log_softmax(-1)
    report = quantize_int8(model, ids)
    with torch.no_grad():
        after = model(ids).double().log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).mean()
    assert is_int8(model)
    assert report.kl_nats == pytest.approx(float(kl), rel=1e-6)
    assert report.kl_nats > 0
    assert report.bytes_after < report.bytes_before
    assert report.num_tokens == 48
    assert 0 < report.top_1_agreement <= 1
    assert "nats a token" in str(report)


def test_the_router_norms_embedding_and_head_stay() -> None:
    model = M1ForCausalLM(tiny_config(), seed=1).eval()
    quantize_int8(model, torch.zeros(1, 4, dtype=torch.int64))
    kept = {name.rsplit(".", 2)[-2] for name, _ in model.named_parameters()}
    assert kept == {
        "embed_tokens",
        "lm_head",
        "norm",
        "gate",
        "input_layernorm",
        "post_attention_layernorm",
    }
