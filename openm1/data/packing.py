"""Examples packed back to back, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from openm1.kernels.packing import PackedLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sequence; `loss_mask[t]` says whether token t is to be learned (the first never is)."""

    token_ids: Sequence[int]
    loss_mask: Sequence[bool]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.loss_mask) or len(self.token_ids) < 2:
            raise ValueError(
                f"an example has {len(self.token_ids)} tokens and {len(self.loss_mask)} mask "
                "entries; allowed is the same number, at least 2"
            )


@dataclass(frozen=True)
class PackedBatch:
    """N sequences of inputs with, at each place, the token that follows."""

    input_ids: Tensor
    """[T] int64."""
    targets: Tensor
    """[T] int64: the next token."""
    loss_mask: Tensor
    """[T] bool: whether that next token is learned."""
    layout: PackedLayout

    @cached_property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


def pack(examples: Sequence[Example], device: torch.device | str = "cpu") -> PackedBatch:
    """Inputs are each example without its last token, targets without its first."""
    inputs = [token for example in examples for token in example.token_ids[:-1]]
    targets = [token for example in examples for token in example.token_ids[1:]]
    mask = [flag for example in examples for flag in example.loss_mask[1:]]
    return PackedBatch(
        input_ids=torch.tensor(inputs, device=device),
        targets=torch.tensor(targets, device=device),
        loss_mask=torch.tensor(mask, device=device),
        layout=PackedLayout([len(e.token_ids) - 1 for e in examples], device),
    )


class HasTokens(Protocol):
    """An `Example`, or anything else that becomes one."""

    @property
    def token_ids(self) -> Sequence[int]: ...


Item = TypeVar("Item", bound=HasTokens)


def split_by_tokens(items: Iterable[Item], max_tokens: int) -> list[list[Item]]:
    """Consecutive items in groups of at most `max_tokens` inputs; a longer one stands alone."""
    groups: list[list[Item]] = []
    room = 0
    for item in items:
        size = len(item.token_ids) - 1
        if not groups or size > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(item)
        room -= size
    return groups
