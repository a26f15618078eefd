import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from openm1.engine.cache.hybrid import (
    CachedSequence,
    CacheSizes,
    ClearState,
    CopyPage,
    CopyState,
    HybridCache,
)
from tests.engine.symbolic import SymbolicMemory, cache_of


def begin(cache: HybridCache, token_ids: list[int]) -> CachedSequence:
    sequence = cache.start(token_ids)
    assert sequence is not None
    return sequence


def remember(cache: HybridCache, token_ids: list[int]) -> None:
    """All of token_ids computed and left behind, as if one more token had been sampled."""
    sequence = begin(cache, [*token_ids, 0])
    cache.advance(sequence, len(token_ids) - sequence.num_tokens)
    cache.finish(sequence, token_ids)
    cache.take_orders()


def num_cached(cache: HybridCache, token_ids: list[int]) -> int:
    sequence = begin(cache, token_ids)
    cache.release(sequence)
    return sequence.num_cached


def test_a_cold_start_has_room_for_all_and_a_clear_state():
    cache = cache_of(page_tokens=4)
    sequence = begin(cache, [1, 2, 3, 4, 5])
    assert (sequence.pages, sequence.slot, sequence.num_tokens) == ([0, 1], 0, 0)
    assert (sequence.num_cached, sequence.branch_point) == (0, None)
    assert cache.take_orders() == [ClearState(0)] and cache.take_orders() == []
    assert cache.num_bytes_in_use == 2 * 3 + 5


def test_a_hit_shares_full_pages_and_copies_the_partial_one_and_the_state():
    cache = cache_of(page_tokens=4)
    remember(cache, [1, 2, 3, 4, 5, 6])
    sequence = begin(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert (sequence.num_cached, sequence.num_tokens) == (6, 6)
    assert (sequence.pages, sequence.slot) == ([0, 2, 3], 1)
    assert cache.take_orders() == [CopyPage(1, 2), CopyState(0, 1)]


def test_a_hit_at_a_page_boundary_copies_no_page():
    cache = cache_of(page_tokens=3)
    remember(cache, [1, 2, 3, 4, 5, 6])
    sequence = begin(cache, [1, 2, 3, 4, 5, 6, 7])
    assert (sequence.num_cached, sequence.pages) == (6, [0, 1, 2])
    assert cache.take_orders() == [CopyState(0, 1)]


def test_the_last_token_is_always_left_to_run():
    cache = cache_of()
    remember(cache, [1, 2, 3])
    assert num_cached(cache, [1, 2, 3]) == 0
    remember(cache, [1, 2])
    assert num_cached(cache, [1, 2, 3]) == 2


def test_where_a_sequence_leaves_the_known_ones_is_its_branch_point():
    cache = cache_of()
    remember(cache, [1, 2, 3, 4, 5, 6])
    sequence = begin(cache, [1, 2, 3, 9, 9])
    assert (sequence.num_cached, sequence.branch_point) == (0, 3)
    cache.advance(sequence, 3)
    cache.snapshot(sequence, [1, 2, 3, 9, 9])
    third = begin(cache, [1, 2, 3, 8, 8])
    assert (third.num_cached, third.branch_point) == (3, None)
    # Of the known tokens the last is left to run, so it is not a branch point either.
    assert begin(cache, [1, 2, 3, 4, 5]).branch_point == 4


def test_a_snapshot_is_a_copy_and_the_sequence_goes_on_in_its_page():
    cache = cache_of(page_tokens=4)
    sequence = begin(cache, [1, 2, 3, 4, 5])
    cache.take_orders()
    cache.advance(sequence, 2)
    cache.snapshot(sequence, [1, 2, 3, 4, 5])
    assert cache.take_orders() == [CopyState(sequence.slot, 1)]
    assert (sequence.pages, sequence.slot) == ([0, 1], 0)
    cache.snapshot(sequence, [1, 2, 3, 4, 5])
    assert cache.take_orders() == [], "it is there already"


def test_at_the_end_the_state_is_moved():
    cache = cache_of()
    sequence = begin(cache, [1, 2, 3])
    cache.take_orders()
    cache.advance(sequence, 2)
    used = cache.num_bytes_in_use
    cache.finish(sequence, [1, 2, 3])
    assert cache.take_orders() == []
    assert cache.num_bytes_in_use == cache.num_bytes_cached == used
    assert (sequence.pages, sequence.slot) == ([], None)


def test_what_is_remembered_already_is_not_kept_twice():
    cache = cache_of(page_tokens=2)
    sequences = [begin(cache, [1, 2, 3, 4, 5]) for _ in range(2)]
    for sequence in sequences:
        cache.advance(sequence, 4)
        cache.finish(sequence, [1, 2, 3, 4, 5])
    assert cache.num_bytes_in_use == 2 * 3 + 5


def test_nothing_computed_leaves_nothing_behind():
    cache = cache_of()
    cache.finish(begin(cache, [1, 2, 3]), [1, 2, 3])
    assert cache.num_bytes_in_use == 0
    cache.release(begin(cache, [1, 2, 3]))
    assert cache.num_bytes_in_use == 0


def test_old_weights_leave_nothing_behind():
    cache = cache_of()
    remember(cache, [1, 2])
    sequence = begin(cache, [1, 2, 3, 4])
    cache.clear()
    assert cache.num_bytes_cached == 0 and num_cached(cache, [1, 2, 3]) == 0
    cache.advance(sequence, 1)
    cache.snapshot(sequence, [1, 2, 3, 4])
    cache.finish(sequence, [1, 2, 3, 4])
    assert cache.num_bytes_in_use == 0
    remember(cache, [1, 2])
    assert num_cached(cache, [1, 2, 3]) == 2


def test_the_prefix_used_longest_ago_makes_room():
    # Each prefix takes 3 + 5 bytes: three fit.
    cache = cache_of(page_tokens=4, budget_bytes=24)
    for token in (1, 2, 3):
        remember(cache, [token] * 3)
    # A second state and a copy of the page need a second prefix's room.
    assert num_cached(cache, [1] * 4) == 3
    assert cache.num_bytes_in_use == 16
    assert [num_cached(cache, [token] * 4) for token in (3, 1)] == [3, 3]
    assert num_cached(cache, [2] * 4) == 0


def test_a_running_sequence_is_never_evicted_and_a_refusal_changes_nothing():
    cache = cache_of(page_tokens=1, page_bytes=1, state_bytes=1, budget_bytes=9)
    remember(cache, [7, 7])
    running = begin(cache, [1, 2, 3, 4])
    before = cache.num_bytes_in_use, cache.num_bytes_cached
    assert before == (8, 3)
    assert cache.start([5, 6, 7, 8]) is None
    assert not cache.grow(running, 9)
    assert len(running.pages) == 4
    assert (cache.num_bytes_in_use, cache.num_bytes_cached) == before
    assert cache.grow(running, 8)
    assert (cache.num_bytes_in_use, cache.num_bytes_cached) == (9, 0)
    cache.check_integrity([running])


def test_a_hit_waits_when_others_run_but_alone_it_starts_cold():
    # Room for two sequences, but not for a third state to copy from.
    cache = cache_of(page_bytes=0, state_bytes=1, budget_bytes=2)
    remember(cache, [1, 2])
    other = begin(cache, [8, 9])
    assert cache.start([1, 2, 3]) is None
    assert cache.num_bytes_cached == 1
    cache.release(other)
    assert num_cached(cache, [1, 2, 3]) == 2
    tight = cache_of(page_bytes=0, state_bytes=1, budget_bytes=1)
    remember(tight, [1, 2])
    assert num_cached(tight, [1, 2, 3]) == 0


def test_a_snapshot_that_finds_no_room_is_left_out():
    cache = cache_of(page_bytes=0, state_bytes=1, budget_bytes=2)
    one, two = begin(cache, [1, 2, 3]), begin(cache, [4, 5])
    cache.take_orders()
    cache.advance(one, 2)
    cache.snapshot(one, [1, 2, 3])
    assert cache.take_orders() == [] and cache.num_bytes_cached == 0
    cache.check_integrity([one, two])


def test_a_model_of_softmax_layers_alone_has_no_slots_and_hits_anywhere():
    cache = cache_of(page_tokens=4, state_bytes=0)
    remember(cache, [1, 2, 3, 4, 5, 6])
    sequence = begin(cache, [1, 2, 3, 9, 9])
    assert (sequence.slot, sequence.num_cached, sequence.branch_point) == (None, 3, None)
    assert cache.take_orders() == [CopyPage(0, sequence.pages[0])]


def test_a_model_of_lightning_layers_alone_has_no_pages():
    cache = cache_of(page_bytes=0)
    remember(cache, [1, 2, 3])
    sequence = begin(cache, [1, 2, 3, 4])
    assert (sequence.pages, sequence.slot, sequence.num_cached) == ([], 1, 3)
    assert cache.grow(sequence, 10**9) and sequence.pages == []
    assert begin(cache, [1, 2, 9]).branch_point == 2


def test_freed_ids_are_told_after_the_orders_that_read_them():
    cache = cache_of(page_tokens=4)
    sequence = begin(cache, [1, 2, 3, 4, 5])
    cache.release(sequence)
    with pytest.raises(AssertionError):
        cache.take_freed()
    cache.take_orders()
    assert cache.take_freed() == ([0, 1], [0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("page_tokens", 0), ("page_bytes", -1), ("state_bytes", -1), ("budget_bytes", 7)],
)
def test_sizes_say_what_is_wrong(name, value):
    good = {"page_tokens": 4, "page_bytes": 3, "state_bytes": 5, "budget_bytes": 8}
    CacheSizes(**good)
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        CacheSizes(**good | {name: value})


class AnyUse(RuleBasedStateMachine):
    """Whatever is done in whatever order, each sequence finds its own contents, within budget."""

    page_tokens, page_bytes, state_bytes, budget_bytes = 4, 2, 3, 40

    def __init__(self) -> None:
        super().__init__()
        self.cache = cache_of(
            page_tokens=self.page_tokens,
            page_bytes=self.page_bytes,
            state_bytes=self.state_bytes,
            budget_bytes=self.budget_bytes,
        )
        self.memory = SymbolicMemory(self.cache)
        self.running: list[tuple[CachedSequence, list[int]]] = []

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def start(self, token_ids):
        was_idle, before = not self.running, self.cache.num_bytes_in_use
        sequence = self.cache.start(token_ids)
        if sequence is None:
            fits = self.cache.sizes.bytes_for(len(token_ids)) <= self.budget_bytes
            assert not (was_idle and fits)
            assert self.cache.num_bytes_in_use == before
            return
        assert sequence.num_cached < len(token_ids)
        self.memory.begin(sequence, token_ids)
        self.running.append((sequence, list(token_ids)))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0), new=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def go_on(self, which, new):
        """Computes some of the tokens there are, and then of `new` what there is room for."""
        sequence, token_ids = self.running[which % len(self.running)]
        left = token_ids[sequence.num_tokens :][: len(new)]
        if not left:
            if not self.cache.grow(sequence, len(token_ids) + len(new)):
                return
            token_ids += new
            left = new
        self.memory.carry_out_orders()
        self.memory.run(sequence, left)
        self.cache.advance(sequence, len(left))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0))
    def snapshot(self, which):
        held = self.cache.num_bytes_held
        self.cache.snapshot(*self.running[which % len(self.running)])
        assert self.cache.num_bytes_held == held

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0))
    def finish(self, which):
        self.cache.finish(*self.running.pop(which % len(self.running)))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0))
    def release(self, which):
        self.cache.release(self.running.pop(which % len(self.running))[0])

    # Seldom: after it there is nothing to hit.
    @precondition(lambda self: len(self.running) == 3)
    @rule()
    def change_weights(self):
        self.cache.clear()
        self.memory.version += 1

    @invariant()
    def books_agree(self):
        self.cache.check_integrity([sequence for sequence, _ in self.running])
        assert self.cache.num_bytes_in_use <= self.budget_bytes

    def teardown(self):
        self.memory.carry_out_orders()
        for sequence, token_ids in self.running:
            self.memory.check(sequence)
            self.cache.finish(sequence, token_ids)
        self.cache.check_integrity([])
        assert self.cache.num_bytes_held == 0
        self.cache.clear()
        assert self.cache.num_bytes_in_use == 0


class AnyUseOfPagesOfOneToken(AnyUse):
    page_tokens = 1


class AnyUseWithoutStates(AnyUse):
    state_bytes = 0
    budget_bytes = 16


class AnyUseWithoutPages(AnyUse):
    page_bytes = 0
    budget_bytes = 12


RUNS = settings(max_examples=80, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    "machine", [AnyUse, AnyUseOfPagesOfOneToken, AnyUseWithoutStates, AnyUseWithoutPages]
)
def test_each_sequence_finds_its_own_contents_whatever_is_done(machine):
    run_state_machine_as_test(machine, settings=RUNS)
