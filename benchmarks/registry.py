"""The cases: what is measured, and against whom. A peer gets the same weights and work."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from transformers import MiniMaxForCausalLM

from openm1.kernels.packing import PackedLayout
from openm1.model.cache import CacheView, HybridCache
from openm1.model.config import M1Config, post_norm_config
from openm1.model.m1 import M1ForCausalLM

Work = Callable[[], object]
OURS, PEER = "openm1", "transformers MiniMax"


@dataclass(frozen=True, kw_only=True)
class Case:
    """`contestants` maps a name to work that handles `num_tokens` tokens per call."""

    name: str
    num_tokens: int
    contestants: dict[str, Work]


def bench_config() -> M1Config:
    """Hidden 256, 7 lightning layers and 1 softmax, 4 heads of 64, 8 experts, top 2: 11 M.

    transformers rotates whole heads, so rotary_dim is head_dim: both compute the same function.
    """
    return post_norm_config(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=1,
        rotary_dim=64,
        intermediate_size=128,
        num_local_experts=8,
    )


@cache
def models() -> tuple[M1ForCausalLM, MiniMaxForCausalLM]:
    """The same random weights in both."""
    ours = M1ForCausalLM(bench_config())
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder, layout="transformers")
        peer = MiniMaxForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return ours.eval(), peer.eval()


def prefill(num_tokens: int) -> Case:
    ours, peer = models()
    ids = torch.randint(0, ours.config.vocab_size, (1, num_tokens))

    @torch.inference_mode()
    def run_ours() -> object:
        cache_ = HybridCache(ours.config, 1)
        layout = PackedLayout([num_tokens])
        hidden = ours.model(ids[0], layout, CacheView(cache_, [0], [num_tokens])).hidden
        return ours.logits(hidden[-1:])

    @torch.inference_mode()
    def run_peer() -> object:
        return peer(ids, use_cache=True, logits_to_keep=1).logits

    return Case(
        name=f"prefill {num_tokens}",
        num_tokens=num_tokens,
        contestants={OURS: run_ours, PEER: run_peer},
    )


def decode(batch: int, context: int = 1024, new_tokens: int = 16) -> Case:
    ours, peer = models()
    ids = torch.randint(0, ours.config.vocab_size, (batch, context))
    with torch.inference_mode():
        own_cache = HybridCache(ours.config, batch)
        slots = list(range(batch))
        layout = PackedLayout([context] * batch)
        ours.model(ids.flatten(), layout, CacheView(own_cache, slots, layout.lengths))
        past = peer(ids, use_cache=True, logits_to_keep=1).past_key_values
    step_layout = PackedLayout([1] * batch)
    token = ids[:, :1]

    @torch.inference_mode()
    def run_ours() -> object:
        for _ in range(new_tokens):
            view = CacheView(own_cache, slots, step_layout.lengths)
            logits = ours.logits(ours.model(token[:, 0], step_layout, view).hidden)
        return logits

    @torch.inference_mode()
    def run_peer() -> object:
        for _ in range(new_tokens):
            logits = peer(token, past_key_values=past, use_cache=True).logits
        return logits

    return Case(
        name=f"decode batch {batch} at {context}",
        num_tokens=batch * new_tokens,
        contestants={OURS: run_ours, PEER: run_peer},
    )


def train(batch: int = 4, length: int = 512) -> Case:
    ours, peer = models()
    ids = torch.randint(0, ours.config.vocab_size, (batch, length))

    def run(model: torch.nn.Module, logits: Callable[[], torch.Tensor]) -> object:
        loss = torch.nn.functional.cross_entropy(
            logits()[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        loss.backward()
        model.zero_grad()
        return loss

    return Case(
        name=f"forward and backward {batch} x {length}",
        num_tokens=batch * length,
        contestants={
            OURS: lambda: run(ours, lambda: ours(ids)),
            PEER: lambda: run(peer, lambda: peer(ids, use_cache=False).logits),
        },
    )


CASES: dict[str, Callable[[], Case]] = {
    "prefill-1k": lambda: prefill(1024),
    "prefill-4k": lambda: prefill(4096),
    "decode-1": lambda: decode(1),
    "decode-8": lambda: decode(8),
    "train": train,
}
