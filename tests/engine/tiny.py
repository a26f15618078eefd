"""Small models for the engine: a random hybrid one, and one that says what it is told to."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from openm1.engine.config import EngineConfig, SpecialTokens
from openm1.engine.engine import Engine
from openm1.kernels.packing import PackedLayout
from openm1.model.cache import CacheView
from openm1.model.config import M1Config
from openm1.model.m1 import M1ForCausalLM
from openm1.types import Completion, SamplingParams

VOCAB = 89
"""Of the tokenizer; the model has rows above it."""
EOS, OPEN, CLOSE = 5, 7, 8
TOKENS = SpecialTokens(
    vocab_size=VOCAB,
    eos_token_ids=frozenset({EOS}),
    think_open=(OPEN,),
    think_close=(CLOSE,),
)


# Two paths through an fp32 model. In fp64, which most tests use, no draw can be a near miss.
FP32_ERROR = 1e-5
FP64_ERROR = 1e-11
LENGTHS = (1, 2, 3, 5, 7, 11, 16, 23, 31, 47, 63, 64, 65, 80, 100, 128, 129, 150, 177, 200)


def hybrid_config(**overrides) -> M1Config:
    """Lightning first and last, grouped queries, partial rotary, experts, unequal scales."""
    base = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "rotary_dim": 4,
        "attn_type_list": (0, 1, 1, 0),
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_theta": 100.0,
        "layernorm_linear_attention_alpha": 1.7,
        "layernorm_full_attention_alpha": 1.4,
        "layernorm_mlp_beta": 1.3,
        # Large enough that what a random model says depends on all it has read.
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
    }
    return M1Config(**(base | overrides))


def hybrid_model(dtype: torch.dtype = torch.float32, **overrides) -> M1ForCausalLM:
    return M1ForCausalLM(hybrid_config(**overrides), dtype=dtype, seed=1).eval()


def complete(
    engine: Engine, prompts: list[list[int]], params: list[SamplingParams]
) -> list[Completion]:
    """All at once, checking the engine's books after each step."""
    requests = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    return [engine.completion(request) for request in requests]


def engine_for(model: M1ForCausalLM, *, tokens: SpecialTokens = TOKENS, **config) -> Engine:
    """Small pages, so that short sequences have several; room for whatever a test runs."""
    base = {"kernels": "torch", "page_tokens": 8, "memory_budget_bytes": 2**23}
    return Engine(model, tokens, EngineConfig(**(base | config)))


def random_prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    # Nothing special in a prompt, and ids above the tokenizer's are allowed to be read.
    draw = random.Random(seed)
    return [[draw.randrange(CLOSE + 1, 96) for _ in range(length)] for length in lengths]


def mixed_params(count: int) -> list[SamplingParams]:
    """Greedy and sampled in turn, each with its own seed, length and temperature."""
    kinds = (
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.5, "top_p": 0.8},
    )
    return [
        SamplingParams(max_tokens=4 + i % 9, seed=100 + i, **kinds[i % len(kinds)])
        for i in range(count)
    ]


def alone(
    model: M1ForCausalLM, prompts: list[list[int]], params: list[SamplingParams]
) -> list[Completion]:
    """Each in an engine of its own."""
    return [
        complete(engine_for(model), [prompt], [each])[0]
        for prompt, each in zip(prompts, params, strict=True)
    ]


def assert_same(ours: list[Completion], expected: list[Completion], error: float) -> None:
    for mine, other in zip(ours, expected, strict=True):
        assert mine.token_ids == other.token_ids
        assert mine.finish_reason == other.finish_reason
        assert mine.logprobs == pytest.approx(other.logprobs, abs=error, rel=0)


def grown(prompt: list[int], completion: Completion, *extra: int) -> list[int]:
    return [*prompt, *completion.token_ids, *extra]


@torch.inference_mode()
def poison_unused(engine: Engine) -> None:
    """Fills every page and slot that nobody refers to with NaN."""
    cache, pools = engine._scheduler.cache, engine._runner.pools
    pages = sorted(set(range(pools.num_pages)) - cache._pages.used())
    slots = sorted(set(range(pools.num_slots)) - cache._slots.used())
    pools.keys[:, pages] = torch.nan
    pools.values[:, pages] = torch.nan
    pools.states[slots] = torch.nan


class _Body(nn.Module):
    """Hidden states that say how many tokens the sequence has."""

    def forward(
        self, input_ids: Tensor, layout: PackedLayout, cache: CacheView, seen: None = None
    ) -> SimpleNamespace:
        (total,) = cache.totals
        return SimpleNamespace(hidden=torch.full((layout.num_tokens, 1), float(total)))


class ScriptedModel(M1ForCausalLM):
    """Writes `reply` whatever the prompt, then `eos` for ever; one sequence at a time.

    Logits are asked for after the last token of a prompt and then after each one more, so what does
    not continue the sequence before it begins a reply.
    """

    def __init__(self, config: M1Config, reply: list[int], eos: int) -> None:
        super().__init__(config)
        self.model.forward = _Body().forward
        self.reply, self.eos = reply, eos
        self._num_prompt = self._total = -1

    def logits(self, hidden: Tensor) -> Tensor:
        total = int(hidden[0, 0])
        if total != self._total + 1:
            self._num_prompt = total
        self._total, written = total, total - self._num_prompt
        logits = torch.zeros(1, self.config.vocab_size)
        logits[0, self.reply[written] if written < len(self.reply) else self.eos] = 30.0
        return logits
