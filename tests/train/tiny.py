"""Models of a few thousand parameters, and random examples for them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch

from openm1.data.packing import Example
from openm1.model.config import post_norm_config
from openm1.model.m1 import M1ForCausalLM

VOCAB = 23


def tiny_model(*, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides) -> M1ForCausalLM:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "period": 2,
        "max_position_embeddings": 256,
    }
    return M1ForCausalLM(post_norm_config(**(shape | overrides)), dtype=dtype, seed=seed)


def random_examples(rng: Random, *lengths: int) -> list[Example]:
    return [
        Example(
            token_ids=[rng.randrange(VOCAB) for _ in range(length)],
            # The last token is always learned, so that no example is without a lesson.
            loss_mask=[*(rng.random() < 0.6 for _ in range(length - 1)), True],
        )
        for length in lengths
    ]


def counting_source(step: int) -> Sequence[Example]:
    """Sequences that count up, from a place that depends on the step alone."""
    rng = Random(step)
    starts = [rng.randrange(VOCAB) for _ in range(4)]
    return [
        Example(token_ids=[(start + i) % VOCAB for i in range(9)], loss_mask=[True] * 9)
        for start in starts
    ]


def gradients(model: M1ForCausalLM) -> torch.Tensor:
    """All of them as one vector."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.flatten() for part in parts])


def weights(model: M1ForCausalLM) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
