from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import gguf
import pytest
import torch

from openm1.chat.tokenizer import Tokenizer, build_tokenizer
from openm1.cli.main import main
from openm1.model.config import M1Config
from openm1.model.gguf import load_gguf, read_gguf_tokenizer_fields
from openm1.model.gguf_export import save_gguf
from openm1.model.gguf_minimax import CONFIG_KEY, fold
from openm1.model.hf import SHIPPED
from openm1.model.lightning_attention import OUTPUT_NORM_EPS
from openm1.model.m1 import M1ForCausalLM
from openm1.model.names import CheckpointMismatch

from .llama_cpp import LlamaCpp
from .tiny import random_model, tiny_config

# Both sum fp32 products in their own order; seen: 1e-5, and 3e-5 where unequal alphas make an
# epsilon inexact.
MAX_LOGPROB_ERROR = 2e-4

SUBLAYERS = ("linear_attention", "full_attention", "mlp")
EQUAL = {f"layernorm_{s}_alpha": 1.7 for s in SUBLAYERS} | {
    f"layernorm_{s}_beta": 1.0 for s in SUBLAYERS
}


def config_for_llama_cpp(**overrides) -> M1Config:
    """Alphas equal and betas 1, as in every M1; partial rotary, a last lightning layer."""
    return tiny_config(**({"num_attention_heads": 8, "num_key_value_heads": 2} | EQUAL | overrides))


@contextmanager
def one_epsilon(model: M1ForCausalLM) -> Iterator[None]:
    """Gives the norms behind lightning the epsilon of the file, right within a factor of 2."""
    norms = [model.model.layers[i].self_attn.norm for i in model.config.lightning_layers]
    for norm in norms:
        norm.eps = fold(model.config).norm_eps
    yield
    for norm in norms:
        norm.eps = OUTPUT_NORM_EPS


def our_logprobs(model: M1ForCausalLM, prompt_ids: list[int], tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + tokens]))[0]
    return logits[len(prompt_ids) - 1 : -1].log_softmax(-1)


def random_prompt(model: M1ForCausalLM, length: int) -> list[int]:
    return torch.randint(model.config.vocab_size, (length,)).tolist()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_attention_heads": 1, "num_key_value_heads": 1},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 16},
        {"num_attention_heads": 16, "head_dim": 20, "rotary_dim": 10, "rope_theta": 1e7},
        {name: getattr(tiny_config(), name) for name in EQUAL},
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
        {"num_local_experts": 1, "num_experts_per_tok": 1},
        {"num_experts_per_tok": 1, "rms_norm_eps": 1e-6},
        {"attn_type_list": (0, 1), "num_hidden_layers": 2, "num_experts_per_tok": 4},
    ],
    ids=lambda overrides: ",".join(overrides) or "M1-like",
)
def test_llama_cpp_computes_the_same(overrides: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = random_model(config_for_llama_cpp(**overrides))
    with torch.no_grad():
        # As small as in a fresh model, where an epsilon in the wrong place shows.
        model.model.embed_tokens.weight.mul_(0.05)
    save_gguf(model, tmp_path / "model.gguf")
    theirs = LlamaCpp(tmp_path / "model.gguf")
    for length in (1, 19, 200):
        prompt_ids = random_prompt(model, length)
        tokens, logprobs = theirs.greedy(prompt_ids, 6, model.config.vocab_size)
        with one_epsilon(model):
            ours = our_logprobs(model, prompt_ids, tokens)
        torch.testing.assert_close(logprobs, ours, atol=MAX_LOGPROB_ERROR, rtol=0)


def test_small_lightning_outputs_meet_nearly_the_right_epsilon(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = random_model(config_for_llama_cpp())
    with torch.no_grad():
        for layer in model.config.lightning_layers:
            model.model.layers[layer].self_attn.qkv_proj.weight.mul_(0.3)
    assert 0.5 < fold(model.config).norm_eps / OUTPUT_NORM_EPS < 2
    save_gguf(model, tmp_path / "model.gguf")
    tokens, logprobs = LlamaCpp(tmp_path / "model.gguf").greedy([7], 6, model.config.vocab_size)
    # 0.1 with one epsilon for all, as llama.cpp's own converter writes it.
    assert (logprobs - our_logprobs(model, [7], tokens)).abs().max() < 0.01


def test_llama_cpp_computes_sequences_together_as_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = random_model(config_for_llama_cpp())
    save_gguf(model, tmp_path / "model.gguf")
    theirs = LlamaCpp(tmp_path / "model.gguf", num_slots=4)
    prompts = [random_prompt(model, length) for length in (3, 40, 17, 90, 5, 64)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        replies = list(pool.map(lambda p: theirs.greedy(p, 12, model.config.vocab_size), prompts))
    for prompt_ids, (tokens, logprobs) in zip(prompts, replies, strict=True):
        with one_epsilon(model):
            ours = our_logprobs(model, prompt_ids, tokens)
        torch.testing.assert_close(logprobs, ours, atol=MAX_LOGPROB_ERROR, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
def test_nano_answers_alike_in_llama_cpp(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "nano.gguf"
    main(["convert", "nano", str(path), "--layout", "gguf", "--dtype", dtype])
    model = M1ForCausalLM.from_pretrained(path, dtype="float32" if dtype == "q8_0" else dtype)
    tokenizer = Tokenizer.from_gguf_fields(**read_gguf_tokenizer_fields(path))
    prompt_ids = tokenizer.encode(
        "<begin_of_document><beginning_of_sentence>user name=user\n"
        "e 2 hops: b>d f>e g>b d>a a>f c>g h>c e>h<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n",
        allow_special=True,
    )
    tokens, _ = LlamaCpp(path).greedy(prompt_ids, 40, model.config.vocab_size)
    text = tokenizer.decode(tokens)
    assert text.startswith("<think>") and text.endswith("</think>c<end_of_sentence>")
    assert tokens == our_logprobs(model, prompt_ids, tokens).argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_experts", [4, 1])
def test_what_was_written_is_read_bit_for_bit(
    dtype: torch.dtype, tied: bool, num_experts: int, tmp_path: Path
) -> None:
    config = config_for_llama_cpp(
        tie_word_embeddings=tied, num_local_experts=num_experts, num_experts_per_tok=1
    )
    model = random_model(config, dtype=dtype)
    save_gguf(model, tmp_path / "model.gguf")
    loaded = M1ForCausalLM.from_pretrained(tmp_path / "model.gguf", dtype=dtype)
    assert loaded.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_what_a_beta_multiplies_is_read_to_the_last_bit_but_one(tmp_path: Path) -> None:
    config = config_for_llama_cpp(layernorm_linear_attention_beta=0.7, layernorm_mlp_alpha=1.1)
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(config, dtype=dtype)
        save_gguf(model, tmp_path / "model.gguf")
        loaded = M1ForCausalLM.from_pretrained(tmp_path / "model.gguf", dtype=dtype)
        for name, tensor in model.state_dict().items():
            # In a bf16 file they are fp32, so that bf16 rounds them back to what they were.
            rtol = 2**-23 if dtype == torch.float32 else 0
            torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=rtol, atol=0)


def test_a_file_without_our_key_is_the_same_function(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = random_model(config_for_llama_cpp())
    save_gguf(model, tmp_path / "ours.gguf")
    rewrite(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", leave_out=CONFIG_KEY)
    loaded = M1ForCausalLM.from_pretrained(tmp_path / "theirs.gguf")
    assert loaded.config.rms_norm_eps < model.config.rms_norm_eps
    assert loaded.config.attn_type_list == model.config.attn_type_list
    ids = torch.randint(model.config.vocab_size, (1, 50))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(ids), model(ids), atol=MAX_LOGPROB_ERROR, rtol=MAX_LOGPROB_ERROR
        )


def rewrite(source: Path, target: Path, *, leave_out: str = "", **settings: int) -> None:
    """Copies a file without one key or tensor; `settings` replace uint32 keys, "__" for a dot."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    changed = {"minimax-01." + key.replace("__", "."): value for key, value in settings.items()}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", leave_out):
            continue
        value = changed.pop(name, field.contents())
        writer.add_key_value(name, value, field.types[0])
    for name, value in changed.items():
        writer.add_uint32(name, value)
    for tensor in reader.tensors:
        if tensor.name != leave_out:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_at_odds_with_itself_is_refused(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours.gguf", tmp_path / "other.gguf"
    save_gguf(random_model(config_for_llama_cpp()), ours)
    rewrite(ours, other, expert_used_count=3)
    with pytest.raises(ValueError, match=r"minimax-01\.expert_used_count 3; allowed is 2"):
        load_gguf(M1ForCausalLM, other)
    rewrite(ours, other, attention__sliding_window=128)
    with pytest.raises(ValueError, match=r"unknown setting minimax-01\.attention\.sliding_window"):
        load_gguf(M1ForCausalLM, other)
    rewrite(ours, other, leave_out="blk.2.attn_gate.weight")
    with pytest.raises(CheckpointMismatch, match=r"missing: blk\.2\.attn_gate\.weight$"):
        load_gguf(M1ForCausalLM, other)
    rewrite(ours, tmp_path / "foreign.gguf", leave_out=CONFIG_KEY)
    rewrite(tmp_path / "foreign.gguf", other, leave_out="minimax-01.residual_scale")
    with pytest.raises(ValueError, match=r"lacks minimax-01\.residual_scale"):
        load_gguf(M1ForCausalLM, other)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"postnorm": False}, "post-norm only"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, "power of two"),
        ({"attn_type_list": (0,) * 6}, "layers of both kinds"),
        ({"attn_type_list": (1,) * 6}, "layers of both kinds"),
        ({"layernorm_mlp_alpha": 0.0}, "above 0"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    overrides: dict, message: str, tmp_path: Path
) -> None:
    model = M1ForCausalLM(config_for_llama_cpp(**overrides))
    with pytest.raises(ValueError, match=message):
        save_gguf(model, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_what_the_format_does_not_take_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match=r"float64; a GGUF file takes"):
        save_gguf(M1ForCausalLM(config_for_llama_cpp(), dtype=torch.float64), path)
    model = M1ForCausalLM(config_for_llama_cpp())
    with pytest.raises(ValueError, match="hidden_size is 40; q8_0 takes multiples of 32"):
        save_gguf(model, path, quantization="q8_0")
    with pytest.raises(ValueError, match="quantization is 'q4_0'; allowed are None, q8_0"):
        save_gguf(model, path, quantization="q4_0")
    with pytest.raises(ValueError, match=r"must end in \.gguf"):
        save_gguf(model, tmp_path / "model.bin")


def test_eight_bits_are_the_nearest_steps(tmp_path: Path) -> None:
    config = config_for_llama_cpp(hidden_size=64, intermediate_size=32)
    model = random_model(config)
    save_gguf(model, tmp_path / "model.gguf", quantization="q8_0")
    loaded = M1ForCausalLM.from_pretrained(tmp_path / "model.gguf")
    for name, tensor in model.state_dict().items():
        # 127 steps to the largest number of a block, and the step itself is an fp16.
        step = tensor.abs().max() / 127
        assert float((tensor - loaded.state_dict()[name]).abs().max()) < 0.6 * step


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    model = random_model(config_for_llama_cpp())
    save_gguf(model, path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("openm1.model.gguf_export._array", fail)
    with pytest.raises(KeyboardInterrupt):
        save_gguf(model, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_ids_without_a_token_are_never_sampled(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["two words"], special_tokens=["<end_of_sentence>"])
    model = random_model(config_for_llama_cpp(vocab_size=tokenizer.vocab_size + 5))
    with torch.no_grad():
        model.lm_head.weight[: tokenizer.vocab_size] *= 1e-3
    path = tmp_path / "model.gguf"
    assert "ids" in save_gguf(model, path, tokenizer=tokenizer)[0]
    tokens, _ = LlamaCpp(path).greedy([1, 2, 3], 5, model.config.vocab_size)
    assert max(tokens) < tokenizer.vocab_size
    loaded = Tokenizer.from_gguf_fields(**read_gguf_tokenizer_fields(path))
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode("in two words") == tokenizer.encode("in two words")


def test_convert_says_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["convert", str(SHIPPED["nano"]), str(tmp_path / "x"), "--dtype", "q8_0"])
    assert "allowed is layout 'gguf'" in capsys.readouterr().err
