from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openm1.data.packing import Example, pack, split_by_tokens


@st.composite
def examples(draw: st.DrawFn) -> Example:
    rows = draw(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=2, max_size=9))
    token_ids, loss_mask = zip(*rows, strict=True)
    return Example(token_ids=token_ids, loss_mask=loss_mask)


@given(st.lists(examples(), min_size=1, max_size=6))
def test_each_place_holds_a_token_the_next_one_and_whether_that_is_learned(batch: list[Example]):
    packed = pack(batch)
    rows = [
        (example.token_ids[t], example.token_ids[t + 1], example.loss_mask[t + 1])
        for example in batch
        for t in range(len(example.token_ids) - 1)
    ]
    inputs, targets, mask = packed.input_ids, packed.targets, packed.loss_mask
    assert list(zip(inputs.tolist(), targets.tolist(), mask.tolist(), strict=True)) == rows
    assert packed.layout.lengths == [len(example.token_ids) - 1 for example in batch]
    assert packed.layout.num_tokens == len(rows)
    assert packed.num_loss_tokens == sum(flag for _, _, flag in rows)
    assert (inputs.dtype, targets.dtype, mask.dtype) == (torch.int64, torch.int64, torch.bool)


@given(st.lists(examples(), max_size=12), st.integers(1, 20))
def test_groups_keep_the_order_and_are_as_full_as_they_may_be(batch: list[Example], limit: int):
    groups = split_by_tokens(batch, limit)
    assert [id(e) for group in groups for e in group] == [id(e) for e in batch]
    sizes = [[len(e.token_ids) - 1 for e in group] for group in groups]
    assert all(sum(group) <= limit or len(group) == 1 for group in sizes)
    for group, later in pairwise(sizes):
        assert sum(group) + later[0] > limit


@pytest.mark.parametrize(("tokens", "flags"), [(2, 3), (3, 2), (1, 1), (0, 0)])
def test_examples_that_teach_nothing_or_do_not_fit_are_refused(tokens: int, flags: int):
    with pytest.raises(ValueError, match=f"{tokens} tokens and {flags} mask"):
        Example(token_ids=[1] * tokens, loss_mask=[True] * flags)
