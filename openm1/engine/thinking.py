"""Where in its thought a sequence is, and ending the thought when its budget is spent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from openm1.types import ThoughtEnd

Phase = Literal["before", "inside", "after"]

MAX_DEFAULT_GRACE = 512
SENTENCE_ENDS = (".", "!", "?", "…", "\n", "。", "．", "｡", "！", "？")


def default_grace(budget: int) -> int:
    """Tokens past `budget` a thought may take to land, where the caller names none."""
    return min(budget // 16, MAX_DEFAULT_GRACE)


def ends_sentence(text: str) -> bool:
    """Whether a thought may stop after a token that reads `text`."""
    return text.endswith(SENTENCE_ENDS)


def _last_end(ids: Sequence[int], pattern: Sequence[int]) -> int:
    """End of the last occurrence of a non-empty `pattern` in `ids`, 0 if there is none.

    Prompts may be a million tokens long, so `list.index` does the searching.
    """
    backwards, wanted = list(reversed(ids)), list(reversed(pattern))
    start = 0
    while True:
        try:
            start = backwards.index(wanted[0], start)
        except ValueError:
            return 0
        if backwards[start : start + len(wanted)] == wanted:
            return len(backwards) - start
        start += 1


class ThoughtTracker:
    """Follows `<think>` ... `</think>` token by token.

    A thought stands at the start of a reply, only blank tokens before it, as in `chat.thinking`.
    The markers are token sequences, since they are single tokens in some vocabularies and plain
    text in others. With empty markers (a model that does not think) nothing is ever tracked.

    When `budget` tokens of thought are written, it lands: at the next token that ends a sentence,
    or, none coming, where the grace leaves just room for `message`, that message and the closing
    marker are forced. So a thought, message included and markers not, never has more than
    budget + grace tokens. A message longer than the grace is left out, and a closing marker that
    the model has half written is completed without one.
    """

    def __init__(
        self,
        opening: Sequence[int],
        closing: Sequence[int],
        *,
        is_blank: Callable[[int], bool] = lambda token: False,
        prompt_tail: Sequence[int] = (),
        thinking: bool = True,
        budget: int | None = None,
        grace: int | None = None,
        ends_sentence: Callable[[int], bool] = lambda token: False,
        message: Sequence[int] = (),
    ) -> None:
        """`prompt_tail` is the prompt after its last end of sentence: it may open the thought.

        `thinking` False closes the thought as soon as it is open. `grace` None is
        `default_grace(budget)`; budget 0 has no grace, since there is no sentence to finish.
        """
        self._opening, self._closing = list(opening), list(closing)
        self._is_blank, self._ends_sentence = is_blank, ends_sentence
        self._forced_end: ThoughtEnd = "budget" if thinking else "off"
        self._plan_landing(budget if thinking else 0, grace, list(message))
        self._recent: list[int] = []
        self._pending: list[int] = []
        self._num_observed = 0
        self.phase: Phase = "before" if opening and closing else "after"
        self.num_tokens = 0
        """Tokens inside the thought so far, a forced message included, markers excluded."""
        self.thought_end: ThoughtEnd | None = None
        """Who closed the thought; None where the reply closed none."""
        self.answer_start: int | None = 0
        """Where in the reply the answer begins, as far as is known; None inside the thought."""
        if self.phase == "before":
            opened = _last_end(prompt_tail, opening)
            closed = _last_end(prompt_tail, closing)
            if opened > closed:
                self._open()
            elif closed:
                self.phase = "after"
        self.opened_by_prompt = self.phase == "inside"
        self._land_if_due(None)

    def _plan_landing(self, budget: int | None, grace: int | None, message: list[int]) -> None:
        ending, width = message + self._closing, len(self._closing)
        if width and any(ending[i : i + width] == self._closing for i in range(len(message))):
            raise ValueError(
                f"message is {message}; allowed are token ids that hold no closing marker "
                f"{self._closing} and make none before the one that follows them"
            )
        if budget is not None:
            grace = 0 if budget == 0 else default_grace(budget) if grace is None else grace
            message = message if len(message) <= grace else []
            # The last place at which landing, message included, keeps within the grace.
            self._last_landing = budget + grace - len(message)
        self._budget, self._message = budget, message

    @property
    def forced(self) -> int | None:
        """The token that must come next, if the budget wrote one."""
        return self._pending[-1] if self._pending else None

    @property
    def opening_token(self) -> int | None:
        """The token that would carry on the opening marker, while a thought may yet begin.

        Also with `thinking` False: a thought that the model opens is then closed at once, so that
        the reply begins with an empty one, as `chat.format` writes it.
        """
        return self._opening[len(self._recent)] if self.phase == "before" else None

    def observe(self, token: int) -> None:
        """Takes the next token of the reply, sampled or forced."""
        self._num_observed += 1
        if self._pending:
            self._observe_forced(token)
        elif self.phase == "before":
            self._observe_start(token)
            self._land_if_due(None)
        elif self.phase == "inside":
            self._recent = [*self._recent, token][-len(self._closing) :]
            if self._recent == self._closing:
                self.num_tokens -= len(self._closing) - 1
                self._close("model")
            else:
                self.num_tokens += 1
                self._land_if_due(token)

    def _observe_forced(self, token: int) -> None:
        expected = self._pending.pop()
        assert token == expected, "a forced token was not taken"
        if len(self._pending) >= len(self._closing):
            self.num_tokens += 1
        elif not self._pending:
            self._close(self._forced_end)

    def _observe_start(self, token: int) -> None:
        if not self._recent and self._is_blank(token):
            return
        self._recent.append(token)
        if self._recent == self._opening:
            self._open()
        elif self._recent != self._opening[: len(self._recent)]:
            self.phase = "after"

    def _open(self) -> None:
        self.phase, self._recent, self.answer_start = "inside", [], None

    def _close(self, end: ThoughtEnd) -> None:
        self.phase, self.thought_end, self.answer_start = "after", end, self._num_observed

    def _land_if_due(self, token: int | None) -> None:
        """Decides after `token` of the thought (None: there is none yet) whether it ends here."""
        if self.phase != "inside" or self._budget is None or self.num_tokens < self._budget:
            return
        if self.num_tokens >= self._last_landing or (
            token is not None and self._ends_sentence(token)
        ):
            self._pending = self._landing()[::-1]

    def _landing(self) -> list[int]:
        # A closing marker of several tokens may already be half written; finish it.
        widths = range(len(self._closing) - 1, 0, -1)
        done = next((w for w in widths if self._recent[-w:] == self._closing[:w]), 0)
        if done:
            self.num_tokens -= done
            return self._closing[done:]
        return self._message + self._closing
