"""Which chat format a tokenizer speaks, and M1's own.

`chat_format_for(tokenizer)` picks the format. A tokenizer with M1's sentence tokens gets M1's
format, written out here: equal to the published template where that works, and right where it
fails (string content, tool calls of the assistant). Any other tokenizer's own Jinja template is
rendered as transformers does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby

from openm1.chat.format import ChatFormat, Segment, tool_dict
from openm1.chat.jinja_format import JinjaChatFormat
from openm1.chat.tokenizer import (
    BEGIN_OF_DOCUMENT,
    BEGINNING_OF_SENTENCE,
    END_OF_SENTENCE,
    Tokenizer,
)
from openm1.chat.tools import TOOL_CALLS_CLOSE, format_tool_calls
from openm1.types import Message, ToolSpec

__all__ = ["ChatFormat", "M1ChatFormat", "chat_format_for"]

# The published template quotes the keys of its example with doubled quotes, which Jinja reads as
# the end of one string and the start of the next: what the model was shown has no quotes there.
M1_TOOLS_OPEN = "You are provided with these tools:\n<tools>\n"
M1_TOOLS_CLOSE = (
    "</tools>\n\nIf you need to call tools, please respond with <tool_calls></tool_calls> XML tags,"
    " and provide tool-name and json-object of arguments, following the format below:\n"
    "<tool_calls>\n{name: <tool-name-1>, arguments: <args-json-object-1>}\n...\n</tool_calls>"
)


def chat_format_for(tokenizer: Tokenizer) -> ChatFormat:
    """ValueError when the tokenizer has neither M1's sentence tokens nor a chat template."""
    sentence = (BEGINNING_OF_SENTENCE, END_OF_SENTENCE)
    if all(tokenizer.special_id(token) is not None for token in sentence):
        return M1ChatFormat(tokenizer)
    if tokenizer.chat_template is None:
        raise ValueError(
            "this tokenizer has no chat template, so it cannot chat; allowed are a tokenizer with a"
            f" chat_template or with the special tokens {' and '.join(sentence)}"
        )
    return JinjaChatFormat(tokenizer)


class M1ChatFormat(ChatFormat):
    """M1's sentences: `<beginning_of_sentence>role name=...\\n...<end_of_sentence>\\n`.

    All system messages stand joined at the front. Tool results that follow each other share one
    sentence, as the published guide shows for parallel calls.
    """

    def segments(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
        add_generation_prompt: bool,
        *,
        need_mask: bool = False,
    ) -> list[Segment]:
        segments = self._own(BEGIN_OF_DOCUMENT)
        system = "".join(message.content for message in messages if message.role == "system")
        if system:
            segments += self._sentence(
                "system ai_setting=assistant", [Segment(system, None, False)]
            )
        if tools:
            schemas = "".join(
                json.dumps(tool_dict(tool), ensure_ascii=False) + "\n" for tool in tools
            )
            body = [
                *self._own(M1_TOOLS_OPEN),
                Segment(schemas, None, False),
                *self._own(M1_TOOLS_CLOSE),
            ]
            segments += self._sentence("system tool_setting=tools", body)
        names: dict[str, str] = {}
        turns = [message for message in messages if message.role != "system"]
        for role, group in groupby(turns, key=lambda message: message.role):
            if role == "tool":
                results = "".join(_tool_result(message, names) for message in group)
                segments += self._sentence("tool name=tools", [Segment(results, None, False)])
                continue
            for message in group:
                names |= {call.id: call.name for call in message.tool_calls if call.id}
                segments += self._turn(message)
        if add_generation_prompt:
            segments += self._own(BEGINNING_OF_SENTENCE + "ai name=assistant\n")
        return segments

    def _turn(self, message: Message) -> list[Segment]:
        if message.role == "user":
            return self._sentence("user name=user", [Segment(message.content, None, False)])
        return self._sentence("ai name=assistant", self._reply(message), learn=True)

    def _sentence(self, header: str, body: list[Segment], *, learn: bool = False) -> list[Segment]:
        return [*self._own(f"{BEGINNING_OF_SENTENCE}{header}\n"), *body, *self._end(learn=learn)]

    def _end(self, *, learn: bool = False) -> list[Segment]:
        # The engine stops at <end_of_sentence>: the line break after it is never the model's.
        return [*self._own(END_OF_SENTENCE, learn=learn), Segment("\n", None, False)]

    def _reply(self, message: Message) -> list[Segment]:
        segments = [*self._thought(message.reasoning), Segment(message.content, None, True)]
        if message.tool_calls:
            gap = "\n" if message.content and not message.content.endswith("\n") else ""
            block = format_tool_calls(message.tool_calls)
            opening, _, lines = block.partition("\n")
            lines = lines.removesuffix(TOOL_CALLS_CLOSE)
            segments += [
                *self._own(gap + opening + "\n", learn=True),
                Segment(lines, None, True),
                *self._own(TOOL_CALLS_CLOSE, learn=True),
            ]
        return segments


def _tool_result(message: Message, names: Mapping[str, str]) -> str:
    name = message.name or names.get(message.tool_call_id or "")
    if not name:
        raise ValueError(
            "a tool message needs a name, or the tool_call_id of an earlier call; its tool_call_id"
            f" is {message.tool_call_id!r}, earlier calls are {sorted(names)}"
        )
    return f"tool name: {name}\ntool result: {message.content}\n\n"
