from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.engine.cache.ids import IdPool
from openm1.engine.cache.prefix import PrefixTree

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


class Books:
    """A tree with its pools; each sequence put in has pages and a slot of its own."""

    def __init__(self, *, page_tokens: int = 4, stateful: bool = True) -> None:
        self.pages, self.slots = IdPool(), IdPool()
        self.page_tokens, self.stateful = page_tokens, stateful
        self.tree = PrefixTree(self.pages, self.slots, page_tokens=page_tokens, stateful=stateful)

    def insert(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        """The pages and the slot that were offered, which the tree may or may not keep."""
        pages = self.pages.take(-(-len(tokens) // self.page_tokens))
        slots = self.slots.take(int(self.stateful))
        self.tree.insert(tokens, pages, slots)
        self.pages.drop(pages)
        self.slots.drop(slots)
        self.tree.check_integrity()
        return pages, slots

    def hit(self, tokens: list[int]) -> int:
        return self.tree.match(tokens).num_tokens


def num_common(a, b) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def test_an_empty_tree_knows_nothing():
    match = Books().tree.match([1, 2])
    assert (match.num_tokens, match.num_known, match.pages, match.slots) == (0, 0, [], [])


def test_states_are_hit_where_they_were_taken_and_tokens_known_further():
    books = Books(page_tokens=2)
    pages, slots = books.insert([1, 2, 3, 4, 5])
    match = books.tree.match([1, 2, 3, 4, 5, 6])
    assert (match.num_tokens, match.num_known, match.pages, match.slots) == (5, 5, pages, slots)
    match = books.tree.match([1, 2, 3, 9])
    assert (match.num_tokens, match.num_known, match.pages, match.slots) == (0, 3, [], [])


def test_without_states_any_token_is_hit():
    books = Books(page_tokens=2, stateful=False)
    pages, _ = books.insert([1, 2, 3, 4, 5])
    match = books.tree.match([1, 2, 3, 9])
    assert (match.num_tokens, match.num_known, match.pages) == (3, 3, pages[:2])


def test_a_page_that_a_split_cuts_serves_both_halves():
    books = Books(page_tokens=4)
    pages, slots = books.insert([1, 2, 3, 4, 5, 6, 7])
    _, inner_slots = books.insert([1, 2, 3, 4, 5])
    assert books.pages.keepers(pages[0]) == 1 and books.pages.keepers(pages[1]) == 2
    match = books.tree.match([1, 2, 3, 4, 5, 9])
    assert (match.num_tokens, match.pages, match.slots) == (5, pages, inner_slots)
    match = books.tree.match([1, 2, 3, 4, 5, 6, 7])
    assert (match.num_tokens, match.pages, match.slots) == (7, pages, slots)


def test_a_split_between_pages_divides_them():
    books = Books(page_tokens=2)
    pages, _ = books.insert([1, 2, 3, 4, 5])
    books.insert([1, 2])
    assert [books.pages.keepers(page) for page in pages] == [1, 1, 1]
    assert books.tree.match([1, 2, 3, 4, 5]).pages == pages


def test_behind_a_fork_each_branch_has_its_own_page_of_the_straddling_two():
    books = Books(page_tokens=4)
    first, _ = books.insert([1, 2, 3, 4, 5, 6])
    second, _ = books.insert([1, 2, 3, 4, 5, 7])
    assert books.tree.match([1, 2, 3, 4, 5, 6]).pages == first
    # The full page is the tree's; ours is not kept beside it.
    assert books.tree.match([1, 2, 3, 4, 5, 7]).pages == [first[0], second[1]]
    assert second[0] not in books.pages.used()


def test_many_nodes_inside_one_page():
    books = Books(page_tokens=8)
    pages = [books.insert([1, 2, 3, 4][:length])[0] for length in (1, 2, 3, 4)]
    for length in (1, 2, 3, 4):
        assert books.tree.match([1, 2, 3, 4][:length]).pages == pages[length - 1]


def test_a_second_snapshot_of_one_prefix_is_not_kept():
    books = Books()
    _, first = books.insert([1, 2])
    _, second = books.insert([1, 2])
    assert books.slots.used() == set(first)
    assert books.tree.match([1, 2]).slots == first != second


def test_the_leaf_used_longest_ago_goes_first():
    books = Books(page_tokens=2)
    for token in (1, 2, 3):
        books.insert([token] * 4)
    assert books.hit([1] * 4) == 4
    books.tree.evict()
    assert [books.hit([token] * 4) for token in (1, 2, 3)] == [4, 0, 4]
    assert (books.pages.num_used, books.slots.num_used) == (4, 2)


def test_an_inner_snapshot_goes_alone_and_a_leaf_takes_what_nobody_can_hit():
    books = Books(page_tokens=2)
    books.insert([1, 2])
    books.insert([1, 2, 3, 4])
    books.tree.evict()
    assert (books.pages.num_used, books.slots.num_used) == (2, 1)
    assert (books.hit([1, 2]), books.hit([1, 2, 3, 4])) == (0, 4)
    books.tree.evict()
    assert (books.pages.num_used, books.slots.num_used) == (0, 0)


def test_without_states_the_stem_outlives_its_branches():
    books = Books(page_tokens=2, stateful=False)
    books.insert([1, 2, 3, 4])
    books.insert([1, 2, 5, 6])
    books.insert([7, 8])
    assert books.hit([1, 2]) == 2
    books.tree.evict()
    assert [books.hit([1, 2, 3]), books.hit([1, 2, 5])] == [2, 3]
    books.tree.evict()
    # The other branch was used last: the oldest leaf is elsewhere.
    assert [books.hit([7, 8]), books.hit([1, 2, 5, 6])] == [0, 4]
    books.tree.evict()
    assert books.hit([1, 2, 5, 6]) == 2
    books.tree.evict()
    assert books.pages.num_used == 0


@pytest.mark.parametrize("page_tokens", [1, 3])
@given(
    actions=st.lists(st.tuples(st.sampled_from(["insert", "match", "evict"]), TOKENS), max_size=30)
)
def test_snapshots_are_remembered_like_a_list_in_order_of_use(page_tokens, actions):
    books = Books(page_tokens=page_tokens)
    remembered: OrderedDict[tuple[int, ...], None] = OrderedDict()
    for action, tokens in actions:
        if action == "insert":
            books.insert(tokens)
            remembered[tuple(tokens)] = None
            remembered.move_to_end(tuple(tokens))
        elif action == "match":
            match = books.tree.match(tokens)
            fitting = [p for p in remembered if p == tuple(tokens[: len(p)])]
            best = max(fitting, key=len, default=())
            assert match.num_tokens == len(best)
            assert len(match.pages) == -(-len(best) // page_tokens)
            assert match.num_known == max((num_common(p, tokens) for p in remembered), default=0)
            if best:
                remembered.move_to_end(best)
        elif remembered:
            books.tree.evict()
            remembered.popitem(last=False)
        books.tree.check_integrity()
        assert books.slots.num_used == len(remembered)
    books.tree.clear()
    assert books.pages.num_used == books.slots.num_used == 0


@given(st.lists(TOKENS, max_size=12), TOKENS, st.integers(1, 4))
def test_without_states_the_longest_common_prefix_is_hit(sequences, tokens, page_tokens):
    books = Books(page_tokens=page_tokens, stateful=False)
    for sequence in sequences:
        books.insert(sequence)
    match = books.tree.match(tokens)
    longest = max((num_common(sequence, tokens) for sequence in sequences), default=0)
    assert match.num_tokens == match.num_known == longest
    assert len(match.pages) == -(-longest // page_tokens)
    while books.pages.num_used:
        books.tree.evict()
        books.tree.check_integrity()
