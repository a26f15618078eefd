"""What running sequences remember, as tensors: key/value pages and lightning states.

`CachePools` holds the pages and the states of all sequences, by id; a forward pass sees those of
its own sequences through a `CacheView`. Which sequence has which ids is the engine's business.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openm1.model.config import M1Config
from openm1.model.size import PAGE_TOKENS


class CachePools:
    """Pages of tokens in all softmax layers, and slots of one state in all lightning layers.

    On the CPU memory is only reserved: what is never written takes no room, so that both counts may
    cover the whole budget. What a page or a slot holds before it is written is undefined and may be
    NaN; nothing of it reaches a result, except that a sequence starts from the state in its slot.
    """

    def __init__(
        self,
        config: M1Config,
        *,
        num_pages: int,
        num_slots: int,
        page_tokens: int = PAGE_TOKENS,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(num_pages, num_slots) < 0 or page_tokens < 1:
            raise ValueError(
                f"num_pages is {num_pages}, num_slots {num_slots}, page_tokens {page_tokens}; "
                "allowed are 0, 0 and 1 or more"
            )
        self.config = config
        self.num_pages, self.num_slots, self.page_tokens = num_pages, num_slots, page_tokens
        self.device = torch.device(device)
        heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.softmax_index = {layer: i for i, layer in enumerate(config.softmax_layers)}
        self.lightning_index = {layer: i for i, layer in enumerate(config.lightning_layers)}
        pages = (len(self.softmax_index), num_pages, page_tokens, groups, dim)
        states = (num_slots, len(self.lightning_index), heads, dim, dim)
        self._keys = _Reserved(pages, dtype, self.device)
        self._values = _Reserved(pages, dtype, self.device)
        self._states = _Reserved(states, _state_dtype(dtype), self.device)
        self.keys: Tensor = self._keys.tensor
        """[softmax layers, pages, page_tokens, G, D] in the model's dtype."""
        self.values: Tensor = self._values.tensor
        self.states: Tensor = self._states.tensor
        """[slots, lightning layers, H, D, D] fp32 (fp64 for fp64 models)."""

    def copy_page(self, source: int, target: int) -> None:
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def copy_state(self, source: int, target: int) -> None:
        self.states[target] = self.states[source]

    def clear_state(self, target: int) -> None:
        """The state before the first token."""
        self.states[target].zero_()

    def release(self, page_ids: Iterable[int], slot_ids: Iterable[int]) -> None:
        """Gives the memory of unused pages and slots back to the system, as far as it takes it.

        What they held is lost. Only whole pages of the operating system can be given back, so long
        runs of ids release more than the same number of scattered ones.
        """
        pages = list(_runs(page_ids))
        for layer in range(len(self.softmax_index)):
            base = layer * self.num_pages
            for first, count in pages:
                self._keys.release(base + first, count, self.keys[0, 0].nbytes)
                self._values.release(base + first, count, self.values[0, 0].nbytes)
        if self.lightning_index:
            for first, count in _runs(slot_ids):
                self._states.release(first, count, self.states[0].nbytes)

    @staticmethod
    def page_bytes(config: M1Config, page_tokens: int, dtype: torch.dtype) -> int:
        """Of one page in all softmax layers; 0 for a model without any."""
        per_token = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
        return len(config.softmax_layers) * page_tokens * per_token

    @staticmethod
    def state_bytes(config: M1Config, dtype: torch.dtype) -> int:
        """Of one slot; 0 for a model without lightning layers."""
        per_layer = config.num_attention_heads * config.head_dim**2 * _state_dtype(dtype).itemsize
        return len(config.lightning_layers) * per_layer


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _runs(ids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Consecutive ids as (first, count)."""
    first, count = 0, 0
    for i in sorted(ids):
        if count and i == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = i, 1
    if count:
        yield first, count


class _Reserved:
    """A tensor whose memory the system gives out as it is first touched."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        num_bytes = math.prod(shape) * dtype.itemsize
        self._memory: mmap.mmap | None = None
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            if device.type == "cpu" and num_bytes and hasattr(mmap, "MAP_ANONYMOUS"):
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
                self._memory = mmap.mmap(-1, num_bytes, flags=flags)
                self.tensor = torch.frombuffer(self._memory, dtype=dtype).view(shape)
            else:
                self.tensor = torch.empty(shape, dtype=dtype, device=device)

    def release(self, first: int, count: int, item_bytes: int) -> None:
        """Gives back what lies wholly inside `count` items from the one numbered `first`."""
        # macOS frees memory at once on FREE only, and on Linux FREE waits until memory is short.
        advice = getattr(mmap, "MADV_FREE" if sys.platform == "darwin" else "MADV_DONTNEED", None)
        if self._memory is None or advice is None:
            return
        size = mmap.PAGESIZE
        start = -(-first * item_bytes // size) * size
        stop = (first + count) * item_bytes // size * size
        if stop > start:
            self._memory.madvise(advice, start, stop - start)


class CacheView:
    """What one forward pass sees: row n of the packed batch has slot and page table n.

    Sequence n has `past[n]` tokens in the cache and `new_tokens[n]` new ones, and page table n
    covers both. `slots` are not looked at without lightning layers, nor are `page_tables` without
    softmax layers. Nothing is committed: to forget the new tokens is to count them no longer, and
    to restore the states.
    """

    def __init__(
        self,
        pools: CachePools,
        *,
        slots: list[int],
        page_tables: list[list[int]],
        past: list[int],
        new_tokens: list[int],
    ) -> None:
        self.pools, self.device = pools, pools.device
        self.slots, self.page_tables, self.past, self.new_tokens = (
            slots,
            page_tables,
            past,
            new_tokens,
        )
        self.totals = [a + b for a, b in zip(past, new_tokens, strict=True)]
        if pools.lightning_index:
            self._check_slots()
            self._slot_index = torch.tensor(slots, device=self.device)
            # Slots side by side are read in place.
            first = slots[0]
            self._slot_run = slots == list(range(first, first + len(slots)))
        if pools.softmax_index:
            self._check_pages()
            self._tables = [torch.tensor(table, device=self.device) for table in page_tables]
            self._where = self._flat_places()

    def _check_slots(self) -> None:
        slots, most = self.slots, self.pools.num_slots
        if len(slots) != len(self.totals) or len(set(slots)) != len(slots):
            raise ValueError(f"slots {slots} must be distinct, one per sequence of {self.totals}")
        if min(slots) < 0 or max(slots) >= most:
            raise ValueError(f"slots are {slots}; allowed are 0 to {most - 1}")

    def _check_pages(self) -> None:
        size, most = self.pools.page_tokens, self.pools.num_pages
        for table, total in zip(self.page_tables, self.totals, strict=True):
            if len(table) * size < total:
                raise ValueError(f"{len(table)} pages of {size} tokens cannot hold {total} tokens")
            if min(table) < 0 or max(table) >= most:
                raise ValueError(f"page ids {min(table)} to {max(table)}; allowed 0 to {most - 1}")

    def _flat_places(self) -> Int[Tensor, " T"]:
        """Where each new token's keys and values go: page * page_tokens + offset."""
        size = self.pools.page_tokens
        places = []
        for table, past, total in zip(self._tables, self.past, self.totals, strict=True):
            at = torch.arange(past, total, device=self.device)
            places.append(table[at // size] * size + at % size)
        return torch.cat(places)

    @property
    def is_decode(self) -> bool:
        """One new token for each sequence."""
        return max(self.new_tokens) == 1

    @property
    def positions(self) -> Int[Tensor, " T"]:
        """Of the new tokens, each in its own sequence."""
        return torch.cat(
            [
                torch.arange(past, total, device=self.device)
                for past, total in zip(self.past, self.totals, strict=True)
            ]
        )

    def append(
        self, layer: int, keys: Float[Tensor, "T G D"], values: Float[Tensor, "T G D"]
    ) -> None:
        """Stores the new tokens of all sequences."""
        for table, new in zip(self.pages(layer), (keys, values), strict=True):
            table.flatten(0, 1).index_copy_(0, self._where, new)

    def pages(self, layer: int) -> tuple[Float[Tensor, "P p G D"], Float[Tensor, "P p G D"]]:
        """Keys and values of a softmax layer: all P pages of p tokens."""
        index = self.pools.softmax_index[layer]
        return self.pools.keys[index], self.pools.values[index]

    def page_table(self, row: int) -> Int[Tensor, " P"]:
        """Pages of one sequence, in order."""
        return self._tables[row]

    def padded_page_tables(self) -> tuple[Int[Tensor, "S P"], Int[Tensor, " S"]]:
        """Pages of all sequences, padded with some page, and how many tokens each sequence has."""
        size = self.pools.page_tokens
        table = torch.nn.utils.rnn.pad_sequence(
            [t[: -(-n // size)] for t, n in zip(self._tables, self.totals, strict=True)],
            batch_first=True,
        )
        return table, torch.tensor(self.totals, device=self.device)

    def state(self, layer: int) -> Float[Tensor, "N H D D"]:
        """Of each sequence before the new tokens; may be the pool's own memory."""
        states = self.pools.states[:, self.pools.lightning_index[layer]]
        if self._slot_run:
            return states[self.slots[0] : self.slots[0] + len(self.slots)]
        return states.index_select(0, self._slot_index)

    def set_state(self, layer: int, state: Float[Tensor, "N H D D"]) -> None:
        """Stores the state of each sequence after the new tokens."""
        states = self.pools.states[:, self.pools.lightning_index[layer]]
        if self._slot_run:
            states[self.slots[0] : self.slots[0] + len(self.slots)] = state
        else:
            states.index_copy_(0, self._slot_index, state)
