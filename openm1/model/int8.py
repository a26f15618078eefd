"""Experts and linear layers in int8: half the bytes of bf16, at a cost that is measured.

A row of a matrix has one fp32 scale: w = q * scale, q = round(w / scale), scale = max |w| / 127.
Norms, embedding, router and head stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn

from openm1.model.m1 import DecoderLayer, M1ForCausalLM
from openm1.model.moe import MoE


class Int8Matrix(nn.Module):
    """Rows of int8 with a scale each: [N, K], or a stack [E, N, K] which is read by index.

    As a layer it multiplies in the dtype of its input, the scales after the product.
    """

    def __init__(self, weight: Float[Tensor, "*stack N K"]) -> None:
        super().__init__()
        wide = weight.detach().float()
        scales = wide.abs().amax(-1) / 127
        rows = wide / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        # Buffers: there is nothing in them to train, and new weights cannot be copied into them.
        self.register_buffer("rows", rows.round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.rows: Int8[Tensor, "*stack N K"]
        self.scales: Float[Tensor, "*stack N"]
        self._dtype = weight.dtype

    def forward(self, x: Float[Tensor, "T K"]) -> Float[Tensor, "T N"]:
        return F.linear(x, self.rows.to(x.dtype)) * self.scales.to(x.dtype)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Float[Tensor, "N K"]:
        return (self.rows[index] * self.scales[index, :, None]).to(self._dtype)

    def numel(self) -> int:
        return self.rows.numel()

    def full(self) -> Float[Tensor, "*stack N K"]:
        """All of it, as it was but for the rounding."""
        return (self.rows * self.scales[..., None]).to(self._dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Report:
    """What was won and what it costs."""

    bytes_before: int
    bytes_after: int
    kl_nats: float
    """Mean KL(full || int8) of the next token, over the sample."""
    top_1_agreement: float
    """How often both have the same likeliest token."""
    num_tokens: int
    """Length of the sample."""

    def __str__(self) -> str:
        return (
            f"int8 weights: {self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB; "
            f"KL {self.kl_nats:.2e} nats a token, same likeliest token "
            f"{100 * self.top_1_agreement:.1f} % of the time, over {self.num_tokens} tokens"
        )


def is_int8(model: nn.Module) -> bool:
    return any(isinstance(module, Int8Matrix) for module in model.modules())


@torch.no_grad()
def quantize_int8(model: M1ForCausalLM, sample_ids: Int[Tensor, "B T"]) -> Int8Report:
    """Replaces the matrices of `model`, which then can neither be trained nor take new weights.

    `sample_ids` are sequences to compare on, best what the model itself wrote.
    """
    before, bytes_before = _log_probs(model, sample_ids), _num_bytes(model)
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        for name, module in list(layer.self_attn.named_children()):
            if isinstance(module, nn.Linear):
                setattr(layer.self_attn, name, Int8Matrix(module.weight))
        moe = layer.block_sparse_moe
        assert isinstance(moe, MoE)
        for name in ("w1", "w3", "w2"):
            stack = getattr(moe.experts, name)
            delattr(moe.experts, name)
            setattr(moe.experts, name, Int8Matrix(stack))
    after = _log_probs(model, sample_ids)
    return Int8Report(
        bytes_before=bytes_before,
        bytes_after=_num_bytes(model),
        kl_nats=float((before.exp() * (before - after)).sum(-1).mean()),
        top_1_agreement=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
        num_tokens=sample_ids.numel(),
    )


def _log_probs(model: M1ForCausalLM, ids: Tensor) -> Tensor:
    # In fp64: the divergence of nearly equal distributions is a small difference of large sums.
    return model(ids).double().log_softmax(-1)


def _num_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
