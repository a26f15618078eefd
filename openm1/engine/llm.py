"""Text in, text out: the engine with a tokenizer and a chat format."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from openm1.chat.reply import reply_text
from openm1.chat.template import ChatFormat, chat_format_for
from openm1.chat.thinking import (
    LANDING_MESSAGE,
    THINK_CLOSE,
    THINK_OPEN,
    Part,
    ThoughtSplitter,
    split_thought,
)
from openm1.chat.tokenizer import StreamDecoder, Tokenizer
from openm1.chat.tools import parse_tool_calls
from openm1.engine.config import EngineConfig, SpecialTokens
from openm1.engine.engine import Engine
from openm1.engine.request import Request
from openm1.engine.seeds import child_seed
from openm1.engine.stopping import StopCutter, cut_at_stop
from openm1.engine.thinking import ends_sentence
from openm1.model.int8 import Int8Report, quantize_int8
from openm1.model.m1 import M1ForCausalLM
from openm1.types import Completion, Message, SamplingParams, ToolSpec

if TYPE_CHECKING:
    from openm1.engine.client import EnginePolicy

Prompt = str | Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a call is. Prompts that are asked for several times count once."""

    prompt_tokens: int
    """Computed, or found in the cache."""
    total_prompt_tokens: int
    answer_tokens: int
    max_answer_tokens: int
    """At most; an answer may end before."""


OnProgress = Callable[[Progress], None]


# On how many tokens int8 weights are compared with full ones.
INT8_SAMPLE_TOKENS = 512


class LLM:
    """A model that answers.

    >>> llm = LLM("nano")
    >>> llm.chat([Message(role="user", content="4 -9 +8 *9 +1")]).text
    """

    def __init__(
        self,
        model: str | Path | M1ForCausalLM,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: str | torch.dtype = "float32",
        device: str = "cpu",
        config: EngineConfig | None = None,
        thinking_message: str = LANDING_MESSAGE,
        weights: Literal["full", "int8"] = "full",
    ) -> None:
        """`model` is a folder, a .gguf file, "nano", or a model already in memory.

        Without a tokenizer (none given, none beside the weights) only token ids can be generated.
        `thinking_message` ends a thought whose budget is spent in the middle of a sentence.
        `weights="int8"` turns experts and linear layers, also those of a given model, into int8;
        `int8_report` then says what that costs.
        """
        if isinstance(model, M1ForCausalLM):
            self.model = model
        else:
            self.model = M1ForCausalLM.from_pretrained(model, dtype=dtype, device=device)
            tokenizer = tokenizer or load_tokenizer(model)
        self.tokenizer = tokenizer
        if tokenizer is not None and tokenizer.vocab_size > self.model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model only "
                f"{self.model.config.vocab_size}"
            )
        tokens = special_tokens(self.model, tokenizer, thinking_message)
        self.engine = Engine(self.model, tokens, config)
        self.int8_report: Int8Report | None = None
        if weights == "int8":
            sample = self._own_words(INT8_SAMPLE_TOKENS)
            self.int8_report = quantize_int8(self.model, sample)
            self.engine = Engine(self.model, tokens, config)
        elif weights != "full":
            raise ValueError(f"weights is {weights!r}; allowed are 'full' and 'int8'")

    def _own_words(self, num_tokens: int) -> Tensor:
        """[8, num_tokens / 8] ids that the model writes of itself, from eight first tokens."""
        params = SamplingParams(max_tokens=num_tokens // 8 - 1, seed=0, ignore_eos=True)
        step = self.engine.tokens.vocab_size // 8
        firsts = [[i * step] for i in range(8)]
        groups = self.generate(firsts, params)
        replies = [first + list(g[0].token_ids) for first, g in zip(firsts, groups, strict=True)]
        return torch.tensor(replies, device=self.model.device)

    @cached_property
    def policy(self) -> EnginePolicy:
        """The same engine as an async `Policy`; it gives token ids, no text."""
        from openm1.engine.client import EnginePolicy

        return EnginePolicy(self.engine, tokenizer=self.tokenizer)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        on_progress: OnProgress | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions for each prompt, prompts being text or token ids.

        In text, special tokens written out are taken as such: this is the raw interface, `chat` is
        the safe one. `on_progress` is called after every step. Raises RequestFailed, and gives up
        the others, when one of them cannot go on.
        """
        params = params or SamplingParams()
        groups: list[list[Request]] = []
        try:
            for prompt in _prompt_list(prompts):
                ids, group = self._prompt_ids(prompt), []
                groups.append(group)
                for each in _split_n(params):
                    group.append(self._submit(ids, each))
            while any(r.finish_reason is None for group in groups for r in group):
                self.engine.step()
                _raise_errors(r for group in groups for r in group)
                if on_progress is not None:
                    on_progress(_progress(groups))
        finally:
            # A bad prompt, an error or Ctrl-C must leave nothing behind in the engine.
            for request in (r for group in groups for r in group):
                self.engine.abort(request)
        return [[self._completion(r) for r in group] for group in groups]

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[ToolSpec] = (),
    ) -> Completion:
        """The next assistant turn of one conversation, thought, answer and tool calls apart.

        What a conversation shares with an earlier one is not computed again.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"n is {params.n}; chat gives one completion, generate gives n")
        *_, completion = self.stream_chat(messages, params, tools=tools)
        return cast(Completion, completion)

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[ToolSpec] = (),
        on_progress: OnProgress | None = None,
    ) -> Iterator[tuple[Part, str] | Completion]:
        """Pieces of thought and answer as they come, then the whole `Completion`.

        Tool calls stand in the pieces of the answer as the model writes them. Closing the generator
        aborts the request.
        """
        params = params or SamplingParams()
        ids, so_far = self.chat_format.encode_prompt(messages, tools)
        marks = () if so_far is None else (so_far,)
        request = self._submit(ids, params, snapshot_at=marks)
        try:
            yield from self._stream_pieces(request, on_progress)
        finally:
            self.engine.abort(request)
        completion = self._completion(request)
        text, calls = parse_tool_calls(completion.text)
        yield replace(completion, text=text, tool_calls=calls)

    def _stream_pieces(
        self, request: Request, on_progress: OnProgress | None
    ) -> Iterator[tuple[Part, str]]:
        """Steps until the request is done; the pieces joined are what `_completion` gives."""
        decoder = StreamDecoder(self._tokenizer)
        splitter = ThoughtSplitter(opened=request.thought.opened_by_prompt)
        cutter = StopCutter(request.params.stop)
        shown = 0
        while request.finish_reason is None:
            self.engine.step()
            _raise_errors([request])
            if on_progress is not None:
                on_progress(_progress([[request]]))
            new = request.output_ids[shown:]
            shown += len(new)
            if request.finish_reason is not None and new[-1:] == [self._tokenizer.eos_token_id]:
                new.pop()
            text = "".join(decoder.push(token) for token in new)
            yield from _cut(splitter.push(text), cutter)
        yield from _cut([*splitter.push(decoder.flush()), *splitter.flush()], cutter)
        if rest := cutter.flush():
            yield "answer", rest

    @property
    def chat_format(self) -> ChatFormat:
        """How conversations become tokens; raises ValueError where the model has none."""
        return chat_format_for(self._tokenizer)

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer; give prompts as token ids")
        return self.tokenizer

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt, allow_special=True)
        return list(prompt)

    def _submit(
        self, prompt_ids: list[int], params: SamplingParams, *, snapshot_at: Iterable[int] = ()
    ) -> Request:
        return self.engine.submit(
            prompt_ids, params, snapshot_at=snapshot_at, tokenizer=self.tokenizer
        )

    def _completion(self, request: Request) -> Completion:
        completion = self.engine.completion(request)
        if self.tokenizer is None:
            return completion
        text = reply_text(self.tokenizer, completion.token_ids)
        reasoning, answer = split_thought(text, opened=request.thought.opened_by_prompt)
        return replace(
            completion, text=cut_at_stop(answer, request.params.stop), reasoning=reasoning
        )


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _split_n(params: SamplingParams) -> list[SamplingParams]:
    if params.n == 1:
        return [params]
    seed = params.seed if params.seed is not None else secrets.randbits(63)
    return [replace(params, n=1, seed=child_seed(seed, i)) for i in range(params.n)]


def _raise_errors(requests: Iterable[Request]) -> None:
    for request in requests:
        if request.error is not None:
            raise request.error


def _progress(groups: Sequence[Sequence[Request]]) -> Progress:
    requests = [request for group in groups for request in group]
    return Progress(
        prompt_tokens=sum(max(map(_prompt_done, group)) for group in groups),
        total_prompt_tokens=sum(len(group[0].prompt_ids) for group in groups),
        answer_tokens=sum(len(request.output_ids) for request in requests),
        max_answer_tokens=sum(request.params.max_tokens for request in requests),
    )


def _prompt_done(request: Request) -> int:
    if request.output_ids:
        return len(request.prompt_ids)
    return 0 if request.sequence is None else request.sequence.num_tokens


def _cut(pieces: Iterable[tuple[Part, str]], cutter: StopCutter) -> Iterator[tuple[Part, str]]:
    """The pieces, answers only up to a stop string."""
    for part, text in pieces:
        ready = cutter.push(text) if part == "answer" else text
        if ready:
            yield part, ready


def special_tokens(
    model: M1ForCausalLM, tokenizer: Tokenizer | None, thinking_message: str = LANDING_MESSAGE
) -> SpecialTokens:
    """What the engine needs of a tokenizer. The end of sentence is the tokenizer's, where it names
    one: the published config.json says null."""
    eos = model.config.eos_token_id
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        eos = tokenizer.eos_token_id
    eos_token_ids = frozenset[int]() if eos is None else frozenset({eos})
    if tokenizer is None:
        return SpecialTokens(vocab_size=model.config.vocab_size, eos_token_ids=eos_token_ids)
    return SpecialTokens(
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=eos_token_ids,
        think_open=tuple(tokenizer.encode(THINK_OPEN, allow_special=True)),
        think_close=tuple(tokenizer.encode(THINK_CLOSE, allow_special=True)),
        landing_message=tuple(tokenizer.encode(thinking_message)),
        is_blank=lambda token: tokenizer.token_bytes(token).isspace(),
        ends_sentence=lambda token: ends_sentence(
            tokenizer.token_bytes(token).decode("utf-8", "replace")
        ),
    )


def load_tokenizer(path_or_name: str | Path) -> Tokenizer | None:
    """The tokenizer beside a model's weights, or None where there is none."""
    from openm1.chat.gguf_vocabulary import DUMMY_MODEL
    from openm1.model.gguf import read_gguf_tokenizer_fields
    from openm1.model.hf import resolve_path

    path = resolve_path(path_or_name)
    if path.suffix == ".gguf":
        fields = read_gguf_tokenizer_fields(path)
        return None if fields["model"] == DUMMY_MODEL else Tokenizer.from_gguf_fields(**fields)
    if (path / "tokenizer.json").is_file():
        return Tokenizer.from_pretrained(path)
    return None
