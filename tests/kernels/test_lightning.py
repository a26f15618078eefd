from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from openm1.kernels.lightning.chunk import lightning_chunk
from openm1.kernels.lightning.naive import lightning_naive
from openm1.kernels.lightning.op import lightning_attention, lightning_decode
from openm1.kernels.packing import PackedLayout
from openm1.model.config import M1_40K
from openm1.model.lightning_attention import layer_slopes

# fp32 sums of some hundred terms, against fp64; relative to the largest entry.
FP32_ERROR = 1e-5
# Both sides in fp64: only the order of the sums differs.
FP64_ERROR = 1e-12
HEAD_DIM = 8

LENGTHS = [[1], [63], [64], [65], [500], [1, 63, 64, 65], [130, 1, 70, 128]]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that a kernel allocates and forgets to fill holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def slopes() -> Tensor:
    """M1's fastest and slowest head, of the first and of the last lightning layer."""
    return torch.cat([layer_slopes(M1_40K, layer)[[0, -1]] for layer in (0, 78)])


def inputs(layout: PackedLayout, with_state: bool, dtype: torch.dtype) -> list[Tensor]:
    shape = (layout.num_tokens, len(slopes()), HEAD_DIM)
    tensors = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    if with_state:
        state = (layout.num_sequences, len(slopes()), HEAD_DIM, HEAD_DIM)
        tensors.append(torch.randn(state, dtype=dtype))
    return [tensor.requires_grad_() for tensor in tensors]


def run(kernel, tensors: list[Tensor], layout: PackedLayout, **options) -> tuple[Tensor, Tensor]:
    q, k, v, *state = tensors
    initial = state[0] if state else None
    return kernel(q, k, v, slopes(), layout=layout, initial_state=initial, **options)


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).detach().abs().max() / truth.detach().abs().max())


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_chunk_is_naive_forward_and_backward(lengths: list[int], with_state: bool) -> None:
    layout = PackedLayout(lengths)
    ours = inputs(layout, with_state, torch.float32)
    truth = [tensor.detach().double().requires_grad_() for tensor in ours]
    results, expected = run(lightning_chunk, ours, layout), run(lightning_naive, truth, layout)
    for result, exact in zip(results, expected, strict=True):
        assert relative_error(result, exact) < FP32_ERROR
    weights = [torch.randn_like(result) for result in results]
    gradients = torch.autograd.grad(results, ours, weights)
    exact_gradients = torch.autograd.grad(expected, truth, [w.double() for w in weights])
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert relative_error(gradient, exact) < FP32_ERROR


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 200])
def test_result_does_not_depend_on_the_chunk_size(chunk_tokens: int) -> None:
    layout = PackedLayout([130, 1, 70])
    tensors = inputs(layout, True, torch.float64)
    expected = run(lightning_naive, tensors, layout)
    results = run(lightning_chunk, tensors, layout, chunk_tokens=chunk_tokens)
    for result, exact in zip(results, expected, strict=True):
        assert relative_error(result, exact) < FP64_ERROR


def test_packed_sequences_do_not_see_each_other() -> None:
    layout = PackedLayout([70, 3, 129])
    q, k, v, state = inputs(layout, True, torch.float64)
    packed, last = run(lightning_chunk, [q, k, v, state], layout)
    for n, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        part = [x[start : start + length] for x in (q, k, v)]
        alone = run(lightning_chunk, [*part, state[n : n + 1]], PackedLayout([length]))
        assert relative_error(packed[start : start + length], alone[0]) < FP64_ERROR
        assert relative_error(last[n : n + 1], alone[1]) < FP64_ERROR


def test_a_sequence_in_two_parts_is_the_whole() -> None:
    tensors = inputs(PackedLayout([150]), False, torch.float64)
    out, last = run(lightning_chunk, tensors, PackedLayout([150]))
    head, tail = [x[:67] for x in tensors], [x[67:] for x in tensors]
    first, state = run(lightning_chunk, head, PackedLayout([67]))
    second, end = run(lightning_chunk, [*tail, state], PackedLayout([83]))
    assert relative_error(torch.cat([first, second]), out) < FP64_ERROR
    assert relative_error(end, last) < FP64_ERROR


def test_decode_is_one_step_of_naive() -> None:
    layout = PackedLayout([1] * 5)
    q, k, v, state = (tensor.detach() for tensor in inputs(layout, True, torch.float32))
    before = state.clone()
    out, after = lightning_decode(q, k, v, slopes(), state)
    exact = run(lightning_naive, [x.double() for x in (q, k, v, state)], layout)
    assert torch.equal(state, before)
    assert relative_error(out, exact[0]) < FP32_ERROR
    assert relative_error(after, exact[1]) < FP32_ERROR


def test_states_and_decays_stay_fp32_for_bf16_inputs() -> None:
    """In bf16 the slowest head's decay would round to 1 and the head never forget."""
    layout = PackedLayout([400])
    tensors = [tensor.detach().bfloat16() for tensor in inputs(layout, False, torch.float32)]
    out, last = run(lightning_chunk, tensors, layout)
    exact = run(lightning_naive, [tensor.double() for tensor in tensors], layout)
    assert out.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    assert relative_error(last, exact[1]) < FP32_ERROR
    q, k, v = (tensor[:1] for tensor in tensors)
    out, after = lightning_decode(q, k, v, slopes(), last)
    exact = run(lightning_naive, [x.double() for x in (q, k, v, last)], PackedLayout([1]))
    assert (out.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(after, exact[1]) < FP32_ERROR


def test_public_op_takes_boundaries_or_one_sequence() -> None:
    layout = PackedLayout([3, 5])
    q, k, v = inputs(layout, False, torch.float32)
    whole = lightning_attention(q, k, v, slopes())
    packed = lightning_attention(q, k, v, slopes(), cu_seqlens=torch.tensor([0, 3, 8]))
    for result, expected in (
        (whole, run(lightning_chunk, [q, k, v], PackedLayout([8]))),
        (packed, run(lightning_chunk, [q, k, v], layout)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_public_op_refuses_what_does_not_fit() -> None:
    q, k, v = inputs(PackedLayout([4]), False, torch.float32)
    with pytest.raises(ValueError, match="cu_seqlens is"):
        lightning_attention(q, k, v, slopes(), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="layout holds 5 tokens, q has 4"):
        lightning_attention(q, k, v, slopes(), layout=PackedLayout([5]))
    state = torch.zeros(2, len(slopes()), HEAD_DIM, HEAD_DIM)
    with pytest.raises(ValueError, match="initial_state has 2 sequences, expected 1"):
        lightning_attention(q, k, v, slopes(), initial_state=state)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("lengths", [[40, 7], [130, 1, 70]], ids=str)
def test_leaving_out_the_last_states_changes_no_output(
    lengths: list[int], with_state: bool
) -> None:
    layout = PackedLayout(lengths)
    tensors = inputs(layout, with_state, torch.float64)
    out, _ = run(lightning_chunk, tensors, layout)
    alone, last = run(lightning_chunk, tensors, layout, need_state=False)
    assert last is None
    assert relative_error(alone, out) < FP64_ERROR
