"""Small random models that leave nothing at a convenient value."""

from __future__ import annotations

import torch

from openm1.model.config import M1Config
from openm1.model.m1 import M1ForCausalLM


def tiny_config(**overrides) -> M1Config:
    """Post-norm, 6 heads, partial rotary, unequal scales, a last lightning layer."""
    base = {
        "vocab_size": 61,
        "hidden_size": 40,
        "intermediate_size": 24,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "rotary_dim": 4,
        "attn_type_list": (0, 1, 0, 0, 1, 0),
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_theta": 100.0,
        "layernorm_linear_attention_alpha": 1.7,
        "layernorm_linear_attention_beta": 0.8,
        "layernorm_full_attention_alpha": 1.4,
        "layernorm_full_attention_beta": 1.1,
        "layernorm_mlp_alpha": 0.9,
        "layernorm_mlp_beta": 1.3,
        "max_position_embeddings": 512,
    }
    return M1Config(**(base | overrides))


def pre_norm_config(**overrides) -> M1Config:
    """Pre-norm with other groups of query heads, one layer kind more and a tied head."""
    base = {
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "attn_type_list": (1, 0, 0, 1),
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "postnorm": False,
        "tie_word_embeddings": True,
    }
    return tiny_config(**(base | overrides))


def one_expert_config(**overrides) -> M1Config:
    """What a Llama-type checkpoint is here."""
    base = {
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "attn_type_list": (1, 1),
        "rotary_dim": 8,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "postnorm": False,
    }
    scales = {
        f"layernorm_{kind}_{letter}": 1.0
        for kind in ("linear_attention", "full_attention", "mlp")
        for letter in ("alpha", "beta")
    }
    return tiny_config(**(scales | base | overrides))


def random_model(config: M1Config, *, dtype: torch.dtype = torch.float32) -> M1ForCausalLM:
    """Every layer passes signals of about unit size, and no norm's weight is 1."""
    model = M1ForCausalLM(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model.eval()


def random_ids(config: M1Config, *lengths: int) -> list[torch.Tensor]:
    return [torch.randint(config.vocab_size, (length,)) for length in lengths]
