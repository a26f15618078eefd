"""Where in its thought a sequence is, and closing the thought when its budget is spent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

Phase = Literal["before", "inside", "after"]


def _last_index(ids: Sequence[int], pattern: Sequence[int]) -> int:
    """Start of the last occurrence of a non-empty `pattern` in `ids`, -1 if there is none."""
    width = len(pattern)
    for start in range(len(ids) - width, -1, -1):
        if list(ids[start : start + width]) == list(pattern):
            return start
    return -1


class ThoughtTracker:
    """Follows `<think>` ... `</think>` token by token.

    A thought stands at the start of a reply, only blank tokens before it, as in `chat.thinking`.
    The markers are token sequences, since they are single tokens in some vocabularies and plain
    text in others. With empty markers (a model that does not think) nothing is ever tracked.
    """

    def __init__(
        self,
        opening: Sequence[int],
        closing: Sequence[int],
        *,
        is_blank: Callable[[int], bool] = lambda token: False,
        prompt_tail: Sequence[int] = (),
        budget: int | None = None,
    ) -> None:
        """`prompt_tail` is the prompt after its last end of sentence: it may open the thought."""
        self._opening, self._closing = list(opening), list(closing)
        self._is_blank = is_blank
        self._budget = budget
        self._recent: list[int] = []
        self._pending: list[int] = []
        self.phase: Phase = "before" if opening and closing else "after"
        self.num_tokens = 0
        """Tokens inside the thought so far, markers excluded."""
        if self.phase == "before":
            opened = _last_index(prompt_tail, opening)
            closed = _last_index(prompt_tail, closing)
            if opened > closed:
                self.phase = "inside"
            elif closed >= 0:
                self.phase = "after"
        self.opened_by_prompt = self.phase == "inside"
        self._check_budget()

    @property
    def forced(self) -> int | None:
        """The token that must come next, if the budget wrote one."""
        return self._pending[0] if self._pending else None

    def observe(self, token: int) -> None:
        """Takes the next token of the reply, sampled or forced."""
        if self._pending:
            expected = self._pending.pop(0)
            assert token == expected, "a forced token was not taken"
            if not self._pending:
                self.phase = "after"
            return
        if self.phase == "before":
            self._observe_start(token)
        elif self.phase == "inside":
            self._recent = [*self._recent, token][-len(self._closing) :]
            if self._recent == self._closing:
                self.phase = "after"
                self.num_tokens -= len(self._closing) - 1
            else:
                self.num_tokens += 1
        self._check_budget()

    def _observe_start(self, token: int) -> None:
        if not self._recent and self._is_blank(token):
            return
        self._recent.append(token)
        if self._recent == self._opening:
            self.phase, self._recent = "inside", []
        elif self._recent != self._opening[: len(self._recent)]:
            self.phase = "after"

    def _check_budget(self) -> None:
        if self.phase != "inside" or self._budget is None or self.num_tokens < self._budget:
            return
        # A closing marker of several tokens may already be half written; finish it.
        done = 0
        for width in range(1, len(self._closing)):
            if self._recent[-width:] == self._closing[:width]:
                done = width
        self.num_tokens -= done
        self._pending = self._closing[done:]
