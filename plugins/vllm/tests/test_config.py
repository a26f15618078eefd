"""What vLLM makes of config.json: the published one, and what the plugin refuses."""

from __future__ import annotations

import json

import pytest
import torch
from openm1_vllm.model import M1ForCausalLM
from vllm.engine.arg_utils import EngineArgs
from vllm.tokenizers import cached_tokenizer_from_config

from openm1.chat.jinja_m1 import M1_CHAT_TEMPLATE
from openm1.model.config import M1_80K
from openm1.model.hf import resolve_path

# The keys of the published config.json of MiniMax-M1-40k and -80k that OpenM1's own lacks.
PUBLISHED_ONLY = {
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_minimax_m1.MiniMaxM1Config",
        "AutoModelForCausalLM": "modeling_minimax_m1.MiniMaxM1ForCausalLM",
    },
    "output_router_logits": False,
    "rope_theta": 10_000_000,
    "router_jitter_noise": 0.0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.2",
    "use_cache": True,
}
MILLION = 1_000_000


def engine_config(folder, config: dict, **settings):
    (folder / "config.json").write_text(json.dumps(config))
    arguments = {"skip_tokenizer_init": True, "max_model_len": 1024} | settings
    return EngineArgs(model=str(folder), **arguments).create_engine_config()


@pytest.mark.parametrize("architecture", ["MiniMaxM1ForCausalLM", "MiniMaxText01ForCausalLM"])
def test_the_published_config_serves_a_million_tokens(tmp_path, architecture):
    kind = {"MiniMaxM1ForCausalLM": "minimax_m1"}.get(architecture, "minimax_text_01")
    config = M1_80K.to_dict() | PUBLISHED_ONLY
    config |= {"architectures": [architecture], "model_type": kind}
    made = engine_config(tmp_path, config, max_model_len=MILLION)
    model = made.model_config
    assert model.max_model_len == MILLION
    assert model.dtype == torch.bfloat16
    assert model.head_dtype == torch.float32
    assert model.is_hybrid
    assert model.get_num_layers_by_block_type(made.parallel_config, "attention") == 10
    assert M1ForCausalLM.get_mamba_state_shape_from_config(made) == ((64, 128, 128),)
    assert M1ForCausalLM.get_mamba_state_dtype_from_config(made) == (torch.float32,)


def test_values_the_plugin_does_not_have_are_refused(tmp_path):
    config = M1_80K.to_dict()
    for change, reason in (
        ({"shared_intermediate_size": 4096}, "shared_intermediate_size is 4096"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_type is .linear."),
        ({"rotary_dim": 7}, "rotary_dim is 7"),
    ):
        with pytest.raises(ValueError, match=reason):
            engine_config(tmp_path, config | change)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding is on",
        ),
        ({"mamba_cache_dtype": "float16"}, "mamba_cache_dtype is 'float16'"),
    ],
)
def test_settings_that_would_give_wrong_tokens_are_refused(tmp_path, settings, reason):
    with pytest.raises(ValueError, match=reason):
        engine_config(tmp_path, M1_80K.to_dict(), **settings)


def test_end_and_template_are_m1s_whatever_the_files_say(tmp_path):
    for file in resolve_path("nano").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = json.loads((tmp_path / "tokenizer_config.json").read_text())
    own |= {"chat_template": "{{ broken }}", "eos_token": "<begin_of_document>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    config = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": 0}
    made = engine_config(tmp_path, config, skip_tokenizer_init=False).model_config
    tokenizer = cached_tokenizer_from_config(made)
    assert tokenizer.chat_template == M1_CHAT_TEMPLATE
    assert tokenizer.decode([made.hf_config.eos_token_id]) == "<end_of_sentence>"
    assert made.hf_config.num_real_tokens == max(tokenizer.get_vocab().values()) + 1
    assert made.hf_config.num_real_tokens < made.hf_config.vocab_size
