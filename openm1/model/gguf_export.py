"""Writes a model as a GGUF file that llama.cpp runs; read `gguf_minimax` first.

Tensors are converted and written one by one: in memory there is the model and one tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openm1.chat.gguf_vocabulary import dummy_vocabulary, gguf_vocabulary
from openm1.model.gguf_minimax import (
    ARCHITECTURE,
    CONFIG_KEY,
    Folding,
    check_expressible,
    fold,
    gguf_name,
    settings,
)

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    from openm1.chat.tokenizer import Tokenizer
    from openm1.model.m1 import M1ForCausalLM

QUANTIZATIONS = ("q8_0",)
Q8_0_BLOCK = 32


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file; `values` makes it, in fp32 or bf16, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    values: Callable[[], Tensor]


def save_gguf(
    model: M1ForCausalLM,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    quantization: str | None = None,
) -> tuple[str, ...]:
    """Writes `model` to `path`, all or nothing; returns what a user of the file must know.

    Matrices keep their dtype, or become 8-bit blocks with `quantization` "q8_0". Norms, routers
    and what a narrower dtype would round (a head that was kept in fp32, a matrix multiplied by a
    beta) are fp32. Raises ValueError for what llama.cpp cannot run or would compute otherwise.
    """
    from gguf import GGUFWriter

    config, path = model.config, Path(path).expanduser()
    check_expressible(config)
    _check_numbers(model, quantization)
    if path.suffix != ".gguf":
        raise ValueError(f"{path} is the target; its name must end in .gguf")
    if tokenizer is None:
        vocabulary = dummy_vocabulary(config.vocab_size, config.eos_token_id)
    else:
        vocabulary = gguf_vocabulary(tokenizer, config.vocab_size, config.eos_token_id)
    folding = fold(config)
    entries = list(_entries(model, folding, quantization))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replaced_file(path) as new:
        writer = GGUFWriter(new, ARCHITECTURE)
        _write_keys(writer, model, folding, quantization, vocabulary.fields)
        for entry in entries:
            array_type, num_bytes = _stored_as(entry)
            writer.add_tensor_info(
                entry.name, entry.shape, array_type, num_bytes, raw_dtype=entry.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_array(entry))
        writer.close()
    return vocabulary.notes


def _check_numbers(model: M1ForCausalLM, quantization: str | None) -> None:
    if model.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"the model is {model.dtype}; a GGUF file takes float32 and bfloat16")
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"quantization is {quantization!r}; allowed are None, {', '.join(QUANTIZATIONS)}"
        )
    config = model.config
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads * head_dim": config.attention_size,
    }
    for name, width in widths.items():
        if width % Q8_0_BLOCK:
            raise ValueError(f"{name} is {width}; q8_0 takes multiples of {Q8_0_BLOCK}")


def _entries(model: M1ForCausalLM, folding: Folding, quantization: str | None) -> Iterator[_Entry]:
    from gguf import GGMLQuantizationType as Kind

    def matrix(name: str, weight: Tensor, factor: float) -> _Entry:
        kind = Kind.Q8_0 if quantization else _exact_kind(weight, factor, model.dtype)
        return _Entry(name, tuple(weight.shape), kind, lambda: _scaled(weight, factor, kind))

    def plain(name: str, weight: Tensor) -> _Entry:
        return _Entry(name, tuple(weight.shape), Kind.F32, lambda: weight.to("cpu", torch.float32))

    config = model.config
    for parameter, value in model.named_parameters():
        name, weight = gguf_name(parameter), value.detach()
        if weight.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
            yield plain(name, weight)
        else:
            yield matrix(name, weight, folding.factor(parameter))
    if config.num_local_experts == 1:
        # llama.cpp routes even to a single expert; whatever the router says, its weight is 1.
        for layer in range(config.num_hidden_layers):
            name = f"blk.{layer}.ffn_gate_inp.weight"
            yield plain(name, torch.zeros(1, config.hidden_size))
    if config.tie_word_embeddings:
        # The table is multiplied for the first norm; the head is not.
        yield matrix("output.weight", model.head_weight.detach(), 1.0)


def _exact_kind(weight: Tensor, factor: float, dtype: torch.dtype) -> GGMLQuantizationType:
    """BF16 in models of that dtype, but F32 for what would be rounded."""
    from math import frexp

    from gguf import GGMLQuantizationType as Kind

    if dtype == torch.float32 or frexp(factor)[0] not in (0.5, -0.5):
        return Kind.F32
    exact = weight.dtype == dtype or torch.equal(weight.to(dtype).to(weight.dtype), weight)
    return Kind.BF16 if exact else Kind.F32


def _scaled(weight: Tensor, factor: float, kind: GGMLQuantizationType) -> Tensor:
    from gguf import GGMLQuantizationType as Kind

    dtype = torch.bfloat16 if kind == Kind.BF16 else torch.float32
    weight = weight.to("cpu", dtype)
    return weight if factor == 1 else weight * factor


def _stored_as(entry: _Entry) -> tuple[np.dtype, int]:
    """The element type of the array to be written, and its bytes."""
    import numpy as np
    from gguf import GGMLQuantizationType as Kind
    from gguf.constants import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[entry.kind]
    num_bytes = torch.Size(entry.shape).numel() // block * block_bytes
    # The writer takes a shape of bytes where the element type is uint8; here it is of elements.
    return np.dtype(np.float32 if entry.kind == Kind.F32 else np.int16), num_bytes


def _array(entry: _Entry) -> np.ndarray:
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import quantize

    values = entry.values().contiguous()
    if entry.kind == Kind.BF16:
        return values.view(torch.int16).numpy()
    return values.numpy() if entry.kind == Kind.F32 else quantize(values.numpy(), entry.kind)


def _write_keys(
    writer: GGUFWriter,
    model: M1ForCausalLM,
    folding: Folding,
    quantization: str | None,
    vocabulary: dict[str, Any],
) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    config = model.config
    writer.add_type("model")
    if quantization:
        writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
        writer.add_quantization_version(GGML_QUANT_VERSION)
    else:
        narrow = model.dtype == torch.bfloat16
        writer.add_file_type(LlamaFileType.MOSTLY_BF16 if narrow else LlamaFileType.ALL_F32)
    writer.add_string(CONFIG_KEY, json.dumps(config.to_dict()))
    for key, value in settings(config, folding).items():
        _add(writer, f"{ARCHITECTURE}.{key}", value)
    for key, value in vocabulary.items():
        _add(writer, key, value)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


@contextmanager
def _replaced_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` if all goes well."""
    new = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
