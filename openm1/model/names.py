"""What the tensors of a checkpoint are called, and which parameter each one is a block of.

One table per layout serves loading and saving. The published layout has 17 name patterns; the
model's own names differ from it only in that the experts of a layer are stacked.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from openm1.model.config import M1Config

Index = tuple[int | slice, ...]

EXPERTS = "block_sparse_moe.experts."
LLAMA_MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
MAX_NAMES_SHOWN = 20

# Constants that other programs store beside the weights; this model derives them from its config.
_CONSTANTS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq"
    r"|self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay))$"
)
_GATE = re.compile(r"\.(mlp|block_sparse_moe)\.gate\.weight$")


@dataclass(frozen=True, slots=True)
class Piece:
    """file_tensor[source] is parameter[target]; () is all of it."""

    source: Index
    parameter: str
    target: Index


@dataclass(frozen=True, slots=True)
class FileTensor:
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class CheckpointMismatch(ValueError):
    """A checkpoint's tensors are not those its config asks for; each one is named."""

    def __init__(
        self,
        path: str | Path,
        *,
        missing: Collection[str] = (),
        unexpected: Collection[str] = (),
        misshapen: Collection[str] = (),
    ) -> None:
        self.missing = sorted(missing)
        self.unexpected = sorted(unexpected)
        self.misshapen = sorted(misshapen)
        lines = [f"{path} does not hold the tensors its config asks for"]
        for kind in ("missing", "unexpected", "misshapen"):
            if names := getattr(self, kind):
                shown = ", ".join(names[:MAX_NAMES_SHOWN])
                rest = len(names) - MAX_NAMES_SHOWN
                lines.append(f"  {kind}: {shown}" + (f" and {rest} more" if rest > 0 else ""))
        super().__init__("\n".join(lines))


def file_tensors(model: nn.Module, layout: str) -> dict[str, FileTensor]:
    """Every tensor of a checkpoint of `model` by its name in `layout`: "published",
    "transformers" (the module names of its `minimax` classes) or "llama" (one dense expert)."""
    tensors = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        block, is_expert, matrix = name.partition(EXPERTS)
        if is_expert:
            tensors |= _expert_tensors(block, matrix, shape, layout)
        else:
            renamed = name if layout == "published" else name.replace("block_sparse_moe", "mlp")
            tensors[renamed] = FileTensor(shape, (Piece((), name, ()),))
    return tensors


def _expert_tensors(
    block: str, matrix: str, shape: tuple[int, ...], layout: str
) -> dict[str, FileTensor]:
    """Where w1, w3 [E, F, C] or w2 [E, C, F] of one layer lie."""
    parameter = f"{block}{EXPERTS}{matrix}"
    experts = range(shape[0])
    if layout == "published":
        return {
            f"{block}{EXPERTS}{e}.{matrix}.weight": FileTensor(
                shape[1:], (Piece((), parameter, (e,)),)
            )
            for e in experts
        }
    if layout == "llama":
        piece = Piece((), parameter, (0,))
        return {f"{block}mlp.{LLAMA_MATRICES[matrix]}.weight": FileTensor(shape[1:], (piece,))}
    if matrix == "w2":
        pieces = tuple(Piece((e,), parameter, (e,)) for e in experts)
        return {f"{block}mlp.experts.down_proj": FileTensor(shape, pieces)}
    if matrix == "w3":
        return {}  # It lies behind w1, in the same tensor.
    num_experts, width, size = shape
    third = f"{block}{EXPERTS}w3"
    pieces = tuple(
        piece
        for e in experts
        for piece in (
            Piece((e, slice(0, width)), parameter, (e,)),
            Piece((e, slice(width, 2 * width)), third, (e,)),
        )
    )
    return {f"{block}mlp.experts.gate_up_proj": FileTensor((num_experts, 2 * width, size), pieces)}


def detect_layout(names: Collection[str], config: M1Config) -> str:
    """The layout whose names these are, told by how they call the feed-forward block."""
    if config.num_local_experts == 1 and any(".mlp.gate_proj." in name for name in names):
        return "llama"
    return "transformers" if any(".mlp.experts." in name for name in names) else "published"


def check_tensors(
    path: str | Path,
    expected: Mapping[str, tuple[int, ...]],
    present: Mapping[str, tuple[int, ...]],
    config: M1Config,
) -> None:
    """Raises CheckpointMismatch unless `present` holds `expected`, shape by shape, and no more."""
    unexpected = [n for n in present if n not in expected and not _is_redundant(n, config)]
    missing = [name for name in expected if name not in present]
    misshapen = [
        f"{name} is {[*present[name]]} instead of {[*shape]}"
        for name, shape in expected.items()
        if name in present and present[name] != shape
    ]
    if missing or unexpected or misshapen:
        raise CheckpointMismatch(path, missing=missing, unexpected=unexpected, misshapen=misshapen)


def _is_redundant(name: str, config: M1Config) -> bool:
    """True for what the config already decides: constants, and the router of a single expert."""
    if config.num_local_experts == 1 and _GATE.search(name):
        return True
    return _CONSTANTS.search(name) is not None
