"""The budget's book-keeping, alone: markers of one and of several tokens."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.engine.thinking import ThoughtTracker

MARKERS = {
    "one token": ((8,), (9,)),
    "several": ((1, 2), (3, 1, 2)),
    "overlapping itself": ((1, 1, 2), (3, 3, 4)),
}
BLANK = 0


def tracker_for(kind: str = "one token", **options) -> ThoughtTracker:
    opening, closing = MARKERS[kind]
    return ThoughtTracker(opening, closing, is_blank=lambda token: token == BLANK, **options)


def play(tracker: ThoughtTracker, wishes: Iterable[int]) -> list[int]:
    """What is written when the model wishes for `wishes`; a started marker is finished."""
    written = []
    for wish in wishes:
        written.append(wish if tracker.forced is None else tracker.forced)
        tracker.observe(written[-1])
    while tracker.forced is not None:
        written.append(tracker.forced)
        tracker.observe(written[-1])
    return written


def thought_of(written: list[int], opening: tuple[int, ...], closing: tuple[int, ...]):
    """(tokens of the thought or None, whether it closed), by looking at the whole reply."""
    start = 0
    while start < len(written) and written[start] == BLANK:
        start += 1
    if tuple(written[start : start + len(opening)]) != opening:
        return None, False
    rest = written[start + len(opening) :]
    for end in range(len(rest)):
        if tuple(rest[end : end + len(closing)]) == closing:
            return rest[:end], True
    return rest, False


@pytest.mark.parametrize("kind", MARKERS)
@given(data=st.data())
def test_the_law_of_the_budget(kind: str, data: st.DataObject) -> None:
    opening, closing = MARKERS[kind]
    budget = data.draw(st.none() | st.integers(0, 6))
    tokens = st.sampled_from(sorted({BLANK, 5, *opening, *closing}))
    wishes = data.draw(st.lists(tokens, max_size=30))
    if data.draw(st.booleans()):
        wishes = [*opening, *wishes]
    tracker = tracker_for(kind, budget=budget)
    written = play(tracker, wishes)
    thought, closed = thought_of(written, opening, closing)
    assert tracker.num_tokens == len(thought or ())
    assert tracker.phase == ("inside" if thought is not None and not closed else tracker.phase)
    assert tracker.phase == "after" or not closed
    if budget is not None and thought is not None:
        assert len(thought) <= budget
        assert closed or len(thought) < budget


@pytest.mark.parametrize("kind", MARKERS)
@pytest.mark.parametrize("budget", [0, 1, 4])
def test_a_thought_that_never_ends_is_closed_at_its_budget(kind: str, budget: int) -> None:
    opening, closing = MARKERS[kind]
    tracker = tracker_for(kind, budget=budget)
    written = play(tracker, [*opening, *[5] * 12])
    expected = [*opening, *[5] * budget, *closing]
    assert written == [*expected, *[5] * (len(opening) + 12 - len(expected))]
    assert tracker.num_tokens == budget and tracker.phase == "after"


@pytest.mark.parametrize("kind", MARKERS)
def test_without_a_budget_nothing_is_forced(kind: str) -> None:
    opening, closing = MARKERS[kind]
    tracker = tracker_for(kind)
    for token in (*opening, *[5] * 50, *closing, 5, *opening, 5):
        assert tracker.forced is None
        tracker.observe(token)
    assert tracker.num_tokens == 50 and tracker.phase == "after"


def test_a_closing_marker_half_written_when_the_budget_strikes_is_finished() -> None:
    tracker = tracker_for("several", budget=3)
    written = play(tracker, [1, 2, 5, 5, 3, 7, 7, 7])
    assert written == [1, 2, 5, 5, 3, 1, 2, 7]
    assert tracker.num_tokens == 2


def test_a_half_that_overlaps_itself_is_finished_from_its_longest_part() -> None:
    tracker = tracker_for("overlapping itself", budget=4)
    assert play(tracker, [1, 1, 2, 5, 3, 3, 3, 7]) == [1, 1, 2, 5, 3, 3, 3, 4]
    assert tracker.num_tokens == 2


@pytest.mark.parametrize(
    ("tail", "phase"),
    [
        ((), "before"),
        ((5, 8), "inside"),
        ((5, 8, 5), "inside"),
        ((8, 5, 9), "after"),
        ((8, 5, 9, 8), "inside"),
        ((5,), "before"),
    ],
)
def test_the_prompt_may_open_the_thought(tail: tuple[int, ...], phase: str) -> None:
    tracker = tracker_for(prompt_tail=tail, budget=2)
    assert tracker.phase == phase and tracker.opened_by_prompt == (phase == "inside")
    assert play(tracker, [5] * 4) == ([5, 5, 9, 5] if phase == "inside" else [5] * 4)


def test_a_thought_the_prompt_opened_can_be_closed_at_once() -> None:
    tracker = tracker_for("several", prompt_tail=(5, 1, 2), budget=0)
    assert play(tracker, [5] * 4) == [3, 1, 2, 5]
    assert tracker.num_tokens == 0


def test_a_marker_after_some_answer_is_answer() -> None:
    tracker = tracker_for(budget=0)
    assert play(tracker, [BLANK, 5, 8, 5]) == [BLANK, 5, 8, 5]
    assert tracker.phase == "after" and tracker.num_tokens == 0


def test_blanks_may_stand_before_a_thought_but_not_inside_its_marker() -> None:
    assert play(tracker_for("several", budget=0), [BLANK, BLANK, 1, 2]) == [0, 0, 1, 2, 3, 1, 2]
    assert play(tracker_for("several", budget=0), [1, BLANK, 2, 5]) == [1, BLANK, 2, 5]


def test_only_the_first_thought_counts() -> None:
    tracker = tracker_for(budget=2)
    assert play(tracker, [8, 5, 9, 8, 5, 5, 5]) == [8, 5, 9, 8, 5, 5, 5]
    assert tracker.num_tokens == 1


def test_a_model_that_does_not_think_is_never_stopped() -> None:
    tracker = ThoughtTracker((), (), prompt_tail=(8,), budget=0)
    assert play(tracker, [8, 5, 9]) == [8, 5, 9]
    assert tracker.phase == "after" and not tracker.opened_by_prompt
