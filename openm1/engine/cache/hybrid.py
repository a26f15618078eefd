"""What each running sequence has, what finished ones left behind, and the budget for both.

Nothing here touches a tensor. Contents move by orders, carried out one after the other before the
next forward pass; to be free changes no contents. So all is as if each order were done at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from openm1.engine.cache.ids import IdPool
from openm1.engine.cache.prefix import Match, PrefixTree


@dataclass(frozen=True, slots=True)
class CopyPage:
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class CopyState:
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class ClearState:
    target: int


Order = CopyPage | CopyState | ClearState


@dataclass(eq=False, kw_only=True, slots=True, weakref_slot=True)
class CachedSequence:
    """What one running sequence has. Its slot is its own, as is each page it has yet to fill."""

    pages: list[int]
    slot: int | None
    num_tokens: int
    """How many are computed."""
    num_cached: int
    """How many were at the start."""
    branch_point: int | None
    """Where it left what the cache knows, if no state was there: a snapshot there serves others."""
    epoch: int
    """Counts changes of weights; what older weights computed is never remembered."""

    @property
    def slots(self) -> list[int]:
        return [] if self.slot is None else [self.slot]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSizes:
    """What memory is made of."""

    page_tokens: int
    page_bytes: int
    """Keys and values of one page in all softmax layers; 0 if there are none, then no pages."""
    state_bytes: int
    """One sequence's state in all lightning layers; 0 if there are none, then no slots."""
    budget_bytes: int

    def __post_init__(self) -> None:
        for name, least in {"page_tokens": 1, "page_bytes": 0, "state_bytes": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is at least {least}")
        if self.budget_bytes < self.bytes_for(1):
            raise ValueError(
                f"budget_bytes is {self.budget_bytes}; one token takes {self.bytes_for(1)} bytes"
            )

    @property
    def num_states(self) -> int:
        """Slots of a sequence."""
        return int(self.state_bytes > 0)

    def num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens) if self.page_bytes else 0

    def bytes_for(self, num_tokens: int) -> int:
        """What one sequence takes that shares nothing."""
        return self.num_pages(num_tokens) * self.page_bytes + self.state_bytes

    @property
    def longest_tokens(self) -> int:
        """Of one sequence alone in the budget; for models with pages."""
        room = self.budget_bytes - self.state_bytes
        return room // self.page_bytes * self.page_tokens


class HybridCache:
    """Pages and slots of running sequences and of cached prefixes, never above the budget."""

    def __init__(self, sizes: CacheSizes) -> None:
        self.sizes = sizes
        self._pages, self._slots = IdPool(), IdPool()
        self._prefixes = PrefixTree(
            self._pages,
            self._slots,
            page_tokens=sizes.page_tokens,
            stateful=sizes.state_bytes > 0,
        )
        self._orders: list[Order] = []
        self._epoch = 0

    @property
    def pages(self) -> IdPool:
        """To be read; what it counts is this cache's business."""
        return self._pages

    @property
    def states(self) -> IdPool:
        return self._slots

    @property
    def num_bytes_in_use(self) -> int:
        return self._bytes(self._pages.num_used, self._slots.num_used)

    @property
    def num_bytes_held(self) -> int:
        """Of running sequences: the part that no eviction can free."""
        return self._bytes(self._pages.num_held, self._slots.num_held)

    @property
    def num_bytes_cached(self) -> int:
        """Of cached prefixes alone: free for whoever needs it."""
        return self.num_bytes_in_use - self.num_bytes_held

    def start(self, token_ids: list[int]) -> CachedSequence | None:
        """A sequence that has room for all of `token_ids` and begins at the longest usable prefix.

        The last token is always left to run. None, and nothing changed, when memory does not
        suffice, which cannot be when nothing else runs and `bytes_for` is within the budget.
        """
        alone = self.num_bytes_held == 0
        sequence = self._fork(self._prefixes.match(token_ids[:-1]), len(token_ids))
        if sequence is None and alone:
            # Waiting frees nothing: what lacks is the room to copy out of the prefix itself.
            sequence = self._fork(Match(), len(token_ids))
        return sequence

    def _fork(self, match: Match, num_tokens: int) -> CachedSequence | None:
        num_shared = match.num_tokens // self.sizes.page_tokens
        shared, partial = match.pages[:num_shared], match.pages[num_shared:]
        # Held before anything is taken: making room must not evict what was just found.
        self._pages.hold(match.pages)
        self._slots.hold(match.slots)
        num_pages = self.sizes.num_pages(num_tokens) - len(shared)
        sequence = None
        if self._make_room(num_pages, self.sizes.num_states):
            pages, slots = self._pages.take(num_pages), self._slots.take(self.sizes.num_states)
            for source, target in zip(partial, pages, strict=False):
                self._orders.append(CopyPage(source, target))
            for target in slots:
                order = CopyState(match.slots[0], target) if match.slots else ClearState(target)
                self._orders.append(order)
            sequence = CachedSequence(
                pages=shared + pages,
                slot=slots[0] if slots else None,
                num_tokens=match.num_tokens,
                num_cached=match.num_tokens,
                branch_point=match.num_known if match.num_known > match.num_tokens else None,
                epoch=self._epoch,
            )
        # The copies are ordered, so their sources may go.
        self._pages.drop(partial if sequence else match.pages)
        self._slots.drop(match.slots)
        return sequence

    def grow(self, sequence: CachedSequence, num_tokens: int) -> bool:
        """Room for num_tokens in all. False, and nothing changed, when memory does not suffice."""
        num_pages = self.sizes.num_pages(num_tokens) - len(sequence.pages)
        if num_pages > 0:
            if not self._make_room(num_pages, 0):
                return False
            sequence.pages += self._pages.take(num_pages)
        return True

    def advance(self, sequence: CachedSequence, num_tokens: int) -> None:
        """Says that so many more tokens are computed."""
        sequence.num_tokens += num_tokens
        assert self.sizes.num_pages(sequence.num_tokens) <= len(sequence.pages)

    def snapshot(self, sequence: CachedSequence, token_ids: list[int]) -> None:
        """Remembers what is computed of `token_ids`, with a copy of the state.

        Does nothing when there is no memory for that, or when the weights have changed.
        """
        prefix = token_ids[: sequence.num_tokens]
        is_known = self._prefixes.match(prefix).num_tokens == len(prefix)
        if is_known or sequence.epoch != self._epoch:
            return
        if not self._make_room(0, self.sizes.num_states):
            return
        slots = self._slots.take(self.sizes.num_states)
        for source, target in zip(sequence.slots, slots, strict=True):
            self._orders.append(CopyState(source, target))
        self._prefixes.insert(prefix, sequence.pages, slots)
        self._slots.drop(slots)

    def finish(self, sequence: CachedSequence, token_ids: list[int]) -> None:
        """Ends a sequence: what it has becomes a cached prefix, the state without a copy."""
        prefix = token_ids[: sequence.num_tokens]
        if sequence.epoch == self._epoch and prefix:
            self._prefixes.insert(prefix, sequence.pages, sequence.slots)
        self.release(sequence)

    def release(self, sequence: CachedSequence) -> None:
        """Ends a sequence and remembers nothing of it."""
        self._pages.drop(sequence.pages)
        self._slots.drop(sequence.slots)
        sequence.pages, sequence.slot, sequence.num_tokens = [], None, 0

    def clear(self) -> None:
        """Forgets all prefixes, as what they hold is of no use any more; sequences may run on, and
        nothing of them will be remembered."""
        self._epoch += 1
        self._prefixes.clear()

    def take_orders(self) -> list[Order]:
        """What to carry out, in this order, before the next forward pass."""
        orders, self._orders = self._orders, []
        return orders

    def take_freed(self) -> tuple[list[int], list[int]]:
        """Pages and slots that came free since the last call and still are.

        Orders may yet read them: take and carry those out first.
        """
        assert not self._orders, "take_orders comes before take_freed"
        return self._pages.take_freed(), self._slots.take_freed()

    def _make_room(self, num_pages: int, num_slots: int) -> bool:
        """Evicts prefixes until that many ids can be taken; none at all if that cannot be."""
        room = self.sizes.budget_bytes - self._bytes(num_pages, num_slots)
        if self.num_bytes_held > room:
            return False
        while self.num_bytes_in_use > room:
            self._prefixes.evict()
        return True

    def _bytes(self, num_pages: int, num_slots: int) -> int:
        return num_pages * self.sizes.page_bytes + num_slots * self.sizes.state_bytes

    def check_integrity(self, running: Iterable[CachedSequence]) -> None:
        """Asserts that all books agree, given every sequence that was started and not ended."""
        running = list(running)
        self._prefixes.check_integrity()
        assert self.num_bytes_in_use <= self.sizes.budget_bytes, "the budget is exceeded"
        pages = Counter(page for sequence in running for page in sequence.pages)
        slots = Counter(slot for sequence in running for slot in sequence.slots)
        for pool, held in ((self._pages, pages), (self._slots, slots)):
            assert {id: pool.holders(id) for id in pool.used() if pool.holders(id)} == held
            assert pool.num_held == len(held)
        for sequence in running:
            assert self.sizes.num_pages(sequence.num_tokens) <= len(sequence.pages)
            assert len(sequence.slots) == self.sizes.num_states
            for slot in sequence.slots:
                assert (self._slots.holders(slot), self._slots.keepers(slot)) == (1, 0)
            first, inside = divmod(sequence.num_tokens, self.sizes.page_tokens)
            for index, page in enumerate(sequence.pages[first:]):
                assert self._pages.holders(page) == 1, "somebody else sees what is written here"
                assert self._pages.keepers(page) == 0 or (index == 0 and inside)
