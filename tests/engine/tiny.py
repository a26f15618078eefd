"""Small models for the engine: a random hybrid one, and one that says what it is told to."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from openm1.engine.engine import Engine, EngineConfig, SpecialTokens
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
    engine: Engine,
    prompts: list[list[int]],
    params: list[SamplingParams],
    *,
    session: str | None = None,
) -> list[Completion]:
    """All at once, checking the engine's books after each step."""
    requests = [
        engine.submit(prompt, each, session=session)
        for prompt, each in zip(prompts, params, strict=True)
    ]
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    return [engine.completion(request) for request in requests]


def engine_for(model: M1ForCausalLM, **config: int) -> Engine:
    return Engine(model, TOKENS, EngineConfig(**config))


class _Body(nn.Module):
    """Hidden states that count the tokens written after the last prompt."""

    def __init__(self) -> None:
        super().__init__()
        self._prompt_tokens = 0

    def forward(self, input_ids: Tensor, layout: PackedLayout, cache: CacheView) -> SimpleNamespace:
        if not cache.is_decode:
            self._prompt_tokens = max(cache.totals)
        written = torch.tensor(cache.totals) - self._prompt_tokens
        cache.commit()
        hidden = torch.repeat_interleave(written, torch.tensor(layout.lengths))
        return SimpleNamespace(hidden=hidden[:, None].float())


class ScriptedModel(M1ForCausalLM):
    """Writes `reply` whatever the prompt, then `eos` for ever; one sequence at a time."""

    def __init__(self, config: M1Config, reply: list[int], eos: int) -> None:
        super().__init__(config)
        self.model.forward = _Body().forward
        self.reply, self.eos = reply, eos

    def logits(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(len(hidden), self.config.vocab_size)
        for row, written in enumerate(hidden[:, 0].int().tolist()):
            token = self.reply[written] if written < len(self.reply) else self.eos
            logits[row, token] = 30.0
        return logits
