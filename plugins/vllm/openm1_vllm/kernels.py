"""Lightning attention as vLLM needs it: Triton on a GPU, numba and torch elsewhere."""

from __future__ import annotations

import torch

from openm1.kernels.lightning.chunk import lightning_chunk
from openm1.kernels.packing import PackedLayout


def lightning_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    layout: PackedLayout,
    initial_state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [T, H, D] in the dtype of `q`, and the fp32 states [N, H, D, D] after each sequence.

    q, k, v are [T, H, D], packed as `layout` says; `initial_state` is fp32 [N, H, D, D].
    """
    if q.is_cuda:
        from openm1_vllm.triton_lightning import lightning_prefill_triton

        return lightning_prefill_triton(q, k, v, slopes, layout, initial_state)
    from openm1_vllm.cpu_lightning import can_prefill, lightning_prefill_cpu

    if can_prefill(q):
        return lightning_prefill_cpu(q, k, v, slopes, layout, initial_state)
    out, state = lightning_chunk(q, k, v, slopes, layout=layout, initial_state=initial_state)
    assert state is not None
    return out, state


def lightning_decode(
    qkv: torch.Tensor,
    slopes: torch.Tensor,
    states: torch.Tensor,
    pages: torch.Tensor,
    count: int,
    out: torch.Tensor,
) -> None:
    """One token a row: fills the first `count` rows of `out` [S, H D] and moves the fp32 states
    [P, H, D, D] of `pages` on.

    Rows of `qkv` [S, H 3 D] are packed per head as [q | k | v]. `pages` is int32, each page at most
    once; on a GPU, rows with a negative one are left alone.
    """
    if qkv.is_cuda:
        from openm1_vllm.triton_lightning import lightning_decode_triton

        shape = states.shape[1], -1
        q, k, v = qkv[:count].unflatten(-1, shape).chunk(3, -1)
        out = out[:count].unflatten(-1, shape)
        lightning_decode_triton(q, k, v, slopes, states, pages[:count], out)
        return
    from openm1_vllm.cpu_lightning import lightning_decode_cpu

    lightning_decode_cpu(qkv, slopes, states, pages, count, out)
