from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.engine.cache.ids import IdPool


def test_the_lowest_free_id_goes_first():
    pool = IdPool()
    assert pool.take(5) == [0, 1, 2, 3, 4]
    pool.drop([3, 1, 4])
    assert pool.take(2) == [1, 3]
    assert pool.take(3) == [4, 5, 6]


def test_an_id_is_free_when_nobody_holds_or_keeps_it():
    pool = IdPool()
    [id] = pool.take(1)
    pool.hold([id])
    pool.keep([id])
    pool.drop([id])
    assert (pool.num_held, pool.num_used) == (1, 1)
    pool.drop([id])
    assert (pool.num_held, pool.num_used) == (0, 1)
    pool.hold([id])
    pool.forget([id])
    assert (pool.num_held, pool.num_used) == (1, 1)
    pool.drop([id])
    assert (pool.num_held, pool.num_used) == (0, 0)


def test_nobody_gives_back_what_they_do_not_have():
    pool = IdPool()
    pool.take(2)
    with pytest.raises(AssertionError):
        pool.forget([0])
    pool.keep([0])
    pool.drop([0, 1])
    with pytest.raises(AssertionError):
        pool.drop([0])
    with pytest.raises(AssertionError):
        pool.keep([1])


def test_what_was_freed_is_told_once_and_not_if_taken_again():
    pool = IdPool()
    pool.take(4)
    pool.drop([2, 0, 1])
    pool.take(1)
    assert pool.take_freed() == [1, 2]
    assert pool.take_freed() == []
    pool.drop([0])
    assert pool.take_freed() == [0]


@given(
    st.lists(st.tuples(st.sampled_from(["take", "hold", "drop", "keep", "forget"]), st.integers(0)))
)
def test_counts_are_those_of_two_counters(actions):
    pool, holders, keepers, most = IdPool(), Counter(), Counter(), 0
    for action, which in actions:
        used = sorted(+holders | +keepers)
        if action == "take":
            count = which % 4
            free = [id for id in range(len(used) + count) if id not in used][:count]
            assert pool.take(count) == free
            holders.update(free)
        else:
            books = holders if action in ("hold", "drop") else keepers
            ids = used if action in ("hold", "keep") else sorted(+books)
            if ids:
                id = ids[which % len(ids)]
                getattr(pool, action)([id])
                books[id] += 1 if action in ("hold", "keep") else -1
        used = +holders | +keepers
        most = max(most, len(used))
        assert pool.used() == set(used)
        assert max(used, default=-1) < most
        assert (pool.num_used, pool.num_held) == (len(used), len(+holders))
        for id in used:
            assert (pool.holders(id), pool.keepers(id)) == (holders[id], keepers[id])
