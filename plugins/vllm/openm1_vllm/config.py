"""The published config.json as transformers and vLLM want to see it, and as OpenM1 does."""

from __future__ import annotations

from dataclasses import fields

from transformers import PreTrainedConfig

from openm1.model.config import M1Config


class MiniMaxM1HFConfig(PreTrainedConfig):
    """Keeps every published key as an attribute."""

    model_type = "minimax_m1"


class MiniMaxText01HFConfig(PreTrainedConfig):
    """The same keys under the older name."""

    model_type = "minimax_text_01"


def m1_config(hf_config: PreTrainedConfig) -> M1Config:
    """OpenM1's own config, all values checked.

    Raises ValueError, naming the key, where a value is not one OpenM1 or this plugin implements.
    """
    names = [f.name for f in fields(M1Config)]
    # What OpenM1 reads only to refuse other values than its own.
    names += ["hidden_act", "shared_intermediate_size", "sliding_window"]
    raw = {name: getattr(hf_config, name, None) for name in names}
    raw |= {"rope_theta": _rope_theta(hf_config), "model_type": "minimax_m1"}
    raw = {name: value for name, value in raw.items() if value is not None}
    config = M1Config.from_dict(raw)
    if config.num_local_experts < 2 or config.tie_word_embeddings:
        raise ValueError(
            f"num_local_experts is {config.num_local_experts} and tie_word_embeddings "
            f"{config.tie_word_embeddings}; the plugin serves mixtures of experts (at least 2) "
            "with a head of their own"
        )
    return config


def _rope_theta(hf_config: PreTrainedConfig) -> float:
    """transformers moves the published key into `rope_parameters`."""
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type is {rope['rope_type']!r}; allowed is 'default'")
    return float(rope.get("rope_theta") or hf_config.rope_theta)
