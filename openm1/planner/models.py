"""Where shapes come from: presets by name, and published config.json files of three families."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from openm1.model.config import MODEL_TYPES, PRESETS, SOFTMAX, M1Config
from openm1.planner.attention import Attention, GroupedQuery, Latent, Lightning
from openm1.planner.shape import FeedForward, Layer, ModelShape

# Shapes from the models' public config.json files.
DEEPSEEK_R1: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18_432,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
}
QWEN3_235B_A22B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 12_288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def from_m1(config: M1Config, name: str) -> ModelShape:
    """The shape of one of our own models."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    lightning = Lightning(hidden_size=hidden, num_heads=heads, head_dim=config.head_dim)
    softmax = GroupedQuery(
        hidden_size=hidden,
        num_heads=heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )
    feed_forward = FeedForward(
        width=config.intermediate_size,
        num_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
    )
    return ModelShape(
        name=name,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_word_embeddings,
        layers=tuple(
            Layer(attention=softmax if kind == SOFTMAX else lightning, feed_forward=feed_forward)
            for kind in config.attn_type_list
        ),
    )


def _from_deepseek(raw: Mapping[str, Any], name: str) -> ModelShape:
    attention = Latent(
        hidden_size=raw["hidden_size"],
        num_heads=raw["num_attention_heads"],
        q_lora_rank=raw["q_lora_rank"] or 0,
        kv_lora_rank=raw["kv_lora_rank"],
        qk_nope_head_dim=raw["qk_nope_head_dim"],
        qk_rope_head_dim=raw["qk_rope_head_dim"],
        v_head_dim=raw["v_head_dim"],
    )
    sparse = FeedForward(
        width=raw["moe_intermediate_size"],
        num_experts=raw["n_routed_experts"],
        num_experts_per_tok=raw["num_experts_per_tok"],
        shared_width=raw["n_shared_experts"] * raw["moe_intermediate_size"],
        has_router_bias=True,
    )
    dense = FeedForward(width=raw["intermediate_size"])

    def is_sparse(layer: int) -> bool:
        return layer >= raw["first_k_dense_replace"] and layer % raw.get("moe_layer_freq", 1) == 0

    return _model(raw, name, attention, sparse, dense, is_sparse)


def _from_qwen3(raw: Mapping[str, Any], name: str) -> ModelShape:
    heads = raw["num_attention_heads"]
    attention = GroupedQuery(
        hidden_size=raw["hidden_size"],
        num_heads=heads,
        num_key_value_heads=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        has_qk_norm=True,
    )
    sparse = FeedForward(
        width=raw["moe_intermediate_size"],
        num_experts=raw["num_experts"],
        num_experts_per_tok=raw["num_experts_per_tok"],
    )
    dense = FeedForward(width=raw["intermediate_size"])

    def is_sparse(layer: int) -> bool:
        every = raw.get("decoder_sparse_step", 1)
        return layer not in raw.get("mlp_only_layers", ()) and (layer + 1) % every == 0

    return _model(raw, name, attention, sparse, dense, is_sparse)


def _model(
    raw: Mapping[str, Any],
    name: str,
    attention: Attention,
    sparse: FeedForward,
    dense: FeedForward,
    is_sparse: Callable[[int], bool],
) -> ModelShape:
    return ModelShape(
        name=name,
        hidden_size=raw["hidden_size"],
        vocab_size=raw["vocab_size"],
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        layers=tuple(
            Layer(attention=attention, feed_forward=sparse if is_sparse(layer) else dense)
            for layer in range(raw["num_hidden_layers"])
        ),
    )


_FAMILIES = {"deepseek_v3": _from_deepseek, "qwen3_moe": _from_qwen3}

NAMED: dict[str, M1Config | dict[str, Any]] = {
    "minimax-m1": PRESETS["m1-80k"],
    **PRESETS,
    "deepseek-r1": DEEPSEEK_R1,
    "qwen3-235b-a22b": QWEN3_235B_A22B,
}


def read_shape(model: str) -> ModelShape:
    """A preset's name, a folder with a config.json, or that file.

    Layers for predicting several tokens at once (DeepSeek's MTP) are not part of a shape. Raises
    ValueError for a family that is not known or a key that is missing or senseless.
    """
    if model in NAMED:
        config = NAMED[model]
        return from_m1(config, model) if isinstance(config, M1Config) else from_json(config, model)
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"model is {model!r}; allowed are {', '.join(NAMED)}, a folder with a config.json, "
            "or such a file"
        )
    try:
        raw = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds {type(raw).__name__}; allowed is a config's JSON object")
    return from_json(raw, file.resolve().parent.name)


def from_json(raw: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a config.json describes; `model_type` says which family it is."""
    family = raw.get("model_type", "minimax_m1")
    if family in MODEL_TYPES:
        return from_m1(M1Config.from_dict(raw), name)
    if family not in _FAMILIES:
        allowed = ", ".join((*MODEL_TYPES, *_FAMILIES))
        raise ValueError(f"model_type is {family!r}; allowed are {allowed}")
    _check_sizes(raw)
    try:
        return _FAMILIES[family](raw, name)
    except KeyError as error:
        raise ValueError(f"the config of {name} lacks {error}") from error


_SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "moe_intermediate_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 1,
    "kv_lora_rank": 1,
    "qk_nope_head_dim": 1,
    "qk_rope_head_dim": 1,
    "v_head_dim": 1,
    "num_experts": 1,
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
}


def _check_sizes(raw: Mapping[str, Any]) -> None:
    for key, least in _SIZES.items():
        value = raw.get(key, least)
        if type(value) is not int or value < least:
            raise ValueError(f"{key} is {value!r}; allowed is an integer of at least {least}")
    num_experts = raw.get("num_experts", raw.get("n_routed_experts"))
    chosen = raw.get("num_experts_per_tok", 1)
    if num_experts is not None and chosen > num_experts:
        raise ValueError(f"num_experts_per_tok is {chosen}; allowed are 1 to {num_experts}")


def has_latent(shape: ModelShape) -> bool:
    return any(isinstance(layer.attention, Latent) for layer in shape.layers)


def with_absorbed_latent(shape: ModelShape) -> ModelShape:
    """The same model with its latents kept instead of keys and values."""
    if not has_latent(shape):
        raise ValueError(f"mla is 'absorbed', but {shape.name} has no latent attention")
    layers = tuple(
        replace(layer, attention=replace(layer.attention, absorbed=True))
        if isinstance(layer.attention, Latent)
        else layer
        for layer in shape.layers
    )
    return replace(shape, layers=layers)
