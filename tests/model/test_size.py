from __future__ import annotations

import pytest

from openm1.model.config import PRESETS, M1Config
from openm1.model.m1 import M1ForCausalLM
from openm1.model.names import file_tensors
from openm1.model.size import model_size

from .tiny import one_expert_config, pre_norm_config, tiny_config

CONFIGS = {
    "post-norm": tiny_config(),
    "tied": pre_norm_config(),
    "one expert": one_expert_config(),
    "one expert, tied": one_expert_config(tie_word_embeddings=True),
    **PRESETS,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_counts_are_those_of_the_model(config: M1Config) -> None:
    model = M1ForCausalLM(config, device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    size = model_size(config)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert size.total_params == sum(counts.values())
    experts = sum(n for name, n in counts.items() if ".experts." in name)
    tables = sum(n for name, n in counts.items() if "embed_tokens" in name or "lm_head" in name)
    routers = sum(n for name, n in counts.items() if name.endswith("moe.gate.weight"))
    chosen = experts * config.num_experts_per_tok // config.num_local_experts
    assert size.active_params_per_token == size.total_params - tables - routers - experts + chosen


def test_m1_has_the_published_size() -> None:
    config = PRESETS["m1-80k"]
    size = model_size(config)
    assert size.total_params == 456_089_655_296
    assert size.active_params_per_token == pytest.approx(45.93e9, abs=5e6)
    assert (size.num_layers, size.num_softmax_layers) == (80, 10)
    assert size.state_bytes_per_sequence == 280 * 2**20
    assert size.kv_bytes_per_token == 40_960
    tensors = file_tensors(M1ForCausalLM(config, device="meta"), "published")
    assert len(tensors) == 8_243
    # metadata.total_size of the published model.safetensors.index.json.
    assert size.checkpoint_bytes == 912_210_767_872


def test_keys_and_values_can_be_wider() -> None:
    config = tiny_config()
    assert model_size(config, kv_dtype_bytes=4).kv_bytes_per_token == 2 * 2 * 3 * 8 * 4
