"""Tool calls as they are written: the name once it is known, then the arguments piece by piece."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from openm1.chat.json_scan import ObjectScan
from openm1.chat.tools import CallLines

# A line that is a call from here on, whatever follows. Longer names wait for the end of their line.
_HEAD = re.compile(
    r'[ \t\r]*\{[ \t]*"name"[ \t]*:[ \t]*("(?:[^"\\\x00-\x1f]|\\.){1,256}")[ \t]*,'
    r'[ \t]*"arguments"[ \t]*:[ \t]*(?=\{)'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CallPart:
    """What has been added to a call."""

    index: int
    """Of the call among the reply's, from 0."""
    name: str
    arguments: str
    """The next of its arguments, as the model writes them: valid JSON, once they are whole."""
    begins: bool
    """Whether this is the call's first part."""
    is_whole: bool
    """Whether the arguments end here. A call without such a part was cut off or is broken."""
    id: str = ""


class ToolCallStream(CallLines[CallPart]):
    """`tools.ToolCallParser` for those who do not wait for the end of a line.

    Once a line has its name and the brace that opens the arguments it is a call and stays one.
    Arguments end where they turn out to be no JSON (see `ObjectScan`); what is left of the line is
    then text. Lines of another form (arguments first, or quoted) leave when they end, in one part.
    Where the text ends within arguments, a number or escape that is cut through is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._name = ""
        self._arguments: ObjectScan | None = None
        # The arguments have ended, the call's own brace is to come.
        self._is_closing = False

    def _step_block(self, items: list[str | CallPart], *, at_end: bool = False) -> bool:
        if self._arguments is not None:
            return self._take_arguments(items, self._arguments, at_end=at_end)
        if self._is_closing:
            return self._take_brace(at_end=at_end)
        head = _HEAD.match(self._held)
        name = None if head is None else _read_name(head[1])
        if head is None or name is None:
            return super()._step_block(items, at_end=at_end)
        self._held = self._held[head.end() :]
        self._name, self._arguments = name, ObjectScan()
        self._block_has_call = True
        self._release_odd_lines(items)
        items.append(self._part("", begins=True, is_whole=False))
        return True

    def _take_arguments(
        self, items: list[str | CallPart], scan: ObjectScan, *, at_end: bool
    ) -> bool:
        text, self._held = scan.push(self._held)
        is_whole = scan.state == "whole"
        if text:
            items.append(self._part(text, begins=False, is_whole=is_whole))
        if scan.state == "open" and not at_end:
            return False
        self._arguments, self._is_closing = None, is_whole
        self._next_index += 1
        self._restart_line(self._held)
        self._in_block = scan.state != "open"
        return True

    def _take_brace(self, *, at_end: bool) -> bool:
        rest = self._held.lstrip(" \t\r")
        if not rest and not at_end:
            return False
        self._is_closing = False
        self._restart_line(rest.removeprefix("}"))
        return True

    def _part(self, arguments: str, *, begins: bool, is_whole: bool) -> CallPart:
        return CallPart(
            index=self._next_index,
            name=self._name,
            arguments=arguments,
            begins=begins,
            is_whole=is_whole,
        )

    def _call(self, index: int, name: str, arguments: str) -> CallPart:
        scan = ObjectScan()
        arguments, _ = scan.push(arguments)
        is_whole = scan.state == "whole"
        return CallPart(index=index, name=name, arguments=arguments, begins=True, is_whole=is_whole)


def _read_name(quoted: str) -> str | None:
    try:
        name = json.loads(quoted)
        name.encode()
    except ValueError:  # An escape that is none, or a lone surrogate, which no function has.
        return None
    return name
