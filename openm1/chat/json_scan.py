"""One JSON object that arrives in pieces: where it ends, and whether it still is one."""

from __future__ import annotations

import math
import re
from typing import Literal

# Deeper than this, common readers of JSON refuse (jiter at 200, Python's own at about a thousand).
MAX_DEPTH = 100
# Longer numbers are held by no double, and Python refuses to read those of 4,300 digits.
MAX_SCALAR_CHARACTERS = 400

_PLAIN = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]+')
# A surrogate comes as a pair: alone it could not leave as UTF-8.
_ESCAPE = re.compile(
    r'\\(?:["\\/bfnrt]|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r"|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
_ESCAPE_BEGUN = re.compile(
    r"\\(?:u[0-9a-fA-F]{0,3}"
    r"|u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u(?:[dD](?:[c-fC-F][0-9a-fA-F]?)?)?)?)?)?\Z"
)
_SCALAR = re.compile(r"[-+.0-9A-Za-z]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")

State = Literal["open", "whole", "broken"]
_Place = Literal["start", "key", "key or end", "colon", "value", "value or end", "next"]


class ObjectScan:
    """Follows a JSON object on one line.

    It is broken by what is not JSON, by a line break between values, and by what is JSON but cannot
    be passed on: numbers that no double holds, lone surrogates, more than `MAX_DEPTH` levels.
    """

    def __init__(self) -> None:
        self.state: State = "open"
        self._held = ""
        self._in_string = False
        self._place: _Place = "start"
        self._closers: list[str] = []

    def push(self, text: str) -> tuple[str, str]:
        """(what surely belongs to the object, what is left behind its end or its breach).

        A number, a literal or an escape that more could belong to is held back.
        """
        text, self._held = self._held + text, ""
        at = 0
        while at < len(text) and self.state == "open":
            end = self._string_end(text, at) if self._in_string else self._token_end(text, at)
            if end is None:
                self._held = text[at:]
                return text[:at], ""
            at = end
        return text[:at], text[at:]

    def _string_end(self, text: str, at: int) -> int | None:
        """The end of a run of a string's text; None where more must come to tell."""
        if text[at] == '"':
            self._in_string = False
            self._place = "colon" if self._place in ("key", "key or end") else "next"
            return at + 1
        found = (_ESCAPE if text[at] == "\\" else _PLAIN).match(text, at)
        if found is not None:
            return found.end()
        return None if _ESCAPE_BEGUN.match(text, at) else self._break(at)

    def _token_end(self, text: str, at: int) -> int | None:
        character = text[at]
        if character in " \t\r":
            return at + 1
        if self._closers and character == self._closers[-1]:
            return self._close(at)
        if character == "{" and self._place in ("start", "value", "value or end"):
            return self._open(at, "}", "key or end")
        if character == "[" and self._place in ("value", "value or end"):
            return self._open(at, "]", "value or end")
        if character == '"' and self._place in ("key", "key or end", "value", "value or end"):
            self._in_string = True
            return at + 1
        if character == ":" and self._place == "colon":
            self._place = "value"
            return at + 1
        if character == "," and self._place == "next":
            self._place = "key" if self._closers[-1] == "}" else "value"
            return at + 1
        if self._place in ("value", "value or end"):
            return self._scalar_end(text, at)
        return self._break(at)

    def _scalar_end(self, text: str, at: int) -> int | None:
        found = _SCALAR.match(text, at)
        if found is None or found.end() - at > MAX_SCALAR_CHARACTERS:
            return self._break(at)
        if found.end() == len(text):
            return None
        if not _is_scalar(found[0]):
            return self._break(at)
        self._place = "next"
        return found.end()

    def _open(self, at: int, closer: str, place: _Place) -> int:
        if len(self._closers) == MAX_DEPTH:
            return self._break(at)
        self._closers.append(closer)
        self._place = place
        return at + 1

    def _close(self, at: int) -> int:
        if self._place not in ("next", "key or end", "value or end"):
            return self._break(at)
        self._closers.pop()
        self._place = "next"
        if not self._closers:
            self.state = "whole"
        return at + 1

    def _break(self, at: int) -> int:
        self.state = "broken"
        return at


def _is_scalar(text: str) -> bool:
    if text in ("true", "false", "null"):
        return True
    return bool(_NUMBER.fullmatch(text)) and math.isfinite(float(text))
