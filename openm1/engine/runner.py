"""Who computes: the seam between the engine's bookkeeping and a model on some device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from openm1.engine.cache.hybrid import CachedSequence, ClearState, CopyPage, CopyState, Order
from openm1.engine.draw import sample_plain
from openm1.kernels.packing import PackedLayout
from openm1.model.cache import CachePools, CacheView
from openm1.model.m1 import M1ForCausalLM


class Runner(Protocol):
    """Runs a model over sequences whose pages and slots the scheduler has given out.

    Nothing is committed here: a sequence has as many tokens as before until the scheduler says so.
    """

    pools: CachePools

    def apply(self, orders: Sequence[Order]) -> None:
        """Copies and clears, in the order given."""
        ...

    def prefill(self, pieces: list[tuple[CachedSequence, list[int]]]) -> None:
        """Computes the next tokens of each sequence; no logits."""
        ...

    def decode(self, token_ids: list[int], sequences: list[CachedSequence]) -> Tensor:
        """Computes one token of each sequence; fp32 logits [S, V] (fp64 for an fp64 model)."""
        ...

    def sample(
        self, logits: Tensor, temperature: Tensor, draws: Tensor, given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `draw.sample_plain`."""
        ...

    def weights_changed(self) -> None:
        """The model's parameters were written to: what was derived from them is stale."""
        ...


class TorchRunner:
    """The model as it is, in any dtype on any device: the reference."""

    def __init__(
        self, model: M1ForCausalLM, pools: CachePools, *, record_experts: bool = False
    ) -> None:
        """With `record_experts`, `experts` has after each call the choices of its tokens."""
        self.model = model
        self.pools = pools
        self.record_experts = record_experts
        self.experts: list[bytes] = []

    def apply(self, orders: Sequence[Order]) -> None:
        apply_orders(self.pools, orders)

    def prefill(self, pieces: list[tuple[CachedSequence, list[int]]]) -> None:
        sequences = [sequence for sequence, _ in pieces]
        self._run(sequences, [ids for _, ids in pieces])

    def decode(self, token_ids: list[int], sequences: list[CachedSequence]) -> Tensor:
        return self.model.logits(self._run(sequences, [[token] for token in token_ids]))

    def sample(
        self, logits: Tensor, temperature: Tensor, draws: Tensor, given: Tensor
    ) -> tuple[Tensor, Tensor]:
        return sample_plain(logits, temperature, draws, given)

    def weights_changed(self) -> None:
        pass

    def _run(self, sequences: list[CachedSequence], pieces: list[list[int]]) -> Tensor:
        """Hidden states [T, C] of all new tokens."""
        device = self.model.device
        ids = torch.tensor([token for piece in pieces for token in piece], device=device)
        layout = PackedLayout([len(piece) for piece in pieces], device)
        view = view_of(self.pools, sequences, layout.lengths)
        seen: list[Tensor] | None = [] if self.record_experts else None
        hidden = self.model.model(ids, layout, view, seen=seen).hidden
        if seen is not None:
            self.experts = [bytes(row) for row in torch.cat(seen, 1).tolist()]
        return hidden


def view_of(
    pools: CachePools, sequences: Sequence[CachedSequence], new_tokens: list[int]
) -> CacheView:
    """What a forward pass sees of `sequences`."""
    return CacheView(
        pools,
        # Without lightning layers there are no slots, and nothing is read by them.
        slots=[0 if s.slot is None else s.slot for s in sequences],
        page_tables=[s.pages for s in sequences],
        past=[s.num_tokens for s in sequences],
        new_tokens=new_tokens,
    )


def apply_orders(pools: CachePools, orders: Sequence[Order]) -> None:
    for order in orders:
        if isinstance(order, CopyPage):
            pools.copy_page(order.source, order.target)
        elif isinstance(order, CopyState):
            pools.copy_state(order.source, order.target)
        else:
            assert isinstance(order, ClearState)
            pools.clear_state(order.target)
