"""Answers that must have a form: JSON, a JSON schema, a regular expression, a call of a tool.

llguidance (MIT) says which tokens may come next. The grammar acts on the answer alone: the engine
starts it behind the thought.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import llguidance
import numpy as np

from openm1.chat.tokenizer import Tokenizer
from openm1.chat.tools import TOOL_CALLS_CLOSE, TOOL_CALLS_OPEN
from openm1.server.errors import bad_request
from openm1.types import ToolSpec

MAX_PARALLEL_CALLS = 16
# What ends JSON and a block of calls, in the order in which one thing stands inside another.
_ENDS = ('"', "}", "]", "<", ",")
# As models write JSON, and as `json.dumps` does. Free blanks would let a model write them for ever.
_JSON_STYLE: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


class AnswerGrammar:
    """`protocols.Grammar` for one reply."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str,
        param: str,
        *,
        landing_tokens: int = 0,
        has_form: bool = True,
    ) -> None:
        """`source` is llguidance's form of a grammar. With so many tokens left as `landing_tokens`
        an answer is led to its end by the shortest way, so that it is whole. Raises ApiError,
        naming `param`, for a grammar that cannot be read or that no answer fits."""
        self.has_form = has_form
        """False where plain text will do."""
        self.source = source
        self._landing_tokens = landing_tokens
        ends = [tokenizer.token_id(text) for text in _ENDS]
        self._ends = [tokenizer.eos_token_id, *ends]
        self._template = _compiled(tokenizer, source)
        self._eos = tokenizer.eos_token_id or 0
        self._num_ids = tokenizer.vocab_size
        self.error: str | None = None
        """Why the grammar gave up in the middle of an answer, which then ended."""
        if reason := self._why_hopeless():
            raise bad_request(f"{param} cannot be followed: {reason}", param, "invalid_grammar")

    def _why_hopeless(self) -> str:
        """Tries a first token; "" where it can be gone on from."""
        matcher = self._template.deep_copy()
        if matcher.is_error():
            return first_line(matcher)
        mask = mask_of(matcher, self._num_ids)
        if not np.delete(mask, self._eos).any() and not matcher.is_accepting():
            return first_line(matcher) or "no answer fits it"
        matcher.try_consume_tokens([int(np.flatnonzero(mask)[0])])
        return first_line(matcher)

    def start(self) -> AnswerMatcher:
        return AnswerMatcher(self, self._template.deep_copy(), self._num_ids, self._eos)

    def lead_to_end(self, mask: np.ndarray, num_left: int) -> None:
        """In place: of what is allowed only what closes most, when it is time to land."""
        if num_left > self._landing_tokens:
            return
        closing = next((end for end in self._ends if end is not None and mask[end]), None)
        if closing is not None:
            mask[:] = False
            mask[closing] = True


class AnswerMatcher:
    """`protocols.GrammarMatcher` over llguidance's."""

    def __init__(
        self, grammar: AnswerGrammar, matcher: llguidance.LLMatcher, num_ids: int, eos: int
    ) -> None:
        self._grammar, self._matcher = grammar, matcher
        self._num_ids, self._eos = num_ids, eos

    def consume(self, token_id: int) -> bool:
        taken = self._matcher.try_consume_tokens([token_id]) == 1
        # A grammar that has given up has no say any more; the answer ends with the next token.
        return self._note_error() or taken

    def allowed(self, num_left: int) -> np.ndarray:
        mask = mask_of(self._matcher, self._num_ids)
        if not self._note_error() and not mask.any():
            self._grammar.error = "no token may follow what the answer has"
        if self._grammar.error is not None:
            mask[:] = False
            mask[self._eos] = True
        self._grammar.lead_to_end(mask, num_left)
        return mask

    def _note_error(self) -> bool:
        if self._matcher.is_error():
            self._grammar.error = first_line(self._matcher)
        return self._grammar.error is not None


def json_schema_source(schema: Any, param: str) -> str:
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides=_JSON_STYLE
        )
    except (ValueError, RecursionError) as error:
        raise bad_request(f"{param} cannot be read: {error}", param, "invalid_grammar") from error


def json_object_source() -> str:
    return json_schema_source({"type": "object"}, "response_format")


def regex_source(pattern: str) -> str:
    return llguidance.LLMatcher.grammar_from_regex(pattern)


def tool_calls_source(tools: Sequence[ToolSpec], *, parallel: bool) -> str:
    """A block of calls as `chat.tools` reads it: one or more of `tools`, nothing else."""
    rules = [f'start: "{TOOL_CALLS_OPEN}" calls', *_call_rules(tools, parallel)]
    return llguidance.LLMatcher.grammar_from_lark("\n".join(rules))


def text_or_calls_source(
    tools: Sequence[ToolSpec], strict: Container[str], *, parallel: bool
) -> str:
    """Text, and if the model likes a block of calls behind it, which ends the answer. Arguments of
    tools named in `strict` fit their schemas; the others' are any JSON objects."""
    rules = [
        "start: until_calls calls | TEXT",
        # The tag begins a call wherever it comes.
        f'until_calls[lazy]: ANY "{TOOL_CALLS_OPEN}"',
        f"TEXT: ANY & ~/(?s:.*{TOOL_CALLS_OPEN}.*)/",
        "ANY: /(?s:.*)/",
        *_call_rules(_loosened(tools, strict), parallel),
    ]
    return llguidance.LLMatcher.grammar_from_lark("\n".join(rules))


def form_or_calls_source(
    form: str, tools: Sequence[ToolSpec], strict: Container[str], *, parallel: bool
) -> str:
    """Either an answer that fits the source `form`, or a block of calls."""
    start = f'start: "{TOOL_CALLS_OPEN}" calls | @form'
    rules = [start, *_call_rules(_loosened(tools, strict), parallel)]
    (grammar,) = json.loads(form)["grammars"]
    choice = {"name": "choice", "lark_grammar": "\n".join(rules)}
    return json.dumps({"grammars": [choice, {**grammar, "name": "form"}]})


def _call_rules(tools: Sequence[ToolSpec], parallel: bool) -> list[str]:
    """Rules for `calls`: what stands behind the tag that opens a block of them."""
    names = " | ".join(f"call{i}" for i in range(len(tools)))
    most = MAX_PARALLEL_CALLS if parallel else 1
    rules = [f'calls: call{{1,{most}}} "\\n{TOOL_CALLS_CLOSE}"', f'call: "\\n" ({names})']
    for i, tool in enumerate(tools):
        head = json.dumps({"name": tool.name})[:-1] + ', "arguments": '
        # Arguments are an object in any case, and in the style the tool parser writes.
        schema = {"type": "object", **tool.parameters, "x-guidance": _JSON_STYLE}
        rules.append(f'call{i}: {json.dumps(head)} arguments{i} "}}"')
        rules.append(f"arguments{i}: %json {json.dumps(schema)}")
    return rules


def _loosened(tools: Sequence[ToolSpec], strict: Container[str]) -> list[ToolSpec]:
    return [tool if tool.name in strict else replace(tool, parameters={}) for tool in tools]


def landing_tokens(tokenizer: Tokenizer, tools: Sequence[ToolSpec]) -> int:
    """What a call needs at most to end, once its strings and numbers are cut short."""
    longest = max(
        (json.dumps(dict.fromkeys(tool.parameters.get("required", ()), "")) for tool in tools),
        key=len,
    )
    return 2 * len(tokenizer.encode(longest + TOOL_CALLS_CLOSE))


def mask_of(matcher: llguidance.LLMatcher, num_ids: int) -> np.ndarray:
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(bits, bitorder="little")[:num_ids].astype(bool)


def first_line(matcher: llguidance.LLMatcher) -> str:
    """What is wrong with a matcher, without its inner state; "" for nothing."""
    return (matcher.get_error().splitlines() or [""])[0][:300]


@lru_cache(maxsize=64)
def _compiled(tokenizer: Tokenizer, source: str) -> llguidance.LLMatcher:
    limits = llguidance.LLParserLimits(verbose_errors=False)
    return llguidance.LLMatcher(_vocabulary(tokenizer), source, log_level=0, limits=limits)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer)), slices=[])


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_token_id is None:
            raise bad_request("this model has no end of sentence, which grammars need")
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.tokens = [_bytes_of(tokenizer, index) for index in range(tokenizer.vocab_size)]
        # Where the tags around calls are single tokens, a grammar that spells them means those too.
        tags = (TOOL_CALLS_OPEN, TOOL_CALLS_CLOSE)
        special = tokenizer.special_tokens.items()
        self.special_token_ids = [index for text, index in special if text not in tags]

    def __call__(self, text: bytes | str) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(text)


def _bytes_of(tokenizer: Tokenizer, index: int) -> bytes:
    try:
        return tokenizer.token_bytes(index)
    except ValueError:  # An id that no token has.
        return b""
