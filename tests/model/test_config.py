from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from openm1.model.config import M1_40K, PRESETS, M1Config, layer_pattern

from .tiny import one_expert_config, pre_norm_config, tiny_config

# The config.json of MiniMax-M1-40k and -80k, without auto_map.
PUBLISHED = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [1 if layer % 8 == 7 else 0 for layer in range(80)],
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "model_type": "minimax_m1",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 200064,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def through_json(raw: dict) -> dict:
    return json.loads(json.dumps(raw))


def test_presets_are_the_published_config() -> None:
    assert M1Config.from_dict(PUBLISHED) == PRESETS["m1-40k"] == PRESETS["m1-80k"] == M1_40K


@pytest.mark.parametrize("config", [tiny_config(), pre_norm_config(), one_expert_config(), M1_40K])
def test_published_round_trip(config: M1Config) -> None:
    assert M1Config.from_dict(through_json(config.to_dict())) == config


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(rotary_dim=8), M1_40K])
def test_transformers_round_trip(config: M1Config) -> None:
    raw = through_json(config.to_dict("transformers"))
    assert raw["model_type"] == "minimax"
    assert M1Config.from_dict(raw) == config


@pytest.mark.parametrize("change", [{"postnorm": False}, {"tie_word_embeddings": True}])
def test_what_transformers_cannot_say_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="post-norm with an untied head"):
        tiny_config(**change).to_dict("transformers")


def test_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layout is 'onnx'; allowed are 'published'"):
        tiny_config().to_dict("onnx")


@pytest.mark.parametrize("raw", [PUBLISHED, LLAMA, tiny_config().to_dict("transformers")])
def test_unknown_keys_are_refused(raw: dict) -> None:
    with pytest.raises(ValueError, match="unknown config key 'num_shared_experts'"):
        M1Config.from_dict(raw | {"num_shared_experts": 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("router_jitter_noise", 0.01),
        ("sliding_window", 4096),
        ("shared_intermediate_size", 9216),
        ("rope_scaling", {"type": "yarn"}),
    ],
)
@pytest.mark.parametrize("raw", [PUBLISHED, LLAMA, tiny_config().to_dict("transformers")])
def test_features_that_are_not_there_are_refused(raw: dict, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key} is .*; OpenM1 implements only"):
        M1Config.from_dict(raw | {key: value})


@pytest.mark.parametrize("raw", [LLAMA, tiny_config().to_dict("transformers")])
def test_scaled_rotary_is_refused(raw: dict) -> None:
    with pytest.raises(ValueError, match="rope_type is 'llama3'"):
        M1Config.from_dict(raw | {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 0),
        ("intermediate_size", -24),
        ("attn_type_list", (0, 1)),
        ("attn_type_list", (0, 1, 2, 0, 1, 0)),
        ("num_key_value_heads", 4),
        ("rotary_dim", 3),
        ("rotary_dim", 10),
        ("num_experts_per_tok", 5),
        ("rope_theta", 0.0),
        ("rms_norm_eps", -1e-5),
        ("initializer_range", 0.0),
        ("router_aux_loss_coef", -0.1),
    ],
)
def test_impossible_values_are_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{key} is .*; allowed is"):
        tiny_config(**{key: value})


def test_a_config_that_lacks_a_size_is_refused() -> None:
    raw = {k: v for k, v in PUBLISHED.items() if k != "vocab_size"}
    with pytest.raises(ValueError, match="config lacks vocab_size"):
        M1Config.from_dict(raw)


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="model_type is 'mixtral'; allowed are"):
        M1Config.from_dict(PUBLISHED | {"model_type": "mixtral"})


def test_llama_is_a_degenerate_m1() -> None:
    config = M1Config.from_dict(LLAMA)
    assert config.lightning_layers == () and config.softmax_layers == (0, 1)
    assert (config.num_local_experts, config.postnorm) == (1, False)
    assert (config.head_dim, config.rotary_dim, config.num_key_value_heads) == (8, 8, 4)
    assert config.rope_theta == 10_000.0


def test_from_pretrained_takes_presets_folders_and_files(tmp_path: Path) -> None:
    config = tiny_config()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert M1Config.from_pretrained("nano") is PRESETS["nano"]
    assert M1Config.from_pretrained(tmp_path) == config
    assert M1Config.from_pretrained(tmp_path / "config.json") == config
    with pytest.raises(FileNotFoundError, match="presets nano, m1-40k, m1-80k"):
        M1Config.from_pretrained(tmp_path / "nowhere")


def test_layer_pattern_is_seven_to_one() -> None:
    assert [i for i, kind in enumerate(layer_pattern(80)) if kind] == list(range(7, 80, 8))


def test_importing_the_config_does_not_import_torch() -> None:
    code = "import sys, openm1.model.config, openm1.model.size; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
