"""How many parameters a config has and how much a running sequence remembers; torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from openm1.model.config import M1Config

PAGE_TOKENS = 64
"""Tokens of one page of keys and values."""
STATE_BYTES = 4
"""Lightning states are fp32 whatever the model's dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    total_params: int
    active_params_per_token: int
    """Attention, norms and the K chosen experts; without embedding, head and router."""
    checkpoint_bytes: int
    """Of the published layout in bf16, where the routers are fp32."""
    num_layers: int
    num_softmax_layers: int
    state_bytes_per_sequence: int
    """Of all lightning layers together, whatever the sequence's length."""
    kv_bytes_per_token: int
    """Of all softmax layers together."""


def model_size(config: M1Config, kv_dtype_bytes: int = 2) -> ModelSize:
    """Counts without building the model; keys and values take `kv_dtype_bytes` per number."""
    hidden, attention = config.hidden_size, config.attention_size
    kv = config.num_key_value_heads * config.head_dim
    num_lightning, num_softmax = len(config.lightning_layers), len(config.softmax_layers)
    # qkv_proj, output_gate and out_proj with the norm; q_proj and o_proj with k_proj and v_proj.
    lightning = 5 * attention * hidden + attention
    softmax = 2 * attention * hidden + 2 * kv * hidden
    expert = 3 * config.intermediate_size * hidden
    router = config.num_local_experts * hidden if config.num_local_experts > 1 else 0
    layers = config.num_hidden_layers
    shared = num_lightning * lightning + num_softmax * softmax + layers * 2 * hidden
    shared += hidden  # The final norm.
    tables = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    state = num_lightning * config.num_attention_heads * config.head_dim**2
    routers = layers * router
    total = tables + shared + routers + layers * config.num_local_experts * expert
    return ModelSize(
        total_params=total,
        active_params_per_token=shared + layers * config.num_experts_per_tok * expert,
        checkpoint_bytes=2 * total + 2 * routers,
        num_layers=layers,
        num_softmax_layers=num_softmax,
        state_bytes_per_sequence=state * STATE_BYTES,
        kv_bytes_per_token=num_softmax * 2 * kv * kv_dtype_bytes,
    )
