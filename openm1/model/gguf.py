"""Models from a .gguf file, dequantised tensor by tensor: `minimax-01`, or Llama-type.

Source: the GGUF specification of the ggml project, and the row order its converter gives to the
query and key matrices of Llama-type models. `gguf_minimax` says what is in files of the other kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openm1.common.device import parse_dtype
from openm1.model import gguf_minimax
from openm1.model.config import M1Config
from openm1.model.gguf_minimax import Folding
from openm1.model.names import Index, check_tensors, file_tensors

if TYPE_CHECKING:
    from gguf import GGUFReader

    from openm1.model.m1 import M1ForCausalLM

ARCHITECTURE = "llama"

_CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}

_REQUIRED_KEYS = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

_TOKENIZER_KEYS = {
    "tokens": "tokenizer.ggml.tokens",
    "merges": "tokenizer.ggml.merges",
    "token_types": "tokenizer.ggml.token_type",
    "model": "tokenizer.ggml.model",
    "pre": "tokenizer.ggml.pre",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "chat_template": "tokenizer.chat_template",
    "huggingface_json": "tokenizer.huggingface.json",
}


def load_gguf(
    model_class: type[M1ForCausalLM],
    path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: torch.device | str = "cpu",
) -> M1ForCausalLM:
    """A `minimax-01` model, or a Llama-type one as a degenerate M1: all softmax, one expert,
    pre-norm.

    Raises ValueError for another architecture or a feature this model lacks, CheckpointMismatch
    for tensors that are missing, unexpected or misshapen.
    """
    import numpy as np
    from gguf.quants import dequantize

    reader = _open(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config, folding, shapes = _read_config(reader, path)
    model = model_class(config, dtype=parse_dtype(dtype), device="meta")
    wanted = _llama_tensors(model) if folding is None else _minimax_tensors(model, folding)
    copies = _derived(config)
    present = {name: shape for name, shape in shapes.items() if name not in copies}
    check_tensors(path, {name: t.shape for name, t in wanted.items()}, present, config)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in wanted.items():
            array = dequantize(stored[name].data, stored[name].tensor_type)
            # What is stored in fp32 comes as a view of the read-only file.
            values = torch.from_numpy(np.require(array, requirements="W"))
            parameters[tensor.parameter][tensor.target].copy_(tensor.read(values))
    return model


def gguf_config(path: str | Path) -> M1Config:
    """The config alone; raises ValueError as `load_gguf` does."""
    return _read_config(_open(path), path)[0]


@dataclass(frozen=True, slots=True)
class _Stored:
    """parameter[target] is read(the dequantised tensor)."""

    shape: tuple[int, ...]
    parameter: str
    target: Index
    read: Callable[[Tensor], Tensor]


def _llama_tensors(model: M1ForCausalLM) -> dict[str, _Stored]:
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for name, tensor in file_tensors(model, "llama").items():
        theirs = _gguf_name(name)
        (piece,) = tensor.pieces
        num_heads = heads.get(theirs.split(".")[-2])
        read = partial(halves_from_pairs, num_heads=num_heads) if num_heads else _as_is
        tensors[theirs] = _Stored(tensor.shape, piece.parameter, piece.target, read)
    return tensors


def _minimax_tensors(model: M1ForCausalLM, folding: Folding) -> dict[str, _Stored]:
    return {
        gguf_minimax.gguf_name(name): _Stored(
            tuple(value.shape), name, (), partial(torch.div, other=folding.factor(name))
        )
        for name, value in model.named_parameters()
    }


def _as_is(values: Tensor) -> Tensor:
    return values


def _derived(config: M1Config) -> set[str]:
    """What a `minimax-01` file holds for llama.cpp's sake: a router of one expert, a tied head."""
    if config.num_local_experts > 1 and not config.tie_word_embeddings:
        return set()
    names = {"output.weight"} if config.tie_word_embeddings else set()
    if config.num_local_experts == 1:
        names |= {f"blk.{layer}.ffn_gate_inp.weight" for layer in range(config.num_hidden_layers)}
    return names


def _read_config(
    reader: GGUFReader, path: str | Path
) -> tuple[M1Config, Folding | None, dict[str, tuple[int, ...]]]:
    """None in place of the folding says that the file is Llama-type."""
    fields = {name: field.contents() for name, field in _small_fields(reader).items()}
    shapes = {t.name: tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors}
    if fields.get("general.architecture") == gguf_minimax.ARCHITECTURE:
        return (*gguf_minimax.read_config(fields, shapes, str(path)), shapes)
    return _config(fields, shapes, path), None, shapes


def read_gguf_tokenizer_fields(path: str | Path) -> dict[str, Any]:
    """The tokenizer in plain lists, strings and numbers; None for what the file does not say.

    Keys: tokens, merges ("left right"), token_types (1 normal, 3 control, 4 user-defined), model,
    pre, bos_token_id, eos_token_id, chat_template, huggingface_json (a whole tokenizer.json).
    """
    reader = _open(path)
    return {
        ours: reader.fields[theirs].contents() if theirs in reader.fields else None
        for ours, theirs in _TOKENIZER_KEYS.items()
    }


def halves_from_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Query or key rows [heads * D, C] from ggml's order into that of `model.rope`.

    ggml rotates neighbours (2i, 2i+1) together and so stores the two halves of a head interleaved;
    this model rotates i with i + D/2.
    """
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _open(path: str | Path) -> GGUFReader:
    import numpy as np
    from gguf import GGUFReader

    def keep_plain(reader: Any, mapped: np.memmap) -> None:
        reader.plain = np.asarray(mapped)

    class PlainReader(GGUFReader):
        """Slices a plain array instead of a memmap: a third of the time for a vocabulary."""

        data = property(attrgetter("plain"), keep_plain)

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file at {str(path)!r}")
    return PlainReader(Path(path))


def _small_fields(reader: GGUFReader) -> dict[str, Any]:
    """Without the vocabulary, which takes long to unpack."""
    large = ("tokens", "merges", "token_types", "huggingface_json")
    tables = {_TOKENIZER_KEYS[name] for name in large}
    return {name: field for name, field in reader.fields.items() if name not in tables}


def _gguf_name(name: str) -> str:
    """The GGUF name of a tensor in Llama's layout."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.weight"


def _config(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: str | Path
) -> M1Config:
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{path} has general.architecture {architecture!r}; allowed are "
            f"{ARCHITECTURE!r}, {gguf_minimax.ARCHITECTURE!r}"
        )
    prefix = f"{ARCHITECTURE}."
    settings = {n.removeprefix(prefix): v for n, v in fields.items() if n.startswith(prefix)}
    values: dict[str, Any] = {"model_type": "llama"}
    for theirs, ours in _CONFIG_KEYS.items():
        if theirs in settings:
            values[ours] = settings[theirs]
    if absent := [name for name in _REQUIRED_KEYS if name not in settings]:
        raise ValueError(f"{path} lacks {', '.join(prefix + n for n in absent)}")
    if "token_embd.weight" in shapes:
        values["vocab_size"] = shapes["token_embd.weight"][0]
    values["tie_word_embeddings"] = "output.weight" not in shapes
    for key in ("bos_token_id", "eos_token_id"):
        values[key] = fields.get(f"tokenizer.ggml.{key}")
    config = M1Config.from_dict(values)
    _check_settings(settings, config, path)
    return config


def _check_settings(settings: Mapping[str, Any], config: M1Config, path: str | Path) -> None:
    """Refuses settings of features that this model does not have."""
    allowed = {
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.scaling.type": "none",
        "expert_count": 0,
        "expert_used_count": 0,
    }
    for key, value in settings.items():
        if key in _CONFIG_KEYS:
            continue
        if key not in allowed:
            raise ValueError(f"{path} has the unknown setting llama.{key} (value {value!r})")
        if value != allowed[key]:
            raise ValueError(f"{path} has llama.{key} {value!r}; allowed is {allowed[key]!r}")
