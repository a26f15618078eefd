"""M1's thoughts and tool calls out of its replies, for vLLM's API server.

The reading is OpenM1's own (`openm1.chat.thinking`, `openm1.chat.tools`): on text, because M1's
`<think>` is no single token. vLLM makes a parser for each request, so a parser may hold a stream.
`engine_based_streaming` is vLLM's name for parsers that hold text back and are asked for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.reasoning.abs_reasoning_parsers import ReasoningParser
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tool_parsers.abstract_tool_parser import ToolParser

from openm1.chat.thinking import THINK_CLOSE, THINK_OPEN, ThoughtSplitter, split_thought
from openm1.chat.tokenizer import BEGINNING_OF_SENTENCE
from openm1.chat.tools import ToolCallParser, parse_tool_calls
from openm1.types import ToolCall as M1ToolCall

TAG_MAX_TOKENS = len(THINK_CLOSE)
"""A token is at least a byte."""


class M1ReasoningParser(ReasoningParser):
    """`--reasoning-parser minimax_m1`; its two strings are what `thinking_token_budget` needs."""

    engine_based_streaming = True
    reasoning_start_str = THINK_OPEN
    reasoning_end_str = THINK_CLOSE

    def __init__(self, tokenizer, *args, **kwargs) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._sentence_id = self.vocab.get(BEGINNING_OF_SENTENCE)
        self._splitter = ThoughtSplitter()
        self._ended = False

    def extract_reasoning(self, model_output, request) -> tuple[str | None, str | None]:
        """A thought that never closes is all reasoning."""
        reasoning, answer = split_thought(model_output, opened=self._splitter.in_thought)
        return reasoning, answer or None

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        return self._message(self._splitter.push(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        return self._message(self._splitter.flush())

    def has_engine_confirmed_reasoning_end(self) -> bool:
        return self._ended

    def adjust_initial_state_from_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        """A prompt may open the thought itself."""
        if self._last_sentence(prompt_token_ids).rstrip().endswith(THINK_OPEN):
            self._splitter = ThoughtSplitter(opened=True)

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether the last sentence of `input_ids` has a closed thought."""
        return THINK_CLOSE in self._last_sentence(input_ids)

    def is_reasoning_end_streaming(
        self, input_ids: Sequence[int], delta_ids: Iterable[int]
    ) -> bool:
        window = len(list(delta_ids)) + TAG_MAX_TOKENS
        return THINK_CLOSE in self._last_sentence(input_ids[-window:])

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """The tokens after the one that closes the thought."""
        for end in range(1, len(input_ids) + 1):
            if THINK_CLOSE in self._decode(input_ids[max(0, end - TAG_MAX_TOKENS) : end]):
                return input_ids[end:]
        return []

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        ids = list(token_ids)
        if not self._decode(ids[:TAG_MAX_TOKENS]).lstrip().startswith(THINK_OPEN):
            return 0
        return len(ids) - len(self.extract_content_ids(ids))

    def _message(self, pieces: list[tuple[str, str]]) -> DeltaMessage | None:
        self._ended = self._splitter.in_answer
        parts = {
            kind: "".join(text for part, text in pieces if part == kind) or None
            for kind in ("reasoning", "answer")
        }
        if not any(parts.values()):
            return None
        return DeltaMessage(reasoning=parts["reasoning"], content=parts["answer"])

    def _last_sentence(self, ids: Sequence[int]) -> str:
        ids = list(ids)
        if self._sentence_id in ids:
            ids = ids[len(ids) - ids[::-1].index(self._sentence_id) :]
        return self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.model_tokenizer.decode(list(ids))


class M1ToolParser(ToolParser):
    """`--tool-call-parser minimax_m1`: JSON lines between `<tool_calls>` and `</tool_calls>`."""

    engine_based_streaming = True

    def __init__(self, tokenizer, tools=None) -> None:
        super().__init__(tokenizer, tools)
        self._parser = ToolCallParser()

    def adjust_request(self, request):
        """Raises ValueError where vLLM would stream nothing."""
        if request.tools and request.tool_choice == "required" and request.stream:
            raise ValueError(
                'tool_choice is "required" in a stream; with this parser allowed are "auto" and a '
                "named tool in a stream, or required calls without one"
            )
        return super().adjust_request(request)

    def extract_tool_calls(self, model_output, request) -> ExtractedToolCallInformation:
        content, calls = parse_tool_calls(model_output)
        return ExtractedToolCallInformation(
            tools_called=bool(calls),
            tool_calls=[
                ToolCall(function=FunctionCall(name=call.name, arguments=call.arguments))
                for call in calls
            ],
            content=content or None,
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request,
    ) -> DeltaMessage | None:
        return self._message(self._parser.push(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        return self._message(self._parser.flush())

    def _message(self, items: list[str | M1ToolCall]) -> DeltaMessage | None:
        """A call leaves whole, when its line has ended."""
        content = "".join(item for item in items if isinstance(item, str)) or None
        calls = [self._delta(item) for item in items if isinstance(item, M1ToolCall)]
        return DeltaMessage(content=content, tool_calls=calls) if content or calls else None

    def _delta(self, call: M1ToolCall) -> DeltaToolCall:
        # vLLM looks here to see what was called, and whether some of it is still to be sent.
        self.prev_tool_call_arr.append({"name": call.name, "arguments": call.arguments})
        self.streamed_args_for_tool.append(call.arguments)
        self.current_tool_id += 1
        return DeltaToolCall(
            id=make_tool_call_id(),
            type="function",
            index=self.current_tool_id,
            function=DeltaFunctionCall(name=call.name, arguments=call.arguments),
        )
