"""The CPU's own kernels against fp64."""

from __future__ import annotations

import pytest
import torch
from openm1_vllm.cpu import head_product, lightning_decode_cpu

from openm1.kernels.lightning.naive import lightning_naive
from openm1.kernels.packing import PackedLayout

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_decode_moves_the_named_pages_only(dtype, threads):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 2, 3 * 24, generator=generator).to(dtype)
    q, k, v = qkv.chunk(3, -1)
    slopes = torch.tensor([0.9, 1e-6])
    apart = torch.randn(7, 3, 2, 24, 24, generator=generator)
    states, pages = apart[:, 1], torch.tensor([5, 0, 2], dtype=torch.int32)
    whole = apart.clone()
    expected, last = lightning_naive(
        *(x.double() for x in (q, k, v)),
        slopes.double(),
        layout=PackedLayout([1, 1, 1]),
        initial_state=states[pages.long()].double(),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = lightning_decode_cpu(q, k, v, slopes, states, pages)
    finally:
        torch.set_num_threads(before)
    assert (out - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert (states[pages.long()] - last).abs().max() < TOLERANCE * last.abs().max()
    whole[pages.long(), 1] = apart[pages.long(), 1]
    assert torch.equal(whole, apart)
