"""When a reply is over."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from openm1.chat.thinking import ThoughtSplitter, partial_suffix
from openm1.chat.tokenizer import StreamDecoder, Tokenizer
from openm1.types import FinishReason

if TYPE_CHECKING:
    from openm1.engine.request import Request


class RepetitionRun:
    """Counts tokens in a row that the model was all but sure of, as it is of a loop it is caught in
    (MiniMax-M1 report, section on early truncation by repetition).
    """

    def __init__(self, num_tokens: int, probability: float) -> None:
        """Reached by `num_tokens` sampled tokens in a row above `probability`; 0 is never."""
        self._wanted = num_tokens
        self._threshold = math.log(probability) if probability > 0 else -math.inf
        self._length = 0
        self.reached = False

    def observe(self, logprob: float, *, forced: bool) -> None:
        """Takes the next token. A forced one ends the run, as what follows is a fresh start."""
        self._length = 0 if forced or logprob <= self._threshold else self._length + 1
        self.reached = 0 < self._wanted <= self._length


def finish_reason(request: Request, eos_token_ids: frozenset[int]) -> FinishReason | None:
    """Why the newest token is the last, if it is.

    An end of sentence, a stop token or a stop string come before repetition, that before length.
    """
    params, token = request.params, request.output_ids[-1]
    if token in eos_token_ids and not params.ignore_eos:
        return "stop"
    if token in params.stop_token_ids:
        return "stop"
    if request.completes_stop is not None and request.completes_stop(token):
        return "stop"
    if request.repetition.reached:
        return "repetition"
    if len(request.output_ids) >= params.max_tokens:
        return "length"
    return None


def cut_at_stop(text: str, stop: tuple[str, ...]) -> str:
    """`text` before the earliest stop string."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return text[: min(found)] if found else text


class StopCutter:
    """`cut_at_stop` for text that arrives in pieces."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What is surely before any stop string."""
        if self.found:
            return ""
        self._held += text
        ready = cut_at_stop(self._held, self._stop)
        self.found = ready != self._held
        if not self.found:
            unsure = max((partial_suffix(ready, s) for s in self._stop), default=0)
            ready = ready[: len(ready) - unsure]
        self._held = self._held[len(ready) :]
        return ready

    def flush(self) -> str:
        """What was held back because more could have followed."""
        held, self._held = self._held, ""
        return "" if self.found else held


class StopWatch:
    """Follows a reply token by token until its answer, thought apart, holds a stop string."""

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...], *, thought_opened: bool
    ) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._splitter = ThoughtSplitter(opened=thought_opened)
        self._cutter = StopCutter(stop)

    def push(self, token: int) -> bool:
        """True once a stop string is complete."""
        for part, text in self._splitter.push(self._decoder.push(token)):
            if part == "answer":
                self._cutter.push(text)
        return self._cutter.found
