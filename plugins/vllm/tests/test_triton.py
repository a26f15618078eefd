"""The GPU kernels under Triton's interpreter, against the recurrence in fp64.

The interpreter is chosen when a kernel is defined, so these tests run in a process of their own
(`make test-vllm` sets TRITON_INTERPRET=1 for them).
"""

from __future__ import annotations

import os

import pytest
import torch

from openm1.kernels.lightning.naive import lightning_naive
from openm1.kernels.packing import PackedLayout
from openm1.model.config import M1_80K
from openm1.model.lightning_attention import layer_slopes

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1"
)

TOLERANCE = 2e-6
"""Of the largest number: fp32 sums of up to 600 terms."""
DIM = 32
# The slowest head of the last lightning layer and the fastest of the first.
SLOPES = torch.stack([layer_slopes(M1_80K, 78)[-1], layer_slopes(M1_80K, 0)[0]])


def packed(lengths: list[int], dtype: torch.dtype = torch.float32, seed: int = 0):
    """q, k, v as views of one tensor, as the layer has them."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 2, 3 * DIM, generator=generator).to(dtype)
    state = torch.randn(len(lengths), 2, DIM, DIM, generator=generator)
    return qkv.chunk(3, -1), state


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.isfinite().all()
    error = (got.double() - expected).abs().amax() / expected.abs().amax()
    assert error < tolerance, float(error)


@pytest.mark.parametrize("lengths", [[1], [63], [64], [65], [600], [65, 1, 130, 64]], ids=str)
@pytest.mark.parametrize("from_zero", [True, False])
def test_prefill_is_the_recurrence(lengths, from_zero):
    from openm1_vllm.triton_lightning import lightning_prefill_triton

    (q, k, v), state = packed(lengths)
    if from_zero:
        state.zero_()
    layout = PackedLayout(lengths)
    out, last = lightning_prefill_triton(q, k, v, SLOPES, layout, state)
    wide = (x.double() for x in (q, k, v))
    expected = lightning_naive(*wide, SLOPES.double(), layout=layout, initial_state=state.double())
    for head in range(2):  # The slow head's numbers are hundreds of times the fast one's.
        assert_close(out[:, head], expected[0][:, head], TOLERANCE)
        assert_close(last[:, head], expected[1][:, head], TOLERANCE)


def test_prefill_sums_in_fp32_when_inputs_are_bf16():
    from openm1_vllm.triton_lightning import lightning_prefill_triton

    (q, k, v), state = packed([130], torch.bfloat16)
    layout = PackedLayout([130])
    out, last = lightning_prefill_triton(q, k, v, SLOPES, layout, state)
    wide = (x.double() for x in (q, k, v))
    expected = lightning_naive(*wide, SLOPES.double(), layout=layout, initial_state=state.double())
    assert out.dtype == torch.bfloat16
    assert_close(out, expected[0], 2**-7)  # The interpreter rounds to bf16 by cutting off.
    assert_close(last, expected[1], TOLERANCE)


def test_decode_moves_the_named_pages_only():
    from openm1_vllm.triton_lightning import lightning_decode_triton

    (q, k, v), _ = packed([4])
    apart = torch.randn(7, 3, 2, DIM, DIM)  # A page has room for more than its state.
    states = apart[:, 1]
    pages = torch.tensor([5, 0, -1, 2], dtype=torch.int32)
    before, whole = states.clone(), apart.clone()
    out = torch.full((4, 2, DIM), torch.nan)
    lightning_decode_triton(q, k, v, SLOPES, states, pages, out)
    rows, used = [0, 1, 3], [5, 0, 2]
    expected, last = lightning_naive(
        *(x[rows].double() for x in (q, k, v)),
        SLOPES.double(),
        layout=PackedLayout([1, 1, 1]),
        initial_state=before[used].double(),
    )
    assert_close(out[rows], expected, TOLERANCE)
    assert_close(states[used], last, TOLERANCE)
    assert out[2].isnan().all()
    whole[used, 1] = apart[used, 1]
    assert torch.equal(whole, apart)


def test_head_dim_must_be_a_power_of_two():
    from openm1_vllm.triton_lightning import lightning_prefill_triton

    q = torch.zeros(3, 2, 24)
    with pytest.raises(ValueError, match="head_dim is 24; allowed are powers of two"):
        lightning_prefill_triton(q, q, q, SLOPES, PackedLayout([3]), torch.zeros(1, 2, 24, 24))
