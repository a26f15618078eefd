"""What a GGUF file of architecture `minimax-01` says, and what llama.cpp makes of it.

Facts read from llama.cpp's `minimax-01` graph, in October 2026. It is M1 with fewer dials:

- One residual scale for all sublayers and no beta. A stream multiplied by a constant is the same
  stream to the norm that reads it, so other alphas and betas go into the output matrices: `fold`.
- One epsilon. M1 has another one (1e-6) for the norm behind lightning attention. Streams are
  multiplied by a power of two that makes the one epsilon of the file right for them and nearly
  right (within a factor of 2) for lightning. llama.cpp's own converter uses 1e-5 for both, which
  shows where lightning's outputs are small (a small random model: 0.1 off in log-probabilities
  instead of 0.004).
- Slopes 2^(-8 (h + 1) / H) for any number of heads H, which is M1's only for powers of two.
- Layers of both kinds: with one of its two caches empty it aborts, and takes the process along.
- Post-norm only. Rotary positions in the half layout, as here: rows keep their order. Its angles
  are fp32, so positions of hundreds of thousands are turned a few hundredths of a radian off.
- Keys and values are cached in fp16 and the products of a bf16 file take bf16 inputs, the head's
  too, unless the program that runs it is told otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openm1.model.config import LIGHTNING, SOFTMAX, M1Config
from openm1.model.lightning_attention import OUTPUT_NORM_EPS

ARCHITECTURE = "minimax-01"
CONFIG_KEY = "openm1.config"
"""Our own key: the config as JSON, for what no key of llama.cpp's says. Others ignore it."""

MAX_EXPERTS, MAX_LAYERS = 512, 512

_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BLOCK_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.qkv_proj.weight": "attn_qkv.weight",
    "self_attn.output_gate.weight": "attn_gate.weight",
    "self_attn.out_proj.weight": "attn_output.weight",
    "self_attn.norm.weight": "attn_norm_2.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.experts.w1": "ffn_gate_exps.weight",
    "block_sparse_moe.experts.w3": "ffn_up_exps.weight",
    "block_sparse_moe.experts.w2": "ffn_down_exps.weight",
}


def gguf_name(parameter: str) -> str:
    """What a parameter of the model is called in the file; experts are stacked in both."""
    if parameter in _OUTER_NAMES:
        return _OUTER_NAMES[parameter]
    _, _, layer, rest = parameter.split(".", 3)
    return f"blk.{layer}.{_BLOCK_NAMES[rest]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Folding:
    """How a config's alphas, betas and epsilons are said with one scale and one epsilon."""

    norm_eps: float
    residual_scale: float
    attention_factors: tuple[float, ...]
    """Per layer, what the attention's output matrix is multiplied by."""
    mlp_factor: float
    embedding_factor: float

    def factor(self, parameter: str) -> float:
        """What a parameter is multiplied by in the file. All are powers of two, which lose no
        bit, where the alphas are equal and the betas are 1."""
        if parameter == "model.embed_tokens.weight":
            return self.embedding_factor
        if parameter.endswith(("self_attn.o_proj.weight", "self_attn.out_proj.weight")):
            return self.attention_factors[int(parameter.split(".")[2])]
        return self.mlp_factor if parameter.endswith("experts.w2") else 1.0


def fold(config: M1Config) -> Folding:
    """Stream j becomes c_j (alpha_j x + beta_j f(x)) with c_j alpha_j the same for all j.

    Where alphas differ so do the c_j, and an epsilon is right only for the largest alpha: an error
    of about eps / 2 relative to 1 in streams of unit size.
    """
    kinds = ["full" if kind == SOFTMAX else "linear" for kind in config.attn_type_list]
    alphas = [getattr(config, f"layernorm_{kind}_attention_alpha") for kind in kinds]
    betas = [getattr(config, f"layernorm_{kind}_attention_beta") for kind in kinds]
    for alpha in (*alphas, config.layernorm_mlp_alpha):
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"a residual's alpha is {alpha!r}; llama.cpp needs it above 0")
    scale = 2.0 ** round(math.log2(OUTPUT_NORM_EPS / config.rms_norm_eps) / 2)
    largest = max(*alphas, config.layernorm_mlp_alpha)

    def factor(alpha: float, beta: float) -> float:
        return scale * (largest / alpha) * beta

    return Folding(
        norm_eps=config.rms_norm_eps * scale**2,
        residual_scale=largest * scale,
        attention_factors=tuple(factor(a, b) for a, b in zip(alphas, betas, strict=True)),
        mlp_factor=factor(config.layernorm_mlp_alpha, config.layernorm_mlp_beta),
        embedding_factor=scale,
    )


def check_expressible(config: M1Config) -> None:
    """Raises ValueError for a config that llama.cpp cannot run, or would run as another model."""

    def need(good: bool, what: str, allowed: str) -> None:
        if not good:
            raise ValueError(f"{what} cannot be written as GGUF: llama.cpp {allowed}")

    heads = config.num_attention_heads
    need(config.postnorm, "postnorm=False", f"computes {ARCHITECTURE} with post-norm only")
    need(
        bool(config.lightning_layers and config.softmax_layers),
        f"attn_type_list={config.attn_type_list}",
        "aborts on an empty cache, so it needs layers of both kinds",
    )
    need(
        heads & (heads - 1) == 0,
        f"num_attention_heads={heads}",
        "takes other decays than M1 unless the number of heads is a power of two",
    )
    need(
        config.num_local_experts <= MAX_EXPERTS,
        f"num_local_experts={config.num_local_experts}",
        f"has at most {MAX_EXPERTS} experts",
    )
    need(
        config.num_hidden_layers <= MAX_LAYERS,
        f"num_hidden_layers={config.num_hidden_layers}",
        f"has at most {MAX_LAYERS} layers",
    )


def settings(config: M1Config, folding: Folding) -> dict[str, int | float | list[int]]:
    """The file's keys, without their prefix "minimax-01."."""
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "residual_scale": float(folding.residual_scale),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(folding.norm_eps),
        "attention.recurrent_layers": [int(kind != SOFTMAX) for kind in config.attn_type_list],
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rope_theta),
    }


# What other programs write besides, and the one value that changes nothing.
_OFF = {"rope.scaling.type": "none", "expert_shared_count": 0, "expert_weights_scale": 1.0}
_INTERVAL_KEY, _DEFAULT_INTERVAL = "full_attention_interval", 8
_ALPHAS_AND_BETAS = tuple(
    f"layernorm_{sublayer}_{letter}"
    for letter in ("alpha", "beta")
    for sublayer in ("linear_attention", "full_attention", "mlp")
)


def read_config(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str
) -> tuple[M1Config, Folding]:
    """From all keys of a file and the shapes of its tensors; `source` names it in errors.

    Raises ValueError for a key that is missing, unknown, or at odds with the others.
    """
    prefix = f"{ARCHITECTURE}."
    present = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
    if CONFIG_KEY in fields:
        config = M1Config.from_dict(json.loads(fields[CONFIG_KEY]))
        folding = fold(config)
    else:
        config = _foreign_config(present, fields, shapes, source)
        folding = Folding(
            norm_eps=config.rms_norm_eps,
            residual_scale=config.layernorm_mlp_alpha,
            attention_factors=(1.0,) * config.num_hidden_layers,
            mlp_factor=1.0,
            embedding_factor=1.0,
        )
    wanted = {**_OFF, **settings(config, folding)}
    for key, value in present.items():
        if key == _INTERVAL_KEY:
            continue
        if key not in wanted:
            raise ValueError(f"{source} has the unknown setting {prefix}{key} (value {value!r})")
        # Numbers with a fraction are rounded to fp32 in the file.
        is_float = isinstance(wanted[key], float)
        if not (
            math.isclose(value, wanted[key], rel_tol=1e-6) if is_float else value == wanted[key]
        ):
            raise ValueError(f"{source} has {prefix}{key} {value!r}; allowed is {wanted[key]!r}")
    return config, folding


def _foreign_config(
    present: Mapping[str, Any],
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
) -> M1Config:
    """Of a file that another program wrote: one alpha for all, every beta 1, nothing folded."""
    try:
        num_layers = present["block_count"]
        interval = present.get(_INTERVAL_KEY, _DEFAULT_INTERVAL)
        by_interval = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
        recurrent = present.get("attention.recurrent_layers", by_interval)
        hidden, heads = present["embedding_length"], present["attention.head_count"]
        head_dim = present.get("attention.key_length", hidden // heads)
        values: dict[str, Any] = {n: 1.0 for n in _ALPHAS_AND_BETAS if n.endswith("beta")}
        values |= {
            name: present["residual_scale"] for name in _ALPHAS_AND_BETAS if name not in values
        }
        return M1Config(
            vocab_size=shapes["token_embd.weight"][0],
            hidden_size=hidden,
            intermediate_size=present["feed_forward_length"],
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=present.get("attention.head_count_kv", heads),
            head_dim=head_dim,
            rotary_dim=present.get("rope.dimension_count", head_dim),
            attn_type_list=tuple(LIGHTNING if flag else SOFTMAX for flag in recurrent),
            num_local_experts=present["expert_count"],
            num_experts_per_tok=present["expert_used_count"],
            rope_theta=present.get("rope.freq_base", 10_000.0),
            rms_norm_eps=present["attention.layer_norm_rms_epsilon"],
            max_position_embeddings=present["context_length"],
            tie_word_embeddings="output.weight" not in shapes,
            bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
            **values,
        )
    except KeyError as error:
        raise ValueError(f"{source} lacks {ARCHITECTURE}.{error.args[0]}") from None
