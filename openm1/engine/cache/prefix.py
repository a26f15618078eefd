"""Prefixes that need not be computed again: one radix tree of tokens, pages and snapshots.

An edge is a run of tokens. The node below it keeps the pages that its tokens lie in, and at most
one slot: a snapshot of the lightning state after its last token. Pages can be shared at any token,
a state only where a snapshot was taken, so a hit is the deepest node that has one. A model without
lightning layers (not `stateful`) hits at any token.

A page is valid for a node up to the node's last token; what lies behind may belong to anybody. The
page in which a node starts is valid from its own first token on, so along a path the deepest node
that has a page is the one to ask for it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from openm1.engine.cache.ids import IdPool


@dataclass(eq=False, slots=True)
class _Node:
    tokens: list[int] = field(default_factory=list)
    start: int = 0
    pages: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    """The snapshot: empty, or one slot."""
    parent: _Node | None = None
    children: dict[int, _Node] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """What the tree knows of some tokens."""

    num_tokens: int = 0
    """Length of the longest prefix that can be used."""
    pages: list[int] = field(default_factory=list)
    """Covers num_tokens; the last page may hold other tokens behind them."""
    slots: list[int] = field(default_factory=list)
    """The state after num_tokens, where there is one."""
    num_known: int = 0
    """Length of the longest prefix that is in the tree, with or without a state at its end."""


class PrefixTree:
    """Keeps pages and slots of two pools, and forgets the least recently used when told to."""

    def __init__(self, pages: IdPool, slots: IdPool, *, page_tokens: int, stateful: bool) -> None:
        self._pages, self._slots = pages, slots
        self._page_tokens = page_tokens
        self._stateful = stateful
        self._root = _Node()
        # The nodes a match may end at, least recently used first. Without states that is any node,
        # and using one uses those above it, a moment later: a node is older than its parent, and
        # the oldest of all is a leaf.
        self._usable: OrderedDict[_Node, None] = OrderedDict()

    def match(self, tokens: list[int]) -> Match:
        """The longest usable prefix of `tokens`, which counts as used."""
        node, known = self._walk(tokens)
        length = known
        if self._stateful:
            while node.parent is not None and (not node.slots or node.end > known):
                node = node.parent
            length = node.end
        self._touch(node)
        pages = self._pages_along(node, length)
        return Match(num_tokens=length, pages=pages, slots=node.slots[:], num_known=known)

    def insert(self, tokens: list[int], pages: list[int], slots: list[int]) -> None:
        """Remembers `tokens`, which is used now. `pages` covers them; `slots` has their state.

        What the tree has already stays, and its counterpart among the arguments is not kept.
        """
        node, known = self._walk(tokens)
        if known < node.end:
            node = self._split(node, known)
        if known < len(tokens):
            first, last = self._page_range(known, len(tokens))
            leaf = _Node(tokens[known:], known, pages[first:last], [], node)
            self._pages.keep(leaf.pages)
            node.children[tokens[known]] = leaf
            node = leaf
        if not node.slots:
            node.slots = slots[:]
            self._slots.keep(slots)
        self._touch(node)

    def evict(self) -> None:
        """Forgets what was used longest ago: a snapshot, or a leaf with all it has."""
        node, _ = self._usable.popitem(last=False)
        self._slots.forget(node.slots)
        node.slots = []
        # Nothing can hit a node that is not usable; it is there for the sake of those below.
        while node.parent is not None and not node.children and node not in self._usable:
            self._pages.forget(node.pages)
            del node.parent.children[node.tokens[0]]
            node = node.parent

    def clear(self) -> None:
        while self._usable:
            self.evict()

    def _walk(self, tokens: list[int]) -> tuple[_Node, int]:
        """How many tokens the tree knows, and the node on whose edge (or at whose end) that is."""
        node = self._root
        while node.end < len(tokens) and (child := node.children.get(tokens[node.end])):
            same = _num_common(child.tokens, tokens[child.start : child.end])
            if same < len(child.tokens):
                return child, child.start + same
            node = child
        return node, node.end

    def _split(self, lower: _Node, at: int) -> _Node:
        """A new node that ends at token `at` of the sequence, inside the edge of `lower`."""
        assert lower.parent is not None
        page, cut = lower.start // self._page_tokens, at - lower.start
        first, last = self._page_range(lower.start, at)
        upper = _Node(
            lower.tokens[:cut], lower.start, lower.pages[: last - first], [], lower.parent
        )
        lower.parent.children[upper.tokens[0]] = upper
        upper.children[lower.tokens[cut]] = lower
        lower.parent = upper
        lower.tokens, lower.start = lower.tokens[cut:], at
        lower.pages = lower.pages[at // self._page_tokens - page :]
        if at % self._page_tokens:
            # Both halves have tokens in the page that was cut.
            self._pages.keep(lower.pages[:1])
        return upper

    def _touch(self, node: _Node) -> None:
        while node.parent is not None:
            self._usable[node] = None
            self._usable.move_to_end(node)
            if self._stateful:
                return
            node = node.parent

    def _pages_along(self, node: _Node, length: int) -> list[int]:
        pieces: list[list[int]] = []
        last = self._page_range(0, length)[1]
        while node.parent is not None:
            first = node.start // self._page_tokens
            pieces.append(node.pages[: last - first])
            node, last = node.parent, first
        return [page for piece in reversed(pieces) for page in piece]

    def _page_range(self, start: int, end: int) -> tuple[int, int]:
        """Which pages of a sequence the tokens from `start` to before `end` lie in."""
        return start // self._page_tokens, -(-end // self._page_tokens)

    def check_integrity(self) -> None:
        """Asserts that the tree is one, and keeps what the pools say is kept."""
        pages: Counter[int] = Counter()
        slots: Counter[int] = Counter()
        nodes = list(self._nodes())
        for node in nodes:
            pages.update(node.pages)
            slots.update(node.slots)
            first, last = self._page_range(node.start, node.end)
            assert len(node.pages) in (0, last - first), "a node's pages do not cover its tokens"
            assert node.tokens and node.parent and node.start == node.parent.end
            assert node.parent.children[node.tokens[0]] is node
            assert (node in self._usable) == (bool(node.slots) or not self._stateful)
            assert node in self._usable or node.children, "a leaf that nothing can hit"
        assert set(self._usable) <= set(nodes), "a node that is not in the tree"
        for pool, kept in ((self._pages, pages), (self._slots, slots)):
            assert {id: pool.keepers(id) for id in pool.used() if pool.keepers(id)} == kept

    def _nodes(self) -> Iterator[_Node]:
        unseen = [*self._root.children.values()]
        while unseen:
            node = unseen.pop()
            unseen += node.children.values()
            yield node


def _num_common(a: list[int], b: list[int]) -> int:
    """How many leading tokens are the same."""
    same, differ = 0, min(len(a), len(b))
    if a[:differ] == b[:differ]:
        return differ
    # By halves, because comparing slices is far quicker than comparing tokens.
    while differ - same > 1:
        middle = (same + differ) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            differ = middle
    return same
