"""What one request wants of its answer's logits, and what the answer has so far. Ids only."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from openm1.types import SamplingParams


class Adjustment:
    """Penalties, bias, bans and grammar of one request, if it asks for any."""

    @staticmethod
    def for_request(
        params: SamplingParams, prompt_ids: Iterable[int], vocab_size: int
    ) -> Adjustment | None:
        """None for a request that asks for nothing.

        Raises ValueError for ids outside the vocabulary, and where every id is banned.
        """
        asks = params.presence_penalty or params.frequency_penalty or params.logit_bias
        asks = asks or params.banned_token_ids or params.grammar
        if asks or params.repetition_penalty != 1:
            return Adjustment(params, prompt_ids, vocab_size)
        return None

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int], vocab_size: int) -> None:
        self.presence_penalty = params.presence_penalty
        self.frequency_penalty = params.frequency_penalty
        self.repetition_penalty = params.repetition_penalty
        self.bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self.bias = np.array(list(params.logit_bias.values()), dtype=np.float64)
        self.banned_ids = np.unique(np.array(params.banned_token_ids, dtype=np.int64))
        for name, ids in (("logit_bias", self.bias_ids), ("banned_token_ids", self.banned_ids)):
            if (bad := ids[(ids < 0) | (ids >= vocab_size)]).size:
                raise ValueError(f"{name} has token id {bad[0]}; allowed are 0 to {vocab_size - 1}")
        if len(self.banned_ids) == vocab_size:
            raise ValueError(
                f"banned_token_ids holds all {vocab_size} tokens; allowed is to leave at least one"
            )
        self._in_prompt = np.zeros(vocab_size, dtype=bool)
        if self.repetition_penalty != 1:
            prompt = np.fromiter(prompt_ids, dtype=np.int64)
            # A prompt may hold ids above the tokenizer's; they have no logit to penalise.
            self._in_prompt[prompt[prompt < vocab_size]] = True
        self._counts = np.zeros(vocab_size, dtype=np.int32)
        self._start = self._counted = 0
        self._grammar = params.grammar
        self._matcher = None if params.grammar is None else params.grammar.start()
        self._off_grammar = False
        self._max_tokens = params.max_tokens

    def catch_up(self, output_ids: list[int], answer_start: int) -> None:
        """Counts what the answer, `output_ids[answer_start:]`, has gained since the last call."""
        if answer_start != self._start:
            # What looked like an answer was the beginning of a thought.
            self._counts[:] = 0
            self._start = self._counted = answer_start
            self._matcher = None if self._grammar is None else self._grammar.start()
            self._off_grammar = False
        for token in output_ids[self._counted :]:
            self._counts[token] += 1
            if self._matcher is not None and not self._off_grammar:
                self._off_grammar = not self._matcher.consume(token)
        self._counted = len(output_ids)

    def answer_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids the answer has, how often), both int64."""
        ids = np.flatnonzero(self._counts)
        return ids, self._counts[ids].astype(np.int64)

    def allowed_by_grammar(self, opening_token: int | None) -> np.ndarray | None:
        """Bool by token id; None for no grammar, which is all of them.

        The grammar is left by one thing alone, a thought that has begun to open: then only the
        token that carries its marker on, `opening_token`, may follow.
        """
        if self._matcher is None:
            return None
        if not self._off_grammar:
            return self._matcher.allowed(self._max_tokens - self._counted)
        assert opening_token is not None, "an answer has left its grammar"
        return np.arange(len(self._counts)) == opening_token

    def repeated_ids(self) -> np.ndarray:
        """Ids that the prompt or the answer has, int64."""
        return np.flatnonzero(self._in_prompt | (self._counts > 0))
