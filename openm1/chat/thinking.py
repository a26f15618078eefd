"""Thought apart from answer, for a whole text and for a stream.

A thought stands at the very start of a reply (blank characters before it do not count): a
`<think>` that comes after some answer text is answer text, so an answer may talk about the tag
without vanishing. Blank characters around the thought and around its two markers are dropped, so
`<think>\\n...\\n</think>\\n\\n4` and `<think>...</think>4` read the same.
"""

from __future__ import annotations

from typing import Literal

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

LANDING_MESSAGE = "\n\nI have thought long enough, so I answer with what I have.\n"
"""What the engine writes to end a thought whose budget is spent in the middle of a sentence."""

Part = Literal["reasoning", "answer"]


def split_thought(text: str, *, opened: bool = False) -> tuple[str | None, str]:
    """(reasoning, answer); reasoning is None when the text holds no thought, "" when it is empty.

    `opened` says that the prompt already wrote `<think>`. A thought that never closes is all
    reasoning, and the answer is "".
    """
    if not opened:
        start = text.lstrip()
        if not start.startswith(THINK_OPEN):
            return None, text
        text = start[len(THINK_OPEN) :]
    reasoning, _, answer = text.partition(THINK_CLOSE)
    return reasoning.strip(), answer.lstrip()


class ThoughtSplitter:
    """`split_thought` for text that arrives in pieces: the pieces joined are the whole split."""

    def __init__(self, *, opened: bool = False) -> None:
        self.has_thought = opened
        """Tells an empty thought (True, no reasoning pieces) from none at all."""
        self._state: Literal["start", "thought", "answer"] = "thought" if opened else "start"
        self._held = ""
        # Blanks are dropped until the first other character of a thought or of an answer after it.
        self._skip_blanks = opened

    @property
    def in_thought(self) -> bool:
        return self._state == "thought"

    @property
    def in_answer(self) -> bool:
        """Whether the answer's first character has come."""
        return self._state == "answer" and not self._skip_blanks

    def push(self, text: str) -> list[tuple[Part, str]]:
        self._held += text
        pieces: list[tuple[Part, str]] = []
        if self._state == "start":
            self._decide()
        if self._state == "thought":
            self._take_thought(pieces)
        if self._state == "answer":
            self._take_answer(pieces)
        return pieces

    def flush(self) -> list[tuple[Part, str]]:
        """What was held back because more could have followed."""
        part: Part = "reasoning" if self._state == "thought" else "answer"
        held, self._held = self._held, ""
        if self._state == "thought":
            held = held.rstrip()
        return [(part, held)] if held else []

    def _decide(self) -> None:
        start = self._held.lstrip()
        if start.startswith(THINK_OPEN):
            self.has_thought = True
            self._state, self._skip_blanks = "thought", True
            self._held = start[len(THINK_OPEN) :]
        elif not THINK_OPEN.startswith(start):
            self._state = "answer"

    def _take_thought(self, pieces: list[tuple[Part, str]]) -> None:
        if self._skip_blanks:
            self._held = self._held.lstrip()
        reasoning, closed, rest = self._held.partition(THINK_CLOSE)
        if closed:
            self._state, self._skip_blanks = "answer", True
            reasoning, self._held = reasoning.rstrip(), rest
        else:
            ready = len(self._held) - partial_suffix(self._held, THINK_CLOSE)
            ready = len(self._held[:ready].rstrip())
            reasoning, self._held = self._held[:ready], self._held[ready:]
            self._skip_blanks = self._skip_blanks and not reasoning
        if reasoning:
            pieces.append(("reasoning", reasoning))

    def _take_answer(self, pieces: list[tuple[Part, str]]) -> None:
        answer, self._held = self._held, ""
        if self._skip_blanks:
            answer = answer.lstrip()
            self._skip_blanks = not answer
        if answer:
            pieces.append(("answer", answer))


def partial_suffix(text: str, marker: str) -> int:
    """How many last characters of `text` could be the beginning of `marker`, short of all of it."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
