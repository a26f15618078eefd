"""Sequences in pools that hold NaN wherever nothing was written; pages are given out at random."""

from __future__ import annotations

import random

import torch

from openm1.model.cache import CachePools, CacheView
from openm1.model.config import M1Config

NUM_SLOTS, NUM_PAGES, PAGE_TOKENS = 4, 60, 5


class PagedSequences:
    """One sequence per slot; pages are of five tokens, so that most lengths end inside one."""

    def __init__(self, config: M1Config, dtype: torch.dtype = torch.float32) -> None:
        self.pools = CachePools(
            config,
            num_pages=NUM_PAGES,
            num_slots=NUM_SLOTS,
            page_tokens=PAGE_TOKENS,
            dtype=dtype,
        )
        for pool in (self.pools.keys, self.pools.values, self.pools.states):
            pool.fill_(torch.nan)
        self.free = random.Random(0).sample(range(NUM_PAGES), NUM_PAGES)
        self.pages: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def view(self, new_tokens: dict[int, int]) -> CacheView:
        """Of the slots in this order; the new tokens count from now on."""
        past = []
        for slot, count in new_tokens.items():
            if slot not in self.lengths:
                self.pools.clear_state(slot)
                self.lengths[slot], self.pages[slot] = 0, []
            past.append(self.lengths[slot])
            self.lengths[slot] += count
            while len(self.pages[slot]) * PAGE_TOKENS < self.lengths[slot]:
                self.pages[slot].append(self.free.pop())
        return CacheView(
            self.pools,
            slots=list(new_tokens),
            page_tables=[self.pages[slot] for slot in new_tokens],
            past=past,
            new_tokens=list(new_tokens.values()),
        )

    def fork(self, source: int, target: int) -> None:
        """The target shares the source's pages but for the last, which it gets a copy of."""
        *shared, last = self.pages[source]
        self.pages[target] = [*shared, self.free.pop()]
        self.pools.copy_page(last, self.pages[target][-1])
        self.pools.copy_state(source, target)
        self.lengths[target] = self.lengths[source]
