"""Ids of pages and of slots: which are free, and who refers to the others."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class IdPool:
    """Numbers from 0 upwards with counted references of two kinds.

    Running sequences *hold* an id, cached prefixes *keep* it; it is free again when nobody does
    either. The lowest free id is taken first, so every id is below the largest number of ids ever
    used at once: whoever bounds their number bounds the ids.
    """

    def __init__(self) -> None:
        self._holders: list[int] = []
        self._keepers: list[int] = []
        self._free: list[int] = []
        self._freed: set[int] = set()
        self.num_held = 0
        """Ids that some running sequence holds."""

    @property
    def num_used(self) -> int:
        return len(self._holders) - len(self._free)

    def take(self, count: int) -> list[int]:
        """Free ids, each now held once."""
        taken = [heapq.heappop(self._free) for _ in range(min(count, len(self._free)))]
        self._freed.difference_update(taken)
        unseen = range(len(self._holders), len(self._holders) + count - len(taken))
        self._holders += [0] * len(unseen)
        self._keepers += [0] * len(unseen)
        taken += unseen
        self.hold(taken)
        return taken

    def hold(self, ids: Iterable[int]) -> None:
        for id in ids:
            self.num_held += self._holders[id] == 0
            self._holders[id] += 1

    def drop(self, ids: Iterable[int]) -> None:
        """Undoes `hold`."""
        for id in ids:
            assert self._holders[id] > 0, f"id {id} is dropped but nobody holds it"
            self._holders[id] -= 1
            self.num_held -= self._holders[id] == 0
            self._free_if_unused(id)

    def keep(self, ids: Iterable[int]) -> None:
        for id in ids:
            assert self.holders(id) + self.keepers(id) > 0, f"id {id} is kept but free"
            self._keepers[id] += 1

    def forget(self, ids: Iterable[int]) -> None:
        """Undoes `keep`."""
        for id in ids:
            assert self._keepers[id] > 0, f"id {id} is forgotten but nobody keeps it"
            self._keepers[id] -= 1
            self._free_if_unused(id)

    def holders(self, id: int) -> int:
        return self._holders[id]

    def keepers(self, id: int) -> int:
        return self._keepers[id]

    def used(self) -> set[int]:
        return set(range(len(self._holders))) - set(self._free)

    def take_freed(self) -> list[int]:
        """What became free since the last call and still is."""
        freed, self._freed = sorted(self._freed), set()
        return freed

    def _free_if_unused(self, id: int) -> None:
        if self._holders[id] == self._keepers[id] == 0:
            heapq.heappush(self._free, id)
            self._freed.add(id)
