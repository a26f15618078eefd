"""The head's own product against fp64."""

from __future__ import annotations

import pytest
import torch
from openm1_vllm.cpu_head import head_product

TOLERANCE = 2e-6
"""fp32 sums of 96 products, of the largest."""


@pytest.mark.parametrize("count", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("vocab_size", [512, 517])
@pytest.mark.parametrize("threads", [1, 2])
def test_sums_are_fp32(count, vocab_size, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(count)
        x = torch.randn(count, 96, generator=generator).bfloat16().float()
        weight = torch.randn(vocab_size, 96, generator=generator).bfloat16()
        out = head_product(x, weight)
    finally:
        torch.set_num_threads(before)
    expected = x.double() @ weight.double().T
    assert out.shape == (count, vocab_size)
    assert (out - expected).abs().max() < TOLERANCE * expected.abs().max()
