from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import openm1.model.hf as hf
from openm1.model.config import M1Config
from openm1.model.m1 import M1ForCausalLM
from openm1.model.names import CheckpointMismatch, detect_layout, file_tensors

from .tiny import one_expert_config, pre_norm_config, random_ids, random_model, tiny_config

# fp32 rounding of two different programs, over six layers with scales above 1.
TRANSFORMERS_ERROR = 1e-4
# The same over two plain layers.
LLAMA_ERROR = 1e-5

EVERY_LAYOUT = {
    "published": (tiny_config(), "published"),
    "transformers": (tiny_config(), "transformers"),
    "tied": (pre_norm_config(), "published"),
    "one expert": (one_expert_config(), "published"),
    "one expert, transformers": (one_expert_config(postnorm=True), "transformers"),
}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """A weight that loading forgets to write holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def agreeing_config(**overrides) -> M1Config:
    """Where transformers' MiniMax computes what M1 does: full rotary, heads a power of two, and
    the last layer softmax."""
    base = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rotary_dim": 8,
        "attn_type_list": (0, 1, 0, 0, 0, 1),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return tiny_config(**(base | overrides))


def assert_same(loaded: M1ForCausalLM, model: M1ForCausalLM) -> None:
    assert loaded.config == model.config
    theirs, ours = loaded.state_dict(), model.state_dict()
    assert list(theirs) == list(ours)
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), name


@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, hf.MAX_SHARD_BYTES])
@pytest.mark.parametrize(("config", "layout"), EVERY_LAYOUT.values(), ids=EVERY_LAYOUT)
def test_round_trip_keeps_every_bit(
    config: M1Config, layout: str, max_shard_bytes: int, tmp_path: Path
) -> None:
    model = random_model(config)
    hf.save_pretrained(model, tmp_path, layout=layout, max_shard_bytes=max_shard_bytes)
    assert_same(M1ForCausalLM.from_pretrained(tmp_path), model)
    files = list(tmp_path.glob("*.safetensors"))
    names = [name for file in files for name in load_file(file)]
    assert sorted(names) == sorted(file_tensors(model, layout))
    assert (len(files) > 1) == (max_shard_bytes < hf.MAX_SHARD_BYTES)
    if max_shard_bytes == 20_000:
        for file in files:
            tensors = load_file(file).values()
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= 20_000


@pytest.mark.parametrize("layout", ["published", "transformers", "llama"])
def test_layouts_hold_every_number_once(layout: str) -> None:
    config = one_expert_config() if layout == "llama" else tiny_config()
    model = M1ForCausalLM(config, device="meta")
    counts = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    tensors = file_tensors(model, layout)
    for tensor in tensors.values():
        inside = torch.zeros(tensor.shape)
        for piece in tensor.pieces:
            assert inside[piece.source].shape == counts[piece.parameter][piece.target].shape
            inside[piece.source] += 1
            counts[piece.parameter][piece.target] += 1
        assert (inside == 1).all()
    assert all((count == 1).all() for count in counts.values())
    assert detect_layout(tensors, config) == layout


def test_head_of_a_bf16_model_is_stored_in_bf16_when_exact(tmp_path: Path) -> None:
    model = random_model(tiny_config(), dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.bfloat16())
    hf.save_pretrained(model, tmp_path / "exact")
    stored = load_file(tmp_path / "exact" / "model.safetensors")
    kept = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in stored if name.endswith("moe.gate.weight")}
    assert_same(M1ForCausalLM.from_pretrained(tmp_path / "exact", dtype="bfloat16"), model)

    with torch.no_grad():
        model.lm_head.weight.add_(1e-6)
    hf.save_pretrained(model, tmp_path / "trained")
    stored = load_file(tmp_path / "trained" / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.float32
    assert_same(M1ForCausalLM.from_pretrained(tmp_path / "trained", dtype="bfloat16"), model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", torch.bfloat16])
def test_dtype_is_that_of_all_but_head_and_router(dtype: str | torch.dtype, tmp_path: Path) -> None:
    hf.save_pretrained(random_model(tiny_config()), tmp_path)
    model = M1ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    head = torch.promote_types(expected, torch.float32)
    for name, parameter in model.named_parameters():
        wide = name.endswith(("lm_head.weight", "moe.gate.weight"))
        assert parameter.dtype == (head if wide else expected)


@pytest.mark.parametrize("dtype", ["float16", "int8", torch.float16])
def test_other_dtypes_are_refused(dtype: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"dtype is .*; allowed are float32, bfloat16, float64"):
        M1ForCausalLM.from_pretrained("nano", dtype=dtype)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.3.block_sparse_moe.experts.2.w3.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.qkv_proj.bias"] = torch.zeros(3)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"missing: model\.layers\.3\.block_sparse_moe\.experts\.2\.w3\.weight$"),
        (add, r"unexpected: model\.layers\.0\.self_attn\.qkv_proj\.bias$"),
        (reshape, r"misshapen: .*\.1\.self_attn\.k_proj\.weight is \[40, 24\] instead of \[24, 40"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    hf.save_pretrained(random_model(tiny_config()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointMismatch, match=message):
        M1ForCausalLM.from_pretrained(tmp_path)


def test_a_long_list_of_names_is_cut_short_only_in_the_message(tmp_path: Path) -> None:
    hf.save_pretrained(random_model(tiny_config()), tmp_path)
    config = tiny_config(num_local_experts=6)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(CheckpointMismatch, match="and 16 more") as error:
        M1ForCausalLM.from_pretrained(tmp_path)
    assert len(error.value.missing) == 6 * 2 * 3
    assert len(error.value.misshapen) == 6  # The routers.
    assert error.value.unexpected == []


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    hf.save_pretrained(random_model(tiny_config()), tmp_path, max_shard_bytes=30_000)
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        M1ForCausalLM.from_pretrained(tmp_path)


def test_unknown_models_are_refused_with_what_is_allowed(tmp_path: Path) -> None:
    for name in ("nanoo", tmp_path, tmp_path / "model.bin"):
        with pytest.raises(FileNotFoundError, match=r"a folder with config\.json .*nano"):
            M1ForCausalLM.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match="m1-80k is a preset config without weights"):
        M1ForCausalLM.from_pretrained("m1-80k")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        M1ForCausalLM.from_pretrained(tmp_path)


def test_saving_again_replaces_the_weights_and_keeps_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    hf.save_pretrained(random_model(tiny_config()), folder, max_shard_bytes=30_000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "card").mkdir()
    (folder / "card" / "curve.svg").write_text("<svg/>")
    model = random_model(pre_norm_config())
    hf.save_pretrained(model, folder)
    assert_same(M1ForCausalLM.from_pretrained(folder), model)
    kept = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert kept == {"config.json", "model.safetensors", "tokenizer.json", "card/curve.svg"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_save_that_breaks_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    model = random_model(tiny_config())
    hf.save_pretrained(model, folder)

    def full_disk(tensors: object, path: Path, **options: object) -> None:
        if "00002" in path.name:
            raise OSError("no space left")
        path.write_bytes(b"half")

    monkeypatch.setattr(hf, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        hf.save_pretrained(random_model(tiny_config()), folder, max_shard_bytes=30_000)
    assert_same(M1ForCausalLM.from_pretrained(folder), model)
    assert list(tmp_path.iterdir()) == [folder]


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(ValueError, match="post-norm with an untied head"):
        hf.save_pretrained(random_model(pre_norm_config()), folder, layout="transformers")
    with pytest.raises(ValueError, match="layout is 'gguf'"):
        hf.save_pretrained(random_model(tiny_config()), folder, layout="gguf")
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        hf.save_pretrained(random_model(tiny_config()), folder, max_shard_bytes=0)
    assert list(tmp_path.iterdir()) == []
    folder.write_text("in the way")
    with pytest.raises(ValueError, match="is a file; allowed is a folder"):
        hf.save_pretrained(random_model(tiny_config()), folder)


def test_transformers_reads_ours_and_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_model(agreeing_config())
    hf.save_pretrained(model, tmp_path, layout="transformers")
    torch.use_deterministic_algorithms(False)
    theirs = transformers.MiniMaxForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.stack(random_ids(model.config, 300, 300))  # More than one of their blocks of 256.
    with torch.no_grad():
        difference = (theirs(ids).logits - model(ids)).abs().max()
    assert float(difference) < TRANSFORMERS_ERROR


def minimax_model(**overrides):
    """A random model of transformers that M1 agrees with, unless `overrides` say otherwise."""
    transformers = pytest.importorskip("transformers")
    torch.use_deterministic_algorithms(False)
    raw = agreeing_config().to_dict("transformers") | overrides
    raw.pop("architectures")
    theirs = transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**raw)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return theirs


def test_ours_reads_transformers_and_agrees(tmp_path: Path) -> None:
    """As it saves (published names, its decays beside them), and by its modules' own names."""
    theirs = minimax_model()
    theirs.save_pretrained(tmp_path / "saved")
    theirs.config.save_pretrained(tmp_path / "modules")
    save_file(theirs.state_dict(), tmp_path / "modules" / "model.safetensors")
    for folder in ("saved", "modules"):
        ours = M1ForCausalLM.from_pretrained(tmp_path / folder)
        (ids,) = random_ids(ours.config, 70)
        with torch.no_grad():
            difference = (theirs(ids[None]).logits - ours(ids[None])).abs().max()
        assert float(difference) < TRANSFORMERS_ERROR


def test_weights_trained_with_other_decays_are_refused(tmp_path: Path) -> None:
    theirs = minimax_model(num_attention_heads=6, num_key_value_heads=3, head_dim=8)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.slope_rate is .* only M1's decays"
    ):
        M1ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_llama_is_loaded_as_a_degenerate_m1(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.use_deterministic_algorithms(False)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.15,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path / "llama")
    ours = M1ForCausalLM.from_pretrained(tmp_path / "llama")
    assert ours.config.tie_word_embeddings is tied
    assert not any("gate.weight" in name for name, _ in ours.named_parameters())
    (ids,) = random_ids(ours.config, 50)
    with torch.no_grad():
        truth, logits = theirs(ids[None]).logits, ours(ids[None])
    assert float((truth - logits).abs().max()) < LLAMA_ERROR
    ours.save_pretrained(tmp_path / "published")
    assert_same(M1ForCausalLM.from_pretrained(tmp_path / "published"), ours)
