"""From a prompt and its parameters to a request, or to the reason why there is none."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import replace

from openm1.chat.tokenizer import Tokenizer
from openm1.engine.adjustment import Adjustment
from openm1.engine.config import SpecialTokens
from openm1.engine.request import Request
from openm1.engine.stopping import StopWatch
from openm1.engine.thinking import ThoughtTracker
from openm1.model.config import M1Config
from openm1.types import SamplingParams


def make_request(
    config: M1Config,
    tokens: SpecialTokens,
    prompt_ids: list[int],
    params: SamplingParams,
    *,
    snapshot_at: Iterable[int] = (),
    tokenizer: Tokenizer | None = None,
) -> Request:
    """A request with a seed of its own. Raises ValueError where the model could never serve it."""
    _check(config, prompt_ids, params)
    if params.stop and tokenizer is None:
        raise ValueError(f"stop is {params.stop!r}, but this model has no tokenizer")
    if params.seed is None:
        params = replace(params, seed=secrets.randbits(63))
    thought = ThoughtTracker(
        tokens.think_open,
        tokens.think_close,
        is_blank=tokens.is_blank,
        prompt_tail=_last_sentence(prompt_ids, tokens.eos_token_ids),
        thinking=params.thinking,
        budget=params.thinking_budget,
        grace=params.thinking_grace,
        ends_sentence=tokens.ends_sentence,
        message=tokens.landing_message,
    )
    request = Request(
        prompt_ids=list(prompt_ids),
        params=params,
        thought=thought,
        adjustment=Adjustment.for_request(params, prompt_ids, tokens.vocab_size),
        snapshot_at=set(snapshot_at),
    )
    if params.stop and tokenizer is not None:
        watch = StopWatch(tokenizer, params.stop, thought_opened=thought.opened_by_prompt)
        request.completes_stop = watch.push
    return request


def _check(config: M1Config, prompt_ids: list[int], params: SamplingParams) -> None:
    if params.n != 1:
        raise ValueError(f"n is {params.n}; the engine takes one sequence a request")
    if not prompt_ids:
        raise ValueError("the prompt is empty; allowed is at least one token")
    highest = config.vocab_size - 1
    if min(prompt_ids) < 0 or max(prompt_ids) > highest:
        bad = next(i for i in prompt_ids if not 0 <= i <= highest)
        raise ValueError(f"prompt has token id {bad}; allowed are 0 to {highest}")
    room = config.max_position_embeddings
    if len(prompt_ids) + params.max_tokens > room:
        raise ValueError(
            f"prompt of {len(prompt_ids)} tokens and max_tokens {params.max_tokens} exceed the "
            f"model's {room} positions"
        )


def _last_sentence(prompt_ids: list[int], eos_token_ids: frozenset[int]) -> list[int]:
    """The prompt after its last end of sentence: what the reply continues."""
    for at in range(len(prompt_ids) - 1, -1, -1):
        if prompt_ids[at] in eos_token_ids:
            return prompt_ids[at + 1 :]
    return prompt_ids
