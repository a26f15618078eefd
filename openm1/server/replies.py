"""One reply, whatever API asked for it: tokens in, pieces of thought, answer and calls out."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from openm1.chat.thinking import Part, ThoughtSplitter
from openm1.chat.tokenizer import StreamDecoder, Tokenizer
from openm1.chat.tool_stream import CallPart, ToolCallStream
from openm1.engine.request import RequestFailed
from openm1.engine.stopping import StopCutter
from openm1.server.errors import ApiError, bad_request
from openm1.server.gate import Gate
from openm1.server.grammar import AnswerGrammar
from openm1.server.metrics import Metrics, Timing
from openm1.server.served import ServedModel
from openm1.server.usage import UsageMeter, UsageRecord
from openm1.types import Completion, SamplingParams, ToolCall

if TYPE_CHECKING:
    from openm1.engine.client import TokenEvent

_LOG = logging.getLogger("openm1.server.replies")

ApiFinish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyOrder:
    """What one reply is to be."""

    prompt_ids: list[int]
    params: SamplingParams
    """`n` is 1 and `seed` is set."""
    snapshot_at: tuple[int, ...] = ()
    is_chat: bool = True
    """False leaves text as the model writes it, markers of the thought included."""
    reads_calls: bool = False
    """Whether blocks of tool calls become calls; without tools they are text."""
    streams: bool = False
    wants_tokens: bool = False
    """Whether a stream tells of the answer's tokens beside the text."""
    grammar: AnswerGrammar | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a reply."""

    part: Part
    text: str
    num_tokens: int = 0
    """Tokens of the reply when this text was sure."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of a reply: all of it."""

    completion: Completion
    """Text, reasoning and tool calls are filled in."""
    stop_string: str | None
    """The one that ended it."""
    answer_places: tuple[int, ...]
    """Which tokens are the answer's, or, in raw text, all but an end of sentence."""
    calls: tuple[CallPart, ...] = ()
    """Each call in one part. One that was cut off or is broken has its arguments so far."""

    @property
    def finish(self) -> ApiFinish:
        """In the words OpenAI's clients know; a reply caught in a loop was cut as well."""
        if self.completion.finish_reason in ("length", "repetition"):
            return "length"
        return "tool_calls" if self.completion.tool_calls else "stop"


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens of a reply that have come and whose text may yet be held back."""

    tokens: tuple[TokenEvent, ...]
    """Those of the answer alone."""


Written = Piece | CallPart
Item = Written | NewTokens | Reply


class ReplyText:
    """Follows the tokens of one reply and tells what text they surely are."""

    def __init__(self, tokenizer: Tokenizer, order: ReplyOrder, *, thought_opened: bool) -> None:
        self._order = order
        self._eos = tokenizer.eos_token_id
        self._decoder = StreamDecoder(tokenizer)
        self._splitter = ThoughtSplitter(opened=thought_opened)
        self._cutter = StopCutter(order.params.stop)
        self._calls = ToolCallStream() if order.reads_calls else None
        self._call_parts: list[CallPart] = []
        self._held_eos = False
        self._raw_held = ""
        self._answer_begun = False
        self._undecided: list[int] = []
        self._num_tokens = 0
        self._answer = ""
        self.answer_places: list[int] = []
        self.text: list[str] = []
        self.reasoning: list[str] = []

    def push(self, tokens: Sequence[int]) -> list[Written]:
        """The pieces that these tokens make sure."""
        if self._order.wants_tokens:  # Which are the answer's is found one by one.
            return [piece for token in tokens for piece in self._push_together([token])]
        return self._push_together(tokens)

    def _push_together(self, tokens: Sequence[int]) -> list[Written]:
        # An end of sentence is text only where the request ignores it and more follows.
        sure = [self._eos or 0, *tokens] if self._held_eos else [*tokens]
        self._held_eos = sure[-1] == self._eos
        self._num_tokens += len(tokens)
        was_answer = self._answer_begun
        text = self._decoder.push(*(sure[:-1] if self._held_eos else sure))
        split = self._splitter.push(text)
        writes_answer = bool(split) and split[-1][0] == "answer"
        if not self._held_eos:
            self._place(self._num_tokens - 1, was_answer, writes_answer)
        self._answer_begun = was_answer or writes_answer
        return self._parts(split, text)

    def flush(self) -> list[Written]:
        """What was held back; an end of sentence at the very end is no text."""
        rest = self._decoder.flush()
        pieces = self._parts(self._splitter.push(rest), rest)
        pieces += self._parts(self._splitter.flush(), "")
        pieces += self._answer_text(self._cutter.flush())
        if self._calls is not None:
            pieces += self._keep_calls(self._calls.flush())
        return pieces

    @property
    def calls(self) -> tuple[CallPart, ...]:
        """Each call in one part."""
        calls = groupby(self._call_parts, key=lambda part: part.index)
        return tuple(_in_one(list(parts)) for _, parts in calls)

    @property
    def has_thought(self) -> bool:
        return self._splitter.has_thought

    @property
    def stop_string(self) -> str | None:
        """Which stop string cut the answer."""
        if not self._cutter.found:
            return None
        found = {s: self._answer.find(s) for s in self._order.params.stop}
        return min((at, s) for s, at in found.items() if at >= 0)[1]

    def _place(self, place: int, was_answer: bool, writes_answer: bool) -> None:
        """Notes whether the token just taken is the answer's."""
        if was_answer or not self._order.is_chat:
            self.answer_places.append(place)
        elif not self._splitter.has_thought:
            # What may yet open a thought.
            self._undecided.append(place)
            if writes_answer:
                self.answer_places += self._undecided
        elif writes_answer:
            self.answer_places.append(place)

    def _parts(self, split: Iterable[tuple[Part, str]], raw: str) -> list[Written]:
        pieces: list[Written] = []
        if not self._order.is_chat:
            return self._raw(split, raw)
        for part, text in split:
            if part == "reasoning":
                pieces += self._keep(part, text)
            else:
                pieces += self._answer_text(self._cut(text))
        return pieces

    def _raw(self, split: Iterable[tuple[Part, str]], raw: str) -> list[Written]:
        """Text as it was written; only the answer can be cut at a stop string."""
        answer = "".join(text for part, text in split if part == "answer")
        self._raw_held += raw
        if not answer and not self._splitter.has_thought:
            return []
        if answer and self._raw_held.endswith(answer):
            before, self._raw_held = self._raw_held.removesuffix(answer), ""
            return self._keep("answer", before) + self._answer_text(self._cut(answer))
        before, self._raw_held = self._raw_held, ""
        return self._keep("answer", before)

    def _cut(self, text: str) -> str:
        if self._order.params.stop:
            self._answer += text
            return self._cutter.push(text)
        return text

    def _answer_text(self, text: str) -> list[Written]:
        if self._calls is not None:
            return self._keep_calls(self._calls.push(text))
        return self._keep("answer", text)

    def _keep(self, part: Part, text: str) -> list[Written]:
        if not text:
            return []
        (self.reasoning if part == "reasoning" else self.text).append(text)
        return [Piece(part, text, self._num_tokens)]

    def _keep_calls(self, items: Sequence[str | CallPart]) -> list[Written]:
        kept: list[Written] = []
        for item in items:
            if isinstance(item, str):
                kept += self._keep("answer", item)
                continue
            call_id = f"call_{secrets.token_hex(12)}" if item.begins else self._call_parts[-1].id
            self._call_parts.append(replace(item, id=call_id))
            kept.append(self._call_parts[-1])
        return kept


def _in_one(parts: Sequence[CallPart]) -> CallPart:
    arguments = "".join(part.arguments for part in parts)
    return replace(parts[0], arguments=arguments, is_whole=parts[-1].is_whole)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyWriter:
    """Carries out orders: waits for a turn, follows the engine, counts what was used."""

    served: ServedModel
    gate: Gate
    metrics: Metrics
    meter: UsageMeter
    log_prompts: bool = False

    async def write(
        self, order: ReplyOrder, *, key: str, endpoint: str
    ) -> AsyncGenerator[Item, None]:
        """Pieces as they come where the order streams, and the `Reply` last.

        Closing the iterator gives the request up. Raises ApiError for what the engine refuses, or
        cannot go on with.
        """
        timing = Timing()
        ledger = _Ledger(self, key, endpoint, len(order.prompt_ids), timing)
        async with self.gate.turn(order.params.priority) as waited_s:
            self.metrics.queued(waited_s)
            if self.log_prompts:
                _LOG.info("asked: %r", self.served.tokenizer.decode(order.prompt_ids))
            try:
                if order.streams:
                    items = self._stream(order, ledger)
                    async with aclosing(items):
                        async for item in items:
                            yield item
                else:
                    yield await self._whole(order, ledger)
            except ValueError as error:
                ledger.close("refused")
                raise _refusal(error) from error
            except RequestFailed as error:
                ledger.close("failed")
                _LOG.error("%s %s: %s", key, endpoint, error)
                raise ApiError(500, str(error), code="request_failed") from error
            finally:
                ledger.close("abort")

    async def _whole(self, order: ReplyOrder, ledger: _Ledger) -> Reply:
        policy = self.served.policy
        completion = await policy.generate(
            order.prompt_ids, order.params, snapshot_at=order.snapshot_at
        )
        ledger.complete(completion)
        text = self._text(order)
        text.push(completion.token_ids)
        text.flush()
        return _reply(completion, text, order, log_prompts=self.log_prompts)

    async def _stream(self, order: ReplyOrder, ledger: _Ledger) -> AsyncGenerator[Item, None]:
        text = self._text(order)
        tokens: list[TokenEvent] = []
        num_shown = 0
        bursts = self.served.policy.bursts(
            order.prompt_ids, order.params, snapshot_at=order.snapshot_at
        )
        async with aclosing(bursts):
            async for burst in bursts:
                if isinstance(burst, Completion):
                    ledger.complete(burst)
                    for piece in text.flush():
                        yield piece
                    yield _reply(burst, text, order, log_prompts=self.log_prompts)
                    return
                ledger.tokens(len(burst))
                pieces = text.push([event.token_id for event in burst])
                if order.wants_tokens:
                    tokens += burst
                    places = text.answer_places[num_shown:]
                    num_shown += len(places)
                    yield NewTokens(tuple(tokens[place] for place in places))
                for piece in pieces:
                    yield piece

    def _text(self, order: ReplyOrder) -> ReplyText:
        return ReplyText(
            self.served.tokenizer, order, thought_opened=self.served.opens_thought(order.prompt_ids)
        )


@dataclass(eq=False, slots=True)
class _Ledger:
    """Counts one reply exactly once, however it ends."""

    writer: ReplyWriter
    key: str
    endpoint: str
    num_prompt_tokens: int
    timing: Timing
    num_tokens: int = 0
    is_closed: bool = field(default=False)

    def tokens(self, num_tokens: int) -> None:
        if self.timing.first_token is None:
            self.timing.first_token = time.monotonic()
        self.num_tokens += num_tokens

    def complete(self, completion: Completion) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._write(completion)

    def close(self, reason: Literal["abort", "refused", "failed"]) -> None:
        """For a reply that did not reach its end; only what a client gave up is to be paid."""
        if self.is_closed:
            return
        self.is_closed = True
        if reason == "abort":
            self._write(
                Completion(
                    token_ids=(0,) * self.num_tokens,
                    logprobs=(),
                    finish_reason="abort",
                    num_prompt_tokens=self.num_prompt_tokens,
                )
            )

    def _write(self, completion: Completion) -> None:
        _LOG.info(
            "%s %s: %d tokens read, %d of them cached, %d written, %d of them thought, %s",
            self.key,
            self.endpoint,
            completion.num_prompt_tokens,
            completion.cached_tokens,
            len(completion.token_ids),
            completion.num_reasoning_tokens,
            completion.finish_reason,
        )
        self.writer.metrics.finished(completion, self.timing)
        self.writer.meter.record(
            UsageRecord(
                key_name=self.key,
                model=self.writer.served.name,
                endpoint=self.endpoint,
                prompt_tokens=completion.num_prompt_tokens,
                cached_tokens=completion.cached_tokens,
                completion_tokens=len(completion.token_ids),
                reasoning_tokens=completion.num_reasoning_tokens,
                finish_reason=completion.finish_reason,
            )
        )


def _reply(
    completion: Completion, text: ReplyText, order: ReplyOrder, *, log_prompts: bool
) -> Reply:
    if order.grammar is not None and order.grammar.error is not None:
        reason = order.grammar.error
        raise bad_request(f"the grammar became too complex: {reason}", code="invalid_grammar")
    reasoning = "".join(text.reasoning) if text.has_thought and order.is_chat else None
    calls = text.calls
    whole = replace(
        completion,
        text="".join(text.text),
        reasoning=reasoning,
        tool_calls=tuple(ToolCall(name=c.name, arguments=c.arguments, id=c.id) for c in calls),
    )
    if log_prompts:
        _LOG.info("answered: %r, having thought: %r", whole.text, whole.reasoning)
    return Reply(whole, text.stop_string, tuple(text.answer_places), calls)


def _refusal(error: ValueError) -> ApiError:
    """What the engine says of a request that it will not take."""
    message = str(error)
    too_long = "positions" in message or "memory budget" in message
    return bad_request(message, code="context_length_exceeded" if too_long else "invalid_value")
