"""The softmax layer: grouped-query attention with partial rotary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from openm1.kernels.cpu.training import attention as training
from openm1.kernels.packing import PackedLayout
from openm1.kernels.paged_attention import paged_decode_attention, paged_prefill_attention
from openm1.model.cache import CacheView
from openm1.model.config import M1Config
from openm1.model.layers import Linear
from openm1.model.rope import apply_rope

# Short new sequences are attended to side by side by torch's own operator: what it is slower by is
# less than what a call for each of them takes.
PACKED_MAX_TOKENS = 512


class SoftmaxAttention(nn.Module):
    """Causal attention, scale 1/sqrt(D); query head h reads key/value head h // (H / G)."""

    def __init__(self, config: M1Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.attention_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(config.attention_size, config.hidden_size)

    def forward(
        self,
        x: Float[Tensor, "T C"],
        layout: PackedLayout,
        rope: tuple[Tensor, Tensor],
        cache: CacheView | None,
    ) -> Float[Tensor, "T C"]:
        dim = self.config.head_dim
        q = apply_rope(self.q_proj(x).unflatten(-1, (-1, dim)), *rope)  # [T, H, D]
        k = apply_rope(self.k_proj(x).unflatten(-1, (-1, dim)), *rope)  # [T, G, D]
        v = self.v_proj(x).unflatten(-1, (-1, dim))
        if cache is None:
            out = attend_packed(q, k, v, layout)
        else:
            cache.append(self.layer, k, v)
            if cache.is_decode:
                pages = cache.pages(self.layer)
                out = paged_decode_attention(q, *pages, *cache.padded_page_tables())
            elif max(cache.past) == 0 and max(layout.lengths) <= PACKED_MAX_TOKENS:
                out = attend_packed(q, k, v, layout)
            else:
                out = self._attend_pages(q, layout, cache)
        return self.o_proj(out.flatten(1))

    def _attend_pages(self, q: Tensor, layout: PackedLayout, cache: CacheView) -> Tensor:
        """Each sequence on its own, over its past and itself."""
        outputs = []
        for row, rows in enumerate(q.split(layout.lengths)):
            table, past = cache.page_table(row), cache.past[row]
            outputs.append(paged_prefill_attention(rows, *cache.pages(self.layer), table, past))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_packed(
    q: Float[Tensor, "T H D"],
    k: Float[Tensor, "T G D"],
    v: Float[Tensor, "T G D"],
    layout: PackedLayout,
) -> Float[Tensor, "T H D"]:
    """Each packed sequence attends to itself, causally. Padding stays behind every real query."""
    if training.fits(q, k, v, layout):
        return training.causal_attention(q, k, v, layout)
    if layout.num_sequences == 1:
        return _sdpa(q[None], k[None], v[None])[0]
    q, k, v = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (q, k, v))
    outputs = []
    for gather, scatter in layout.length_buckets:
        flat = gather.flatten()
        rows = (x.index_select(0, flat).unflatten(0, gather.shape) for x in (q, k, v))
        outputs.append(_sdpa(*rows).flatten(0, 1).index_select(0, scatter))
    return torch.cat(outputs).index_select(0, layout.bucket_order)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention [n, L, H, D] x [n, L, G, D] -> [n, L, H, D]."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, 2).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)
