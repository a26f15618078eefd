"""A training step against transformers'."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from benchmarks.contestant import OURS
from openm1.model.m1 import M1ForCausalLM

if TYPE_CHECKING:
    from benchmarks.registry import Race


def train_race(threads: int, batch: int = 4, length: int = 512) -> Race:
    from transformers import MiniMaxForCausalLM

    from benchmarks.registry import Race, nano_shape

    ours = M1ForCausalLM(nano_shape())
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder, layout="transformers")
        peer = MiniMaxForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, ours.config.vocab_size, (batch, length))

    def run(model: torch.nn.Module, logits: Callable[[], torch.Tensor]) -> float:
        began = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(
            logits()[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        loss.backward()
        model.zero_grad()
        return time.perf_counter() - began

    return Race(
        num_tokens=batch * length,
        contestants={
            OURS: lambda: run(ours, lambda: ours(ids)),
            "transformers MiniMax": lambda: run(peer, lambda: peer(ids, use_cache=False).logits),
        },
        goals={"transformers MiniMax": 1.0},
    )
