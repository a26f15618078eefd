"""The lightning layer: decaying linear attention with an output gate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from openm1.kernels.cpu.training import lightning as training
from openm1.kernels.lightning.op import lightning_attention, lightning_decode
from openm1.kernels.packing import PackedLayout
from openm1.model.cache import CacheView
from openm1.model.config import M1Config
from openm1.model.layers import Linear, RMSNorm

# The norm over all heads' outputs has its own epsilon in the published code.
OUTPUT_NORM_EPS = 1e-6


def head_slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes s_h = 2^(-8 (h+1) / H); for H no power of two, interleaved from two powers.

    With P the largest power of two below H: slopes(P), then every other one of slopes(2P).
    """

    def of_power(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (h + 1) / count) for h in range(count)]

    power = 2 ** math.floor(math.log2(num_heads))
    return of_power(power) + of_power(2 * power)[0::2][: num_heads - power]


def layer_slopes(config: M1Config, layer: int) -> Float[Tensor, " H"]:
    """-ln of the decay of each head of a layer, fp32: s_h (1 - l / (L - 1) + 1e-5)."""
    depth = layer / (config.num_hidden_layers - 1) if config.num_hidden_layers > 1 else 0.0
    slopes = torch.tensor(head_slopes(config.num_attention_heads), dtype=torch.float64)
    return (slopes * (1 - depth + 1e-5)).float()


class LightningAttention(nn.Module):
    """out = W_o (sigmoid(W_g x) * RMS(o)); q, k, v = silu(W_qkv x), packed per head as [q | k | v].

    No rotary, no 1/sqrt(d), no normaliser.
    """

    def __init__(self, config: M1Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        size = config.attention_size
        self.qkv_proj = Linear(config.hidden_size, 3 * size)
        self.output_gate = Linear(config.hidden_size, size)
        self.out_proj = Linear(size, config.hidden_size)
        self.norm = RMSNorm(size, OUTPUT_NORM_EPS)
        # Made on the CPU whatever the default device is, and kept out of checkpoints and casts.
        with torch.device("cpu"):
            self._slopes = layer_slopes(config, layer)

    def forward(
        self, x: Float[Tensor, "T C"], layout: PackedLayout, cache: CacheView | None
    ) -> Float[Tensor, "T C"]:
        projected = self.qkv_proj(x)
        if cache is None and training.fits(projected, self.config.head_dim):
            out = training.lightning_silu(projected, self._slopes, layout)
            return self.out_proj(self.norm.gated(out, self.output_gate(x)))
        heads = self.config.num_attention_heads
        qkv = F.silu(projected).unflatten(-1, (heads, 3 * self.config.head_dim))
        q, k, v = qkv.chunk(3, -1)  # [T, H, D]
        slopes = self._slopes.to(x.device)
        if cache is not None and cache.is_decode:
            out, state = lightning_decode(q, k, v, slopes, cache.state(self.layer))
        else:
            before = cache.state(self.layer) if cache is not None else None
            out, state = lightning_attention(
                q,
                k,
                v,
                slopes,
                layout=layout,
                initial_state=before,
                need_state=cache is not None,
            )
        if cache is not None:
            assert state is not None
            cache.set_state(self.layer, state)
        return self.out_proj(self.norm.gated(out.flatten(1), self.output_gate(x)))
