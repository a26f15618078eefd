"""The softmax layer: grouped-query attention with partial rotary."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from openm1.kernels.packing import PackedLayout
from openm1.model.cache import CacheView
from openm1.model.config import M1Config
from openm1.model.layers import Linear
from openm1.model.rope import apply_rope


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
        elif cache.is_decode:
            cache.append_one(self.layer, k, v)
            out = attend_decode(q, *cache.padded_context(self.layer))
        else:
            out = self._prefill(q, k, v, layout, cache)
        return self.o_proj(out.flatten(1))

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, cache: CacheView
    ) -> Tensor:
        for row, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
            cache.append(self.layer, row, k[start : start + length], v[start : start + length])
        if max(cache.past) == 0:
            return attend_packed(q, k, v, layout)
        outputs = []
        for row, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
            keys, values = cache.context(self.layer, row)
            outputs.append(attend_continued(q[start : start + length], keys, values))
        return torch.cat(outputs)


def attend_packed(
    q: Float[Tensor, "T H D"],
    k: Float[Tensor, "T G D"],
    v: Float[Tensor, "T G D"],
    layout: PackedLayout,
) -> Float[Tensor, "T H D"]:
    """Each packed sequence attends to itself, causally. Padding stays behind every real query."""
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


def attend_continued(
    q: Float[Tensor, "t H D"], keys: Float[Tensor, "L G D"], values: Float[Tensor, "L G D"]
) -> Float[Tensor, "t H D"]:
    """The last t positions of a sequence of L attend to all before them and to themselves."""
    new, total = len(q), len(keys)
    seen = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    repeats = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(repeats, 1).transpose(0, 1) for x in (keys, values))
    out = F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=seen)
    return out.transpose(0, 1)


def attend_decode(
    q: Float[Tensor, "S H D"],
    keys: Float[Tensor, "S L G D"],
    values: Float[Tensor, "S L G D"],
    seen: Tensor,
) -> Float[Tensor, "S H D"]:
    """One query per sequence over its own keys; `seen` [S, L] marks the real ones."""
    groups = keys.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (groups, -1))  # [S, G, H/G, D]
    scores = torch.einsum("sgrd,slgd->sgrl", grouped, keys).to(work) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~seen[:, None, None, :], -torch.inf)
    weights = scores.softmax(-1).to(q.dtype)
    return torch.einsum("sgrl,slgd->sgrd", weights, values).flatten(1, 2)
