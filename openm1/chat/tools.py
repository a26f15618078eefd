"""Tool calls out of an answer.

The model writes calls as JSON lines between two tags::

    <tool_calls>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_calls>

Give these functions the answer only (see `thinking`): what a thought says about tools is no call.

No text is lost and nothing raises, whatever the model wrote. A line that is no call stays in the
content as it stands; a block without a single call stays there whole, tags included; a block that
never closes counts up to the end of the text. Blank characters around a block go with the block;
one line break stays where there is text on both sides.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any, Generic, NoReturn, TypeVar

from openm1.chat.thinking import partial_suffix
from openm1.types import ToolCall

TOOL_CALLS_OPEN = "<tool_calls>"
TOOL_CALLS_CLOSE = "</tool_calls>"

C = TypeVar("C")


def parse_tool_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """(content without the calls, the calls with ids call_0, call_1, ...)."""
    parser = ToolCallParser()
    items = parser.push(text) + parser.flush()
    content = "".join(item for item in items if isinstance(item, str))
    return content, tuple(item for item in items if isinstance(item, ToolCall))


def format_tool_calls(calls: tuple[ToolCall, ...]) -> str:
    """The block as the model writes it; ValueError when a call's arguments are no JSON object."""
    lines = []
    for call in calls:
        name = json.dumps(call.name, ensure_ascii=False)
        lines.append(f'{{"name": {name}, "arguments": {normal_arguments(call.arguments)}}}')
    return "\n".join([TOOL_CALLS_OPEN, *lines, TOOL_CALLS_CLOSE])


def normal_arguments(arguments: str) -> str:
    """The same JSON object on one line, in valid JSON; ValueError when it is no JSON object."""
    try:
        return _dump_object(_DECODER.decode(arguments))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tool arguments must be a JSON object, got {arguments!r}") from error


class CallLines(ABC, Generic[C]):
    """Text apart from calls, of which each is a `C`, in text that arrives in pieces.

    `push` and `flush` return text (str) and calls in order. A call leaves when its line ends. Lines
    that come before a block's first call wait for it.
    """

    def __init__(self) -> None:
        self._next_index = 0
        self._held = ""
        self._in_block = False
        self._blanks_before = ""
        # What a block without calls gives back: its text so far, and its lines that are no calls.
        self._block_text = ""
        self._odd_lines: list[str] = []
        self._block_has_call = False
        self._line = _LineScan()
        self._any_text = False
        self._after_block = False

    def push(self, text: str) -> list[str | C]:
        self._held += text
        items: list[str | C] = []
        while self._step_block(items) if self._in_block else self._step_text(items):
            pass
        return items

    def flush(self) -> list[str | C]:
        """What was held back because more could have followed."""
        items: list[str | C] = []
        while self._in_block:
            self._step_block(items, at_end=True)
            items += self.push("")
        self._emit(items, self._held)
        self._held = ""
        return items

    def _step_text(self, items: list[str | C]) -> bool:
        """Emits what is surely content; True when a block has opened."""
        before, opened, after = self._held.partition(TOOL_CALLS_OPEN)
        if opened:
            ready = before.rstrip()
            self._blanks_before = before[len(ready) :]
            self._in_block, self._block_has_call = True, False
            self._block_text, self._odd_lines, self._line = opened, [], _LineScan()
            self._held = after
        else:
            certain = len(before) - partial_suffix(before, TOOL_CALLS_OPEN)
            ready = before[:certain].rstrip()
            self._held = before[len(ready) :]
        self._emit(items, ready)
        return bool(opened)

    def _step_block(self, items: list[str | C], *, at_end: bool = False) -> bool:
        """Takes one line of the block; True when there may be more to take."""
        found = self._line.end(self._held)
        if found is None:
            if not at_end:
                return False
            found = len(self._held), ""
        end, tag = found
        calls = _parse_line(self._held[:end])
        if calls is None and tag != TOOL_CALLS_CLOSE and TOOL_CALLS_CLOSE in self._held[:end]:
            # The tag looked quoted, but the line is broken: take the tag at its word.
            end, tag = self._held.index(TOOL_CALLS_CLOSE), TOOL_CALLS_CLOSE
            calls = _parse_line(self._held[:end])
        line = self._held[:end]
        self._restart_line(self._held[end + len(tag) :])
        self._block_text += line + tag
        self._take_line(items, line, calls)
        if tag != "\n":
            self._in_block = False
            if not self._block_has_call:
                self._emit(items, self._blanks_before + self._block_text)
        return True

    def _restart_line(self, held: str) -> None:
        self._held, self._line = held, _LineScan()

    def _take_line(
        self, items: list[str | C], line: str, calls: list[tuple[str, str]] | None
    ) -> None:
        if calls is None:
            self._odd_lines.append(line.strip())
        if calls:
            self._block_has_call = True
        if self._block_has_call:
            self._release_odd_lines(items)
        for name, arguments in calls or ():
            items.append(self._call(self._next_index, name, arguments))
            self._next_index += 1

    def _release_odd_lines(self, items: list[str | C]) -> None:
        """Lines that are no calls, once their block has a call."""
        self._after_block = True
        for odd_line in self._odd_lines:
            self._emit(items, odd_line)
            self._after_block = True
        self._odd_lines = []

    @abstractmethod
    def _call(self, index: int, name: str, arguments: str) -> C: ...

    def _emit(self, items: list[str | C], text: str) -> None:
        if self._after_block:
            text = text.lstrip()
        if not text:
            return
        if self._after_block and self._any_text:
            text = "\n" + text
        self._any_text, self._after_block = True, False
        items.append(text)


class ToolCallParser(CallLines[ToolCall]):
    """`parse_tool_calls` for text that arrives in pieces."""

    def _call(self, index: int, name: str, arguments: str) -> ToolCall:
        return ToolCall(name=name, arguments=arguments, id=f"call_{index}")


class _LineScan:
    """Finds where a line of the block ends, reading each character once however it arrives."""

    def __init__(self) -> None:
        self._position = 0
        self._in_string = False
        self._escaped = False

    def end(self, text: str) -> tuple[int, str] | None:
        """(position, what ends the line); a closing tag inside a JSON string does not end it."""
        while self._position < len(text):
            character = text[self._position]
            if character == "\n":
                return self._position, "\n"
            if self._in_string:
                closes = character == '"' and not self._escaped
                self._escaped = character == "\\" and not self._escaped
                self._in_string = not closes
            elif character == '"':
                self._in_string = True
            elif character == "<":
                tail = text[self._position : self._position + len(TOOL_CALLS_CLOSE)]
                if tail == TOOL_CALLS_CLOSE:
                    return self._position, TOOL_CALLS_CLOSE
                if TOOL_CALLS_CLOSE.startswith(tail):
                    return None
            self._position += 1
        return None


def _parse_line(line: str) -> list[tuple[str, str]] | None:
    """The (name, arguments) of each call on the line; [] for a blank one, None for no call."""
    calls, position, line = [], 0, line.strip()
    while position < len(line):
        try:
            value, position = _DECODER.raw_decode(line, position)
            calls.append(_read_call(value))
        except (ValueError, RecursionError):
            return None
        while line[position : position + 1].isspace():
            position += 1
    return calls


def _read_call(value: Any) -> tuple[str, str]:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError(f"a call is an object with a name, got {value!r}")
    value["name"].encode()  # A lone surrogate could not leave as UTF-8: that is no function.
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):  # Some models quote the object once more.
        arguments = _DECODER.decode(arguments)
    return value["name"], _dump_object(arguments)


def _dump_object(value: Any) -> str:
    if not isinstance(value, dict):
        raise ValueError(f"arguments are a JSON object, got {value!r}")
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # Escaped, a lone surrogate is still valid JSON.
        text = json.dumps(value, allow_nan=False)
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
