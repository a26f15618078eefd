"""What the model calls: whole sequences, or one token for many sequences."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from openm1.kernels.lightning.chunk import lightning_chunk
from openm1.kernels.packing import PackedLayout


def lightning_attention(
    q: Float[Tensor, "T H D"],
    k: Float[Tensor, "T H D"],
    v: Float[Tensor, "T H D"],
    slope: Float[Tensor, " H"],
    *,
    cu_seqlens: Tensor | None = None,
    layout: PackedLayout | None = None,
    initial_state: Float[Tensor, "N H D D"] | None = None,
    need_state: bool = True,
) -> tuple[Float[Tensor, "T H D"], Float[Tensor, "N H D D"] | None]:
    """Attention over packed sequences, and (where `need_state`) the state after each.

    `slope` is -ln of each head's decay per token. Give the boundaries as `cu_seqlens` [N+1], or as
    a `layout` made once for many layers; neither means one sequence. Raises ValueError on shapes or
    boundaries that do not fit.
    """
    if not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k, v have shapes {[*q.shape]}, {[*k.shape]}, {[*v.shape]}; not equal")
    if layout is None:
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, len(q)], device=q.device)
        layout = PackedLayout.from_cu_seqlens(cu_seqlens, len(q))
    elif layout.num_tokens != len(q):
        raise ValueError(f"layout holds {layout.num_tokens} tokens, q has {len(q)}")
    if initial_state is not None and len(initial_state) != layout.num_sequences:
        raise ValueError(
            f"initial_state has {len(initial_state)} sequences, expected {layout.num_sequences}"
        )
    return lightning_chunk(
        q, k, v, slope, layout=layout, initial_state=initial_state, need_state=need_state
    )


def lightning_decode(
    q: Float[Tensor, "S H D"],
    k: Float[Tensor, "S H D"],
    v: Float[Tensor, "S H D"],
    slope: Float[Tensor, " H"],
    state: Float[Tensor, "S H D D"],
) -> tuple[Float[Tensor, "S H D"], Float[Tensor, "S H D D"]]:
    """One token for each of S sequences: the output, and the new fp32 state (`state` is kept)."""
    decay = torch.exp(-slope.to(state.dtype))[:, None, None]
    update = k.to(state.dtype)[..., :, None] * v.to(state.dtype)[..., None, :]
    state = torch.addcmul(update, state, decay)
    out = (q.to(state.dtype)[..., None, :] @ state).squeeze(-2)
    return out.to(q.dtype), state
