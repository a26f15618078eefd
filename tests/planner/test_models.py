from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openm1.model.config import PRESETS
from openm1.model.size import model_size
from openm1.planner.models import (
    DEEPSEEK_R1,
    QWEN3_235B_A22B,
    from_json,
    from_m1,
    read_shape,
    with_absorbed_latent,
)
from tests.model.tiny import one_expert_config, pre_norm_config, tiny_config


def test_published_sizes() -> None:
    """Totals of the public checkpoints; R1 without its layer for predicting a second token."""
    assert read_shape("minimax-m1").num_params == 456_089_655_296
    assert read_shape("deepseek-r1").num_params == 671_026_419_200
    assert read_shape("qwen3-235b-a22b").num_params == 235_093_634_560


@pytest.mark.parametrize(
    "config", [*PRESETS.values(), tiny_config(), pre_norm_config(), one_expert_config()]
)
def test_our_own_sizes(config: Any) -> None:
    shape, size = from_m1(config, "one of ours"), model_size(config)
    assert shape.num_params == size.total_params
    assert shape.num_active_params == size.active_params_per_token
    assert 2 * shape.cache_numbers_per_token() == size.kv_bytes_per_token
    assert 4 * shape.state_numbers() == size.state_bytes_per_sequence


def test_a_config_is_read_from_a_folder_or_a_file(tmp_path: Path) -> None:
    for raw in (DEEPSEEK_R1, QWEN3_235B_A22B, tiny_config().to_dict()):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        by_folder, by_file = (read_shape(str(p)) for p in (tmp_path, tmp_path / "config.json"))
        assert by_folder == by_file and by_folder.name == tmp_path.name
        assert by_folder.layers == from_json(raw, "the same").layers


def test_dense_layers_of_qwen3() -> None:
    raw = QWEN3_235B_A22B | {
        "num_hidden_layers": 6,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    }
    experts = [layer.feed_forward.num_experts for layer in from_json(raw, "some").layers]
    assert experts == [1, 128, 1, 1, 1, 128]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"num_hidden_layers": "61"}, "num_hidden_layers is '61'"),
        ({"num_experts_per_tok": 300}, "num_experts_per_tok is 300"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'.*deepseek_v3"),
    ],
)
def test_senseless_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(DEEPSEEK_R1 | change, "r1")


def test_a_missing_key_is_named() -> None:
    raw = {key: value for key, value in DEEPSEEK_R1.items() if key != "kv_lora_rank"}
    with pytest.raises(ValueError, match="lacks 'kv_lora_rank'"):
        from_json(raw, "r1")


def test_what_is_no_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model is 'gpt-9'.*minimax-m1"):
        read_shape("gpt-9")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds list"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        read_shape(str(tmp_path))


def test_only_mla_can_be_absorbed() -> None:
    with pytest.raises(ValueError, match="nano has no latent attention"):
        with_absorbed_latent(read_shape("nano"))
