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
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    states: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """One token a row [S, H, D]: writes `out` and the fp32 states [P, H, D, D] of `pages`.

    `pages` is int32 [S], each page at most once; on a GPU, rows with a negative one are left alone.
    """
    if q.is_cuda:
        from openm1_vllm.triton_lightning import lightning_decode_triton

        lightning_decode_triton(q, k, v, slopes, states, pages, out)
        return
    from openm1_vllm.cpu_lightning import lightning_decode_cpu

    lightning_decode_cpu(q, k, v, slopes, states, pages, out)
