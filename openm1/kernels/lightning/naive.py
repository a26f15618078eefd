"""The recurrence as it is written, one token at a time: the truth, in fp64 where asked."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from openm1.kernels.packing import PackedLayout


def lightning_naive(
    q: Float[Tensor, "T H D"],
    k: Float[Tensor, "T H D"],
    v: Float[Tensor, "T H D"],
    slope: Float[Tensor, " H"],
    *,
    layout: PackedLayout,
    initial_state: Float[Tensor, "N H D D"] | None = None,
) -> tuple[Float[Tensor, "T H D"], Float[Tensor, "N H D D"]]:
    """S_t = exp(-slope) S_(t-1) + k_t^T v_t;  o_t = q_t S_t. Returns outputs and last states.

    Everything runs in the dtype of `q`. Source: MiniMax-01 report (arXiv 2501.08313), section 2.
    """
    decay = torch.exp(-slope.to(q.dtype))[:, None, None]  # [H, 1, 1]
    outputs, states = [], []
    for n, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        if initial_state is None:
            state = q.new_zeros(q.shape[1], q.shape[2], q.shape[2])
        else:
            state = initial_state[n].to(q.dtype)
        for t in range(start, start + length):
            state = decay * state + k[t, :, :, None] * v[t, :, None, :]
            outputs.append(torch.einsum("hd,hde->he", q[t], state))
        states.append(state)
    return torch.stack(outputs), torch.stack(states)
