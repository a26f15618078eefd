"""Memory without tensors: each cell and each state says which tokens it was computed from.

A cell stands for a token's keys and values, and they depend on all tokens before it and on the
weights that read each of them; so does a state. Both are one number here, hashed along the way.
"""

from __future__ import annotations

from openm1.engine.cache.hybrid import (
    CachedSequence,
    CacheSizes,
    ClearState,
    CopyPage,
    CopyState,
    HybridCache,
)

START = 0
"""The state before the first token."""


def read(before: int, token: int, version: int) -> int:
    """The state after one more token."""
    return hash((before, token, version))


class SymbolicMemory:
    """Carries out a cache's orders, and knows what each sequence ought to find.

    What became free is poisoned: whoever reads it without having written it fails.
    """

    def __init__(self, cache: HybridCache) -> None:
        self.cache = cache
        self.version = 0
        self.cells: dict[tuple[int, int], int] = {}
        self.states: dict[int, int] = {}
        # The states after 0, 1, 2 ... tokens, as they should be.
        self.expected: dict[CachedSequence, list[int]] = {}

    def begin(self, sequence: CachedSequence, token_ids: list[int]) -> None:
        """A new sequence; whatever it found in the cache, today's weights must have written."""
        self.expected[sequence] = chain = [START]
        for token in token_ids[: sequence.num_tokens]:
            chain.append(read(chain[-1], token, self.version))

    def carry_out_orders(self) -> None:
        size = self.cache.sizes.page_tokens
        for order in self.cache.take_orders():
            if isinstance(order, CopyPage):
                for i in range(size):
                    self.cells.pop((order.target, i), None)
                    if (order.source, i) in self.cells:
                        self.cells[order.target, i] = self.cells[order.source, i]
            elif isinstance(order, CopyState):
                self.states[order.target] = self.states[order.source]
            else:
                assert isinstance(order, ClearState)
                self.states[order.target] = START
        pages, slots = self.cache.take_freed()
        for page in pages:
            for i in range(size):
                self.cells.pop((page, i), None)
        for slot in slots:
            self.states.pop(slot, None)

    def run(self, sequence: CachedSequence, token_ids: list[int]) -> None:
        """Reads the next tokens of a sequence, as a forward pass would."""
        self.check(sequence)
        chain = self.expected[sequence]
        size = self.cache.sizes.page_tokens
        for token in token_ids:
            position = len(chain) - 1
            chain.append(read(chain[-1], token, self.version))
            if self.cache.sizes.page_bytes:
                self.cells[sequence.pages[position // size], position % size] = chain[-1]
            if sequence.slot is not None:
                self.states[sequence.slot] = chain[-1]

    def check(self, sequence: CachedSequence) -> None:
        """Asserts that the sequence has its own tokens' contents; orders must be carried out."""
        chain = self.expected[sequence]
        assert sequence.num_tokens == len(chain) - 1
        if self.cache.sizes.page_bytes:
            size = self.cache.sizes.page_tokens
            pages = sequence.pages
            found = [self.cells.get((pages[i // size], i % size)) for i in range(len(chain) - 1)]
            assert found == chain[1:]
        if sequence.slot is not None:
            assert self.states[sequence.slot] == chain[-1]


def cache_of(
    *, page_tokens: int = 4, page_bytes: int = 3, state_bytes: int = 5, budget_bytes: int = 10**9
) -> HybridCache:
    """By default a hybrid model with room for everything."""
    return HybridCache(
        CacheSizes(
            page_tokens=page_tokens,
            page_bytes=page_bytes,
            state_bytes=state_bytes,
            budget_bytes=budget_bytes,
        )
    )
