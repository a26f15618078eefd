"""The CPU's own kernels against fp64."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from openm1_vllm.cpu import head_product, tiles
from openm1_vllm.cpu_lightning import lightning_decode_cpu, lightning_prefill_cpu

from openm1.kernels.lightning.naive import lightning_naive
from openm1.kernels.packing import PackedLayout
from openm1.model.config import M1_80K
from openm1.model.lightning_attention import layer_slopes

TOLERANCE = 2e-6
"""fp32 sums of 96 products, of the largest."""
# The slowest head of the last lightning layer and the fastest of the first.
SLOPES = torch.stack([layer_slopes(M1_80K, 78)[-1], layer_slopes(M1_80K, 0)[0]])


@pytest.mark.parametrize("count", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("vocab_size", [512, 517])
@pytest.mark.parametrize("threads", [1, 2])
def test_sums_are_fp32(count, vocab_size, threads):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 96, generator=generator).bfloat16().float()
    weight = torch.randn(vocab_size, 96, generator=generator).bfloat16()
    with threads_of_torch(threads):
        out = head_product(x, weight)
    expected = x.double() @ weight.double().T
    assert out.shape == (count, vocab_size)
    assert (out - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_decode_moves_the_named_pages_only(dtype, threads):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(4, 2, 3 * 24, generator=generator).to(dtype)
    q, k, v = qkv[:3].chunk(3, -1)
    slopes = torch.tensor([0.9, 1e-6])
    apart = torch.randn(7, 3, 2, 24, 24, generator=generator)
    states, pages = apart[:, 1], torch.tensor([5, 0, 2], dtype=torch.int32)
    whole = apart.clone()
    layout = PackedLayout([1, 1, 1])
    expected, last = recurrence(q, k, v, slopes, layout, states[pages.long()])
    out = torch.full((4, 2 * 24), torch.nan, dtype=dtype)
    with threads_of_torch(threads):
        lightning_decode_cpu(qkv.flatten(1), slopes, states, pages, 3, out)
    assert out[3].isnan().all()
    assert_close(out[:3].unflatten(-1, (2, 24)), expected, max(TOLERANCE, torch.finfo(dtype).eps))
    assert_close(states[pages.long()], last, TOLERANCE)
    whole[pages.long(), 1] = apart[pages.long(), 1]
    assert torch.equal(whole, apart)


@pytest.mark.skipif(not tiles(), reason="this CPU has no tile unit")
@pytest.mark.parametrize("lengths", [[1], [33], [63], [64], [65], [600], [65, 1, 130, 64]], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("threads", [1, 2])
def test_prefill_by_tiles_is_the_recurrence(lengths, dim, threads):
    generator = torch.Generator().manual_seed(dim)
    qkv = torch.randn(sum(lengths), 2, 3 * dim, generator=generator).bfloat16()
    # What lies around the tokens must not be read.
    around = torch.full((sum(lengths) + 128, 2, 3 * dim), torch.nan, dtype=torch.bfloat16)
    around[64:-64] = qkv
    q, k, v = around[64:-64].chunk(3, -1)
    state = torch.randn(len(lengths), 2, dim, dim, generator=generator)
    layout = PackedLayout(lengths)
    before = state.clone()
    with threads_of_torch(threads):
        out, last = lightning_prefill_cpu(q, k, v, SLOPES, layout, state)
    expected, after = recurrence(q, k, v, SLOPES, layout, state)
    assert torch.equal(state, before)
    assert out.dtype == torch.bfloat16
    for head in range(2):  # The slow head's numbers are hundreds of times the fast one's.
        assert_close(out[:, head], expected[:, head], 2**-7)
        assert_close(last[:, head], after[:, head], 2**-16)  # Two parts of eight bits.


def test_other_heads_than_tiles_take_are_refused():
    q = torch.zeros(3, 2, 24, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="heads of 24"):
        lightning_prefill_cpu(q, q, q, SLOPES, PackedLayout([3]), torch.zeros(1, 2, 24, 24))


def recurrence(q, k, v, slopes, layout, state):
    """In fp64."""
    wide = (x.double() for x in (q, k, v))
    return lightning_naive(*wide, slopes.double(), layout=layout, initial_state=state.double())


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (got.double() - expected).abs().amax() / expected.abs().amax()
    assert error < tolerance, float(error)


@contextmanager
def threads_of_torch(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
