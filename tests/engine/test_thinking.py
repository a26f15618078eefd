"""The budget's book-keeping, alone: markers of one and of several tokens."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm1.engine.thinking import ThoughtTracker, default_grace, ends_sentence

MARKERS = {
    "one token": ((8,), (9,)),
    "several": ((1, 2), (3, 1, 2)),
    "overlapping itself": ((1, 1, 2), (3, 3, 4)),
}
BLANK, STOP = 0, 6
"""A token of blanks, and one that ends a sentence."""


def tracker_for(kind: str = "one token", **options) -> ThoughtTracker:
    opening, closing = MARKERS[kind]
    return ThoughtTracker(
        opening,
        closing,
        is_blank=lambda token: token == BLANK,
        ends_sentence=lambda token: token == STOP,
        **options,
    )


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


def landed(wishes: list[int], budget: int, grace: int, message: list[int]) -> tuple[list[int], str]:
    """What becomes of a thought, and who ended it, markers being single tokens."""
    room = grace - len(message) if len(message) <= grace else grace
    thought: list[int] = []
    for wish in wishes:
        spent = len(thought) >= budget
        if spent and (not thought or thought[-1] == STOP or len(thought) == budget + room):
            return thought + (message if len(message) <= grace else []), "budget"
        if wish == MARKERS["one token"][1][0]:
            return thought, "model"
        thought.append(wish)
    raise AssertionError("too few wishes")


@given(
    budget=st.integers(1, 8),
    grace=st.integers(0, 8),
    message=st.lists(st.sampled_from([5, STOP]), max_size=5),
    wishes=st.lists(st.sampled_from([5, 5, 5, 5, 4, STOP, 9]), min_size=17, max_size=17),
)
def test_a_landing_is_the_references(budget, grace, message, wishes) -> None:
    thought, end = landed(wishes, budget, grace, message)
    tracker = tracker_for(prompt_tail=(8,), budget=budget, grace=grace, message=message)
    written = play(tracker, [*wishes, 5])
    assert written[: len(thought) + 1] == [*thought, 9]
    assert (tracker.num_tokens, tracker.thought_end) == (len(thought), end)
    assert tracker.answer_start == len(thought) + 1
    assert len(thought) <= budget + grace


@pytest.mark.parametrize("kind", MARKERS)
@given(data=st.data())
def test_the_law_of_the_budget_and_its_grace(kind: str, data: st.DataObject) -> None:
    """Whatever the model writes, half closing markers and all."""
    opening, closing = MARKERS[kind]
    budget, grace = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))
    # Some of a marker may stand in the message, but not a whole one.
    tokens = st.sampled_from(sorted({BLANK, 5, STOP, *opening, *closing}))
    message = data.draw(st.lists(tokens, max_size=4))
    ending = [*message, *closing]
    if any(tuple(ending[i : i + len(closing)]) == closing for i in range(len(message))):
        return
    free = data.draw(st.lists(tokens, max_size=8))
    wishes = [*opening, *free, *data.draw(st.lists(st.just(5), min_size=20, max_size=20))]
    tracker = tracker_for(kind, budget=budget, grace=grace, message=message)
    written = play(tracker, wishes)
    thought, closed = thought_of(written, opening, closing)
    assert thought is not None and closed
    assert len(thought) <= budget + (grace if budget else 0)
    assert tracker.num_tokens == len(thought) and tracker.phase == "after"
    start = len(opening) + len(thought) + len(closing)
    assert tracker.answer_start == start
    # After the thought nothing is forced: the model has its own way.
    assert written[start:] == wishes[start:]
    if tracker.thought_end == "model":
        assert written[:start] == wishes[:start]
    else:
        # Half a marker that was completed is no thought, so it may fall short of the budget.
        assert tracker.thought_end == "budget" and len(thought) > budget - len(closing)


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
    tracker = ThoughtTracker((), (), prompt_tail=(8,), budget=0, message=(5,))
    assert play(tracker, [8, 5, 9]) == [8, 5, 9]
    assert tracker.phase == "after" and not tracker.opened_by_prompt


def test_a_thought_lands_at_the_first_sentence_end_past_its_budget() -> None:
    tracker = tracker_for(budget=3, grace=9, message=(2, 3))
    wishes = [8, STOP, 5, 5, 5, STOP, 5, 5, 5]
    assert play(tracker, wishes) == [8, STOP, 5, 5, 5, STOP, 2, 3, 9]
    assert tracker.num_tokens == 7


def test_a_sentence_that_ends_with_the_budget_lands_at_once() -> None:
    tracker = tracker_for(budget=2, grace=9)
    assert play(tracker, [8, 5, STOP, 5, 5]) == [8, 5, STOP, 9, 5]


@pytest.mark.parametrize(
    ("grace", "thought"),
    [
        (0, [5] * 4),
        # The message does not fit: the grace is the thought's alone.
        (1, [5] * 5),
        (2, [5] * 4 + [2, 3]),
        (3, [5] * 5 + [2, 3]),
    ],
)
def test_where_no_sentence_ends_the_message_ends_with_the_grace(grace: int, thought: list) -> None:
    tracker = tracker_for(budget=4, grace=grace, message=(2, 3))
    assert play(tracker, [8, *[5] * 20])[: len(thought) + 2] == [8, *thought, 9]
    assert tracker.num_tokens == len(thought) == 4 + grace


def test_the_model_may_close_its_thought_inside_the_grace() -> None:
    tracker = tracker_for(budget=2, grace=9, message=(2, 3))
    assert play(tracker, [8, 5, 5, 5, 9, 5, STOP]) == [8, 5, 5, 5, 9, 5, STOP]
    assert tracker.num_tokens == 3 and tracker.thought_end == "model"


def test_budget_zero_has_no_grace_and_no_message() -> None:
    tracker = tracker_for(budget=0, grace=9, message=(2, 3))
    assert play(tracker, [8, 5, 5]) == [8, 9, 5]


def test_a_half_written_marker_is_completed_without_a_message() -> None:
    tracker = tracker_for("several", budget=2, grace=3, message=(7,))
    assert play(tracker, [1, 2, 5, 5, 5, 3, 5]) == [1, 2, 5, 5, 5, 3, 1, 2]
    assert tracker.num_tokens == 3 and tracker.thought_end == "budget"


def test_a_message_that_would_close_the_thought_early_is_refused() -> None:
    for message, closing in (((5, 2, 3), (2, 3)), ((5, 2, 3), (2, 3, 2)), ((2,), (2, 2))):
        with pytest.raises(ValueError, match=r"message is .*; allowed are .* no closing marker"):
            ThoughtTracker((1,), closing, message=message)
    tracker = ThoughtTracker(
        (1,), (2, 3, 2, 3, 4), prompt_tail=(1,), message=(2, 3), budget=1, grace=2
    )
    assert play(tracker, [5] * 9) == [5, *(2, 3), *(2, 3, 2, 3, 4), 5]
    assert tracker.num_tokens == 3


def test_the_opening_marker_is_no_half_of_a_closing_one() -> None:
    tracker = ThoughtTracker((1, 3), (3, 4), budget=0)
    assert play(tracker, [1, 3, 5, 5]) == [1, 3, 3, 4]


@pytest.mark.parametrize(
    ("budget", "grace"), [(0, 0), (15, 0), (16, 1), (1600, 100), (8192, 512), (80_000, 512)]
)
def test_the_grace_of_those_who_name_none(budget: int, grace: int) -> None:
    assert default_grace(budget) == grace
    if budget <= 1600:
        tracker = tracker_for(prompt_tail=(8,), budget=budget)
        assert play(tracker, [5] * 2000).index(9) == budget + grace


@pytest.mark.parametrize("kind", MARKERS)
def test_thinking_off_closes_the_thought_the_prompt_opened(kind: str) -> None:
    opening, closing = MARKERS[kind]
    tracker = tracker_for(kind, prompt_tail=opening, thinking=False, budget=50, message=(5,))
    assert play(tracker, [5, 5, 5, 5]) == [*closing, 5, 5, 5][:4]
    assert tracker.num_tokens == 0 and tracker.thought_end == "off"
    assert tracker.answer_start == len(closing)


@pytest.mark.parametrize("kind", MARKERS)
def test_thinking_off_closes_the_thought_the_model_opens(kind: str) -> None:
    opening, closing = MARKERS[kind]
    tracker = tracker_for(kind, thinking=False)
    assert tracker.opening_token == opening[0]
    written = play(tracker, [BLANK, *opening, *[5] * 6])
    assert written[: 1 + len(opening) + len(closing)] == [BLANK, *opening, *closing]
    assert tracker.thought_end == "off"


def test_no_thought_has_no_end() -> None:
    for options in ({}, {"thinking": False}, {"budget": 3}):
        tracker = tracker_for(**options)
        play(tracker, [5, 9, 5])
        assert tracker.thought_end is None and tracker.answer_start == 0
    # One that the prompt closed is not the reply's.
    tracker = tracker_for(prompt_tail=(8, 9), thinking=False)
    assert tracker.thought_end is None and tracker.answer_start == 0
    # One that never ended has none either, even while its end is being written.
    tracker = tracker_for("several", prompt_tail=(1, 2), budget=0)
    tracker.observe(3)
    assert tracker.thought_end is None and tracker.answer_start is None


def test_where_the_answer_begins() -> None:
    tracker = tracker_for("several")
    starts = []
    for token in (BLANK, 1, 2, 5, 3, 1, 2, 5, 5):
        starts.append(tracker.answer_start)
        tracker.observe(token)
    assert starts == [0, 0, 0, None, None, None, None, 7, 7]


def test_the_token_that_carries_on_the_opening_marker() -> None:
    tracker = tracker_for("several")
    tokens = []
    for token in (BLANK, 1, 2, 5):
        tokens.append(tracker.opening_token)
        tracker.observe(token)
    assert tokens == [1, 1, 2, None]
    for tail in ((8,), (8, 9)):
        assert tracker_for(prompt_tail=tail).opening_token is None
    assert ThoughtTracker((), ()).opening_token is None


def test_a_closing_marker_that_ends_like_an_opening_one_closes() -> None:
    assert tracker_for("several", prompt_tail=(1, 2, 5, 3, 1, 2)).phase == "after"
    assert tracker_for("several", prompt_tail=(3, 1, 2, 1, 2)).phase == "inside"
    # The search must not step over a marker that follows a false start.
    assert ThoughtTracker((1, 2, 2), (9,), prompt_tail=(1, 2, 2, 2)).phase == "inside"


@given(
    tail=st.lists(st.integers(1, 3), max_size=30),
    opening=st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
def test_the_prompts_last_marker_decides(tail: list[int], opening: list[int]) -> None:
    """Closing markers of a token that no opening one has: the last of either is what counts."""
    closing = [0]
    tail = [0 if token == 3 and 3 not in opening else token for token in tail]
    starts = [i for i in range(len(tail)) if tail[i : i + len(opening)] == opening]
    closes = [i for i in range(len(tail)) if tail[i] == 0]
    tracker = ThoughtTracker(opening, closing, prompt_tail=tail)
    last_open, last_close = max(starts, default=-1), max(closes, default=-1)
    assert tracker.opened_by_prompt == (last_open > last_close)
    assert (tracker.phase == "after") == (last_close > last_open)


def test_long_thoughts_and_prompts_cost_no_more_per_token() -> None:
    """A quarter of a million tokens take a fraction of a second; anything quadratic takes hours."""
    tracker = tracker_for("several", prompt_tail=[5] * 1_000_000, budget=10_000_000)
    for token in (1, 2):
        tracker.observe(token)
    for _ in range(250_000):
        tracker.observe(5)
    assert tracker.num_tokens == 250_000
    tracker = tracker_for("several", prompt_tail=[3] * 1_000_000)
    assert tracker.phase == "before"


@pytest.mark.parametrize(
    "text", ["so.", "what?", "no!", "line\n", "好。", "吗？", "x.\n", "…", "！"]
)
def test_sentence_ends(text: str) -> None:
    assert ends_sentence(text)


@pytest.mark.parametrize("text", ["", "so", "so,", ". ", "3.1", "\nso", "，"])
def test_what_ends_no_sentence(text: str) -> None:
    assert not ends_sentence(text)
