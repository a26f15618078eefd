"""What a running sequence remembers: lightning states, and the keys and values of softmax layers.

`HybridCache` holds them by slot; a forward pass sees them through a `CacheView` of the slots it
works on. Which sequence has which slot is the engine's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openm1.model.config import M1Config


class HybridCache:
    """`num_slots` sequences of any length, stored by slot.

    Lightning states are fp32 whatever the model's dtype. Key/value room grows by doubling. What is
    stored past a sequence's length is finite: masked attention multiplies it by 0.
    """

    def __init__(
        self,
        config: M1Config,
        num_slots: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.num_slots = num_slots
        heads, dim = config.num_attention_heads, config.head_dim
        state_dtype = torch.promote_types(dtype, torch.float32)
        self.states = {
            i: torch.zeros(num_slots, heads, dim, dim, dtype=state_dtype, device=device)
            for i in config.lightning_layers
        }
        shape = (num_slots, 0, config.num_key_value_heads, dim)
        self.keys = {
            i: torch.empty(shape, dtype=dtype, device=device) for i in config.softmax_layers
        }
        self.values = {i: torch.empty_like(x) for i, x in self.keys.items()}
        self.lengths = [0] * num_slots
        self._room = 0

    def reset(self, slot: int) -> None:
        """Empties a slot: nothing of what it held, NaN included, reaches its next sequence."""
        self.lengths[slot] = 0
        for table in (*self.states.values(), *self.keys.values(), *self.values.values()):
            table[slot].zero_()

    def fork(self, source: int, targets: list[int]) -> None:
        """Copies one slot's sequence into others."""
        if not targets:
            return
        length = self.lengths[source]
        for state in self.states.values():
            state[targets] = state[source].clone()
        for table in (*self.keys.values(), *self.values.values()):
            table[targets, :length] = table[source, :length].clone()
        for target in targets:
            self.lengths[target] = length

    def reserve(self, num_tokens: int) -> None:
        """Makes room for sequences of `num_tokens`."""
        if num_tokens <= self._room:
            return
        room = max(num_tokens, 2 * self._room, 64)
        for tables in (self.keys, self.values):
            for i, old in tables.items():
                tables[i] = _enlarged(old, (self.num_slots, room))
        self._room = room

    def add_slots(self, count: int) -> None:
        """Makes `count` more slots, empty; the others keep what they hold."""
        self.num_slots += count
        self.lengths += [0] * count
        for tables in (self.states, self.keys, self.values):
            for i, old in tables.items():
                tables[i] = _enlarged(old, (self.num_slots,))


def _enlarged(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A copy with larger leading dimensions, zero where `old` ends."""
    new = old.new_zeros(*shape, *old.shape[len(shape) :])
    new[tuple(slice(size) for size in old.shape[: len(shape)])] = old
    return new


class CacheView:
    """The slots one forward pass works on: row n of the batch is slot `slots[n]`.

    `past` are the lengths before the pass. `commit` after the last layer makes the new tokens
    count.
    """

    def __init__(self, cache: HybridCache, slots: list[int], new_tokens: list[int]) -> None:
        if len(slots) != len(new_tokens) or len(set(slots)) != len(slots):
            raise ValueError(f"slots {slots} must be distinct, one per sequence of {new_tokens}")
        self.cache = cache
        self.slots = slots
        self.new_tokens = new_tokens
        self.past = [cache.lengths[slot] for slot in slots]
        self.totals = [a + b for a, b in zip(self.past, new_tokens, strict=True)]
        cache.reserve(max(self.totals))
        self.device = next(iter((cache.states or cache.keys).values())).device
        self.slot_index = torch.tensor(slots, device=self.device)
        self._contiguous = slots == list(range(len(slots)))

    @property
    def is_decode(self) -> bool:
        """One new token for sequences that have a past."""
        return max(self.new_tokens) == 1 and min(self.past) > 0

    def state(self, layer: int) -> Tensor:
        """[N, H, D, D] fp32."""
        states = self.cache.states[layer]
        return states[: len(self.slots)] if self._contiguous else states[self.slot_index]

    def set_state(self, layer: int, state: Tensor) -> None:
        self.cache.states[layer][self.slot_index] = state

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        """Stores [t, G, D] new keys and values of one sequence."""
        where = slice(self.past[row], self.totals[row])
        self.cache.keys[layer][self.slots[row], where] = keys
        self.cache.values[layer][self.slots[row], where] = values

    def append_one(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores [N, G, D], one new token for every sequence."""
        where = torch.tensor(self.past, device=self.device)
        self.cache.keys[layer][self.slot_index, where] = keys
        self.cache.values[layer][self.slot_index, where] = values

    def context(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values [total, G, D] of one sequence, new tokens included."""
        slot, total = self.slots[row], self.totals[row]
        return self.cache.keys[layer][slot, :total], self.cache.values[layer][slot, :total]

    def padded_context(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values [N, L, G, D] and the mask [N, L] of what is real, L the longest."""
        longest = max(self.totals)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self._contiguous:
            rows = len(self.slots)
            keys, values = keys[:rows, :longest], values[:rows, :longest]
        else:
            keys, values = keys[self.slot_index, :longest], values[self.slot_index, :longest]
        totals = torch.tensor(self.totals, device=self.device)
        return keys, values, torch.arange(longest, device=self.device) < totals[:, None]

    def commit(self) -> None:
        for slot, total in zip(self.slots, self.totals, strict=True):
            self.cache.lengths[slot] = total
