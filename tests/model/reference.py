"""The whole model a second time, in fp64 numpy, token by token and head by head.

Written from the formulas, slow on purpose, sharing nothing with the package: it reads a config.json
and the tensors of a checkpoint in the published layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[np.float64]


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """config.json and all tensors of a folder, in fp64."""
    tensors: dict[str, Array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: x.astype(np.float64) for name, x in load_file(file).items()}
    return json.loads((folder / "config.json").read_text()), tensors


def reference_logits(
    config: Mapping[str, Any], tensors: Mapping[str, Array], ids: list[int]
) -> Array:
    """[T, V]."""
    embedding = tensors["model.embed_tokens.weight"]
    stream = np.stack([embedding[i] for i in ids])
    for layer, kind in enumerate(config["attn_type_list"]):
        prefix = f"model.layers.{layer}."
        weights = {
            name.removeprefix(prefix).removesuffix(".weight"): x
            for name, x in tensors.items()
            if name.startswith(prefix)
        }
        attend = softmax_layer if kind == 1 else lightning_layer
        scale = "layernorm_full_attention" if kind == 1 else "layernorm_linear_attention"

        x = rms(stream, weights["input_layernorm"], config["rms_norm_eps"])
        residual = x if config["postnorm"] else stream
        stream = config[f"{scale}_alpha"] * residual + config[f"{scale}_beta"] * attend(
            config, weights, x, layer
        )
        x = rms(stream, weights["post_attention_layernorm"], config["rms_norm_eps"])
        residual = x if config["postnorm"] else stream
        mixed = np.stack([expert_mixture(config, weights, row) for row in x])
        stream = config["layernorm_mlp_alpha"] * residual + config["layernorm_mlp_beta"] * mixed
    head = embedding if config["tie_word_embeddings"] else tensors["lm_head.weight"]
    return rms(stream, tensors["model.norm.weight"], config["rms_norm_eps"]) @ head.T


def rms(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def alibi_slopes(num_heads: int) -> list[float]:
    if math.log2(num_heads).is_integer():
        start = 2.0 ** -(2.0 ** -(math.log2(num_heads) - 3))
        return [start ** (h + 1) for h in range(num_heads)]
    below = 2 ** math.floor(math.log2(num_heads))
    return alibi_slopes(below) + alibi_slopes(2 * below)[0::2][: num_heads - below]


def lightning_layer(
    config: Mapping[str, Any], weights: Mapping[str, Array], x: Array, layer: int
) -> Array:
    heads, dim = config["num_attention_heads"], config["head_dim"]
    packed = silu(x @ weights["self_attn.qkv_proj"].T)
    depth = 1 - layer / (config["num_hidden_layers"] - 1) + 1e-5
    out = np.zeros((len(x), heads * dim))
    for head, slope in enumerate(alibi_slopes(heads)):
        block = packed[:, 3 * dim * head : 3 * dim * (head + 1)]
        q, k, v = block[:, :dim], block[:, dim : 2 * dim], block[:, 2 * dim :]
        decay = math.exp(-slope * depth)
        state = np.zeros((dim, dim))
        for t in range(len(x)):
            state = decay * state + np.outer(k[t], v[t])
            out[t, head * dim : (head + 1) * dim] = q[t] @ state
    gate = sigmoid(x @ weights["self_attn.output_gate"].T)
    return (gate * rms(out, weights["self_attn.norm"], 1e-6)) @ weights["self_attn.out_proj"].T


def rotate(vector: Array, position: int, config: Mapping[str, Any]) -> Array:
    """Pairs (i, i + R) of the first 2 R numbers as complex numbers, turned by their angles."""
    half = config["rotary_dim"] // 2
    turned = vector[:half] + 1j * vector[half : 2 * half]
    for i in range(half):
        turned[i] *= np.exp(1j * position * config["rope_theta"] ** (-i / half))
    return np.concatenate([turned.real, turned.imag, vector[2 * half :]])


def softmax_layer(
    config: Mapping[str, Any], weights: Mapping[str, Array], x: Array, layer: int
) -> Array:
    heads, groups, dim = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
    )
    q, k, v = (x @ weights[f"self_attn.{name}_proj"].T for name in "qkv")
    out = np.zeros((len(x), heads * dim))
    for head in range(heads):
        group = head // (heads // groups)
        mine = slice(head * dim, (head + 1) * dim)
        theirs = slice(group * dim, (group + 1) * dim)
        queries = np.stack([rotate(row, t, config) for t, row in enumerate(q[:, mine])])
        keys = np.stack([rotate(row, t, config) for t, row in enumerate(k[:, theirs])])
        for t in range(len(x)):
            scores = keys[: t + 1] @ queries[t] / math.sqrt(dim)
            shares = np.exp(scores - scores.max())
            out[t, mine] = shares / shares.sum() @ v[: t + 1, theirs]
    return out @ weights["self_attn.o_proj"].T


def expert_mixture(config: Mapping[str, Any], weights: Mapping[str, Array], x: Array) -> Array:
    """One token through its top experts."""
    prefix = "block_sparse_moe."
    shares = np.ones(1)
    if config["num_local_experts"] > 1:
        scores = weights[f"{prefix}gate"] @ x
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
    chosen = np.argsort(-shares)[: config["num_experts_per_tok"]]
    out = np.zeros_like(x)
    for e in chosen:
        w1, w2, w3 = (weights[f"{prefix}experts.{e}.w{n}"] for n in (1, 2, 3))
        out += shares[e] / shares[chosen].sum() * (w2 @ (silu(w1 @ x) * (w3 @ x)))
    return out
