"""The model's shape: published field names, torch-free, every value checked.

Source: config.json of MiniMax-M1-40k and -80k; transformers' `minimax` and `llama` layouts are read
into the same class. A key or value this code does not implement is an error, never ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

LIGHTNING, SOFTMAX = 0, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class M1Config:
    """A hybrid of lightning and softmax attention layers with mixtures of experts.

    Raises ValueError, naming the field, its value and what is allowed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width F of one expert."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """Key/value heads of the softmax layers; lightning layers have num_attention_heads."""
    head_dim: int
    rotary_dim: int
    """How many leading dimensions of a softmax head are rotated; even, at most head_dim."""
    attn_type_list: tuple[int, ...]
    """Per layer: 0 lightning, 1 softmax."""
    num_local_experts: int = 1
    num_experts_per_tok: int = 1
    rope_theta: float = 10_000_000.0
    rms_norm_eps: float = 1e-5
    postnorm: bool = True
    """True: the residual is the normalised stream (M1). False: pre-norm, as in Llama."""
    layernorm_linear_attention_alpha: float = 1.0
    layernorm_linear_attention_beta: float = 1.0
    layernorm_full_attention_alpha: float = 1.0
    layernorm_full_attention_beta: float = 1.0
    layernorm_mlp_alpha: float = 1.0
    layernorm_mlp_beta: float = 1.0
    router_aux_loss_coef: float = 0.001
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    max_position_embeddings: int = 10_240_000
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        def need(good: bool, name: str, allowed: str) -> None:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {allowed}")

        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "num_local_experts",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            need(isinstance(value, int) and value >= 1, name, "an integer of at least 1")
        object.__setattr__(self, "attn_type_list", tuple(self.attn_type_list))
        need(
            len(self.attn_type_list) == self.num_hidden_layers
            and set(self.attn_type_list) <= {LIGHTNING, SOFTMAX},
            "attn_type_list",
            f"{self.num_hidden_layers} entries (num_hidden_layers) of 0 or 1",
        )
        need(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            f"a divisor of num_attention_heads ({self.num_attention_heads})",
        )
        need(
            self.rotary_dim % 2 == 0 and 0 < self.rotary_dim <= self.head_dim,
            "rotary_dim",
            f"even, 2 to head_dim ({self.head_dim})",
        )
        need(
            1 <= self.num_experts_per_tok <= self.num_local_experts,
            "num_experts_per_tok",
            f"1 to num_local_experts ({self.num_local_experts})",
        )
        need(self.rope_theta > 0, "rope_theta", "above 0")
        need(self.rms_norm_eps > 0, "rms_norm_eps", "above 0")
        need(self.initializer_range > 0, "initializer_range", "above 0")
        need(self.router_aux_loss_coef >= 0, "router_aux_loss_coef", "0 or more")

    @property
    def lightning_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.attn_type_list) if kind == LIGHTNING)

    @property
    def softmax_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.attn_type_list) if kind == SOFTMAX)

    @property
    def attention_size(self) -> int:
        """H * D, the width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> M1Config:
        """Reads a published, a transformers `minimax` or a `llama` config.json."""
        model_type = raw.get("model_type", "minimax_m1")
        if model_type not in _READERS:
            raise ValueError(
                f"model_type is {model_type!r}; allowed are {', '.join(sorted(_READERS))}"
            )
        return _READERS[model_type](dict(raw))

    @classmethod
    def from_pretrained(cls, path_or_preset: str | Path) -> M1Config:
        """A preset's name, a folder with a config.json, or that file itself."""
        if str(path_or_preset) in PRESETS:
            return PRESETS[str(path_or_preset)]
        path = Path(path_or_preset)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"no config at {path}; give a folder with config.json, that file, or one of the "
                f"presets {', '.join(PRESETS)}"
            )
        return cls.from_dict(json.loads(file.read_text()))

    def to_dict(self, layout: str = "published") -> dict[str, Any]:
        """The config.json of a layout: "published" or "transformers"."""
        if layout == "published":
            return self._to_published()
        if layout == "transformers":
            return self._to_transformers()
        raise ValueError(f"layout is {layout!r}; allowed are 'published' and 'transformers'")

    def _to_published(self) -> dict[str, Any]:
        return {
            "architectures": ["MiniMaxM1ForCausalLM"],
            "model_type": "minimax_m1",
            "hidden_act": "silu",
            "shared_intermediate_size": 0,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()},
        }

    def _to_transformers(self) -> dict[str, Any]:
        if not self.postnorm or self.tie_word_embeddings:
            raise ValueError(
                "transformers' minimax layout is post-norm with an untied head; "
                f"this config has postnorm={self.postnorm}, "
                f"tie_word_embeddings={self.tie_word_embeddings}"
            )
        out = {
            "architectures": ["MiniMaxForCausalLM"],
            "model_type": "minimax",
            "hidden_act": "silu",
            "block_size": 256,
            "layer_types": [
                "full_attention" if kind == SOFTMAX else "linear_attention"
                for kind in self.attn_type_list
            ],
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            **{ours: getattr(self, name) for name, ours in _TRANSFORMERS_NAMES.items()},
        }
        plain = {f.name for f in fields(self)} - set(_TRANSFORMERS_NAMES)
        plain -= {"attn_type_list", "postnorm", "rotary_dim", "rope_theta"}
        out.update({name: getattr(self, name) for name in sorted(plain)})
        # transformers has no key for partial rotary; ours keeps the truth when it is read back.
        if self.rotary_dim != self.head_dim:
            out["rotary_dim"] = self.rotary_dim
        return out


_TRANSFORMERS_NAMES = {
    "layernorm_linear_attention_alpha": "linear_attn_alpha_factor",
    "layernorm_linear_attention_beta": "linear_attn_beta_factor",
    "layernorm_full_attention_alpha": "full_attn_alpha_factor",
    "layernorm_full_attention_beta": "full_attn_beta_factor",
    "layernorm_mlp_alpha": "mlp_alpha_factor",
    "layernorm_mlp_beta": "mlp_beta_factor",
}

# Keys that say nothing about the mathematics and may hold anything.
_INERT = {
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "output_router_logits",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "_name_or_path",
}

# Keys whose feature this code does not have: only the value that switches it off is accepted.
_OFF: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "rope_scaling": (None,),
    "router_jitter_noise": (0, 0.0),
    "shared_intermediate_size": (0,),
    "sliding_window": (None,),
}


def _strict(raw: dict[str, Any], *, also_inert: tuple[str, ...] = ()) -> M1Config:
    known = {f.name: f.type for f in fields(M1Config)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key in known:
            # JSON writers drop the fraction of 1.0.
            is_whole = type(value) is int and known[key] == "float"
            values[key] = float(value) if is_whole else value
        elif key in _OFF:
            if value not in _OFF[key]:
                raise ValueError(
                    f"{key} is {value!r}; OpenM1 implements only "
                    f"{' or '.join(repr(v) for v in dict.fromkeys(_OFF[key]))}"
                )
        elif key not in _INERT and key not in also_inert:
            raise ValueError(f"unknown config key {key!r} (value {value!r})")
    required = {f.name for f in fields(M1Config) if f.default is f.default_factory}
    if missing := required - set(values):
        raise ValueError(f"config lacks {', '.join(sorted(missing))}")
    return M1Config(**values)


def _read_published(raw: dict[str, Any]) -> M1Config:
    raw.setdefault("rotary_dim", raw.get("head_dim"))
    raw["attn_type_list"] = tuple(raw.get("attn_type_list", ()))
    # The published class treats an absent postnorm as false.
    raw.setdefault("postnorm", False)
    return _strict(raw, also_inert=("shared_moe_mode",))


def _read_transformers(raw: dict[str, Any]) -> M1Config:
    rope = raw.pop("rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type is {rope['rope_type']!r}; OpenM1 implements only 'default'")
    raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 1e6))
    raw["attn_type_list"] = tuple(_layer_kind(kind) for kind in raw.pop("layer_types"))
    for ours, theirs in _TRANSFORMERS_NAMES.items():
        raw[ours] = raw.pop(theirs, 1.0)
    raw["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    raw.setdefault("rotary_dim", raw["head_dim"])
    raw["postnorm"] = True
    # block_size is how transformers splits its loop; the result does not depend on it.
    return _strict(raw, also_inert=("block_size", "attn_type_list"))


def _layer_kind(name: str) -> int:
    if name not in ("linear_attention", "full_attention"):
        raise ValueError(
            f"layer_types has {name!r}; allowed are 'linear_attention' and 'full_attention'"
        )
    return SOFTMAX if name == "full_attention" else LIGHTNING


def _read_llama(raw: dict[str, Any]) -> M1Config:
    heads = raw["num_attention_heads"]
    rope = raw.pop("rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type is {rope['rope_type']!r}; OpenM1 implements only 'default'")
    raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 1e4))
    raw["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // heads
    raw["num_key_value_heads"] = raw.get("num_key_value_heads") or heads
    raw["rotary_dim"] = raw["head_dim"]
    raw["attn_type_list"] = (SOFTMAX,) * raw["num_hidden_layers"]
    raw["postnorm"] = False
    raw["router_aux_loss_coef"] = 0.0
    # Hints of exporters that do not touch the computation.
    return _strict(
        raw, also_inert=("is_llama_config", "rope_interleaved", "transformers.js_config")
    )


_READERS = {
    "minimax_m1": _read_published,
    "MiniMaxM1": _read_published,
    "minimax_text_01": _read_published,
    "minimax": _read_transformers,
    "llama": _read_llama,
}
MODEL_TYPES = tuple(_READERS)
"""What `model_type` may be in a config.json."""


def layer_pattern(num_hidden_layers: int, period: int = 8) -> tuple[int, ...]:
    """Softmax in the last layer of each `period`, lightning elsewhere (M1: 8)."""
    return tuple(
        SOFTMAX if i % period == period - 1 else LIGHTNING for i in range(num_hidden_layers)
    )


def deepnorm_alpha(num_hidden_layers: int) -> float:
    """(2 L)^(1/4): the residual scale of M1's post-norm."""
    return math.pow(2 * num_hidden_layers, 0.25)


def post_norm_config(
    *,
    vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    period: int = 8,
    **overrides: Any,
) -> M1Config:
    """An M1-shaped config at any size, with M1's ratios where `overrides` says nothing."""
    head_dim = overrides.pop("head_dim", hidden_size // num_attention_heads)
    alpha = deepnorm_alpha(num_hidden_layers)
    base = {
        "intermediate_size": hidden_size,
        "num_key_value_heads": max(1, num_attention_heads // 4),
        "head_dim": head_dim,
        "rotary_dim": max(2, head_dim // 2),
        "attn_type_list": layer_pattern(num_hidden_layers, period),
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layernorm_linear_attention_alpha": alpha,
        "layernorm_full_attention_alpha": alpha,
        "layernorm_mlp_alpha": alpha,
        # At small widths post-norm stalls with the published 0.02.
        "initializer_range": 1 / math.sqrt(hidden_size),
        "router_aux_loss_coef": 0.01,
    }
    return M1Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        **(base | overrides),
    )


def _published() -> M1Config:
    return post_norm_config(
        vocab_size=200_064,
        hidden_size=6144,
        num_hidden_layers=80,
        num_attention_heads=64,
        head_dim=128,
        intermediate_size=9216,
        num_key_value_heads=8,
        num_local_experts=32,
        initializer_range=0.02,
        router_aux_loss_coef=0.001,
    )


M1_40K = _published()
# The two releases differ in training (thinking budgets of 40K and 80K tokens), not in shape.
M1_80K = replace(M1_40K)

PRESETS: dict[str, M1Config] = {
    "nano": post_norm_config(
        vocab_size=832,
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=8,
        period=4,
        max_position_embeddings=10_240_000,
        eos_token_id=768,
    ),
    "m1-40k": M1_40K,
    "m1-80k": M1_80K,
}
