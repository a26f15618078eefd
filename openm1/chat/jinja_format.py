"""Conversations as a tokenizer's own Jinja template writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from openm1.chat.format import ChatFormat, Segment, tool_dict
from openm1.chat.tools import normal_arguments
from openm1.types import Message, ToolSpec


class JinjaChatFormat(ChatFormat):
    """The tokenizer's own template. What it cannot write is refused, never dropped in silence."""

    def segments(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
        add_generation_prompt: bool,
        *,
        need_mask: bool = False,
    ) -> list[Segment]:
        turns, schemas, mark = self._marked(messages, tools)
        whole = self._rendered(turns, schemas, add_generation_prompt)
        segments: list[Segment] = []
        position = 0
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            reply = self._reply_span(turns, index, schemas, whole, past=position)
            if reply is not None:
                segments += self._cut(whole[position : reply[0]], mark, learn=False)
                segments += self._cut(whole[reply[0] : reply[1]], mark, learn=True)
                position = reply[1]
            elif need_mask:
                raise ValueError(
                    f"cannot train on message {index}: the chat template does not show where the"
                    f" assistant's words begin and end (end token {self.tokenizer.eos_token!r})"
                )
        return segments + self._cut(whole[position:], mark, learn=False)

    def _reply_span(
        self, turns: list[Any], index: int, schemas: list[Any], whole: str, past: int
    ) -> tuple[int, int] | None:
        """Where assistant turn `index` stands in `whole`, from its first word to its end token.

        Found by rendering the conversation up to it and past it. A template for which those are
        not beginnings of the whole rewrites the past: such a reply has no place, hence None.
        """
        try:
            before = self._rendered(turns[:index], schemas, True)
            after = self._rendered(turns[: index + 1], schemas, False)
        except ValueError:
            return None  # The template refuses to stop there.
        end_token = self.tokenizer.eos_token
        stable = whole.startswith(after) and after.startswith(before) and len(before) >= past
        if not stable or not end_token or end_token not in after[len(before) :]:
            return None
        return len(before), after.index(end_token, len(before)) + len(end_token)

    def _cut(self, text: str, mark: str, *, learn: bool) -> list[Segment]:
        return [
            segment._replace(text=segment.text.replace(mark, ""))
            for segment in self._own(text, learn=learn)
        ]

    @cached_property
    def _template(self) -> Any:
        return _compile(self.tokenizer.chat_template or "")

    def _rendered(self, turns: list[Any], schemas: list[Any], add_generation_prompt: bool) -> str:
        import jinja2

        try:
            return self._template.render(
                messages=turns,
                tools=schemas or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.tokenizer.bos_token or "",
                eos_token=self.tokenizer.eos_token or "",
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> tuple[list[Any], list[Any], str]:
        """The template's messages and tools, in which a mark that no text contains breaks up every
        special token: those left in the rendered text are the template's own."""
        source = self.tokenizer.chat_template or ""
        if tools and "tools" not in source:
            raise ValueError("this model's chat template has no place for tools")
        if any(message.tool_calls for message in messages) and "tool_calls" not in source:
            raise ValueError("this model's chat template has no place for tool calls")
        plain = [_message_dict(message) for message in messages]
        schemas = [{"type": "function", "function": tool_dict(tool)} for tool in tools]
        taken = set(json.dumps([plain, schemas], ensure_ascii=False) + source)
        mark = next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in taken)

        def broken(text: str) -> str:
            runs = self.tokenizer.split_special(text)
            return "".join(run if index is None else mark.join(run) for run, index in runs)

        turns = _every_string(plain, broken)
        if "reasoning_content" not in source:
            for turn in turns:
                thought = self._thought(turn.pop("reasoning_content", None))
                turn["content"] = "".join(s.text for s in thought) + turn["content"]
        return turns, _every_string(schemas, broken), mark


def _message_dict(message: Message) -> dict[str, Any]:
    optional = {
        "reasoning_content": message.reasoning,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.loads(normal_arguments(call.arguments)),
                },
            }
            for call in message.tool_calls
        ]
        or None,
    }
    present = {key: value for key, value in optional.items() if value is not None}
    return {"role": message.role, "content": message.content, **present}


def _every_string(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _every_string(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_every_string(item, change) for item in value]
    return value


def _compile(source: str) -> Any:
    """The template in transformers' dialect of Jinja, sandboxed; ValueError when it is broken."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    # transformers' own {% generation %} tag only marks a region: any block does.
    source = re.sub(r"({%[-+]?\s*)generation(\s*[-+]?%})", r"\1if true\2", source)
    source = re.sub(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})", r"\1endif\2", source)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is no valid Jinja: {error}") from error
