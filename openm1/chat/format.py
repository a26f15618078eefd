"""What every chat format is: messages to prompt ids, and to ids with a training mask.

Whatever the format, a conversation becomes segments: special tokens that the format itself wrote,
and runs of ordinary text, each encoded on its own. So no text of a user, a tool or a schema can
become a special token, and a run that the model writes begins exactly where its prompt ended:
`encode_with_mask(messages)` starts with `encode(messages[:-1])`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from openm1.chat.thinking import THINK_CLOSE, THINK_OPEN
from openm1.chat.tokenizer import Tokenizer
from openm1.types import Message, ToolSpec


class Segment(NamedTuple):
    text: str
    token_id: int | None
    """Set for a special token, None for ordinary text."""
    learn: bool
    """True on what the assistant has to produce."""


class ChatFormat(ABC):
    """How one family of models writes a conversation.

    A message's reasoning, when it is not None, is written before its content. Where `<think>` is a
    single token: `<think>{reasoning}</think>{content}`. Where it is text, as M1 writes it:
    `<think>\\n{reasoning}\\n</think>\\n\\n{content}`. Reasoning "" writes an empty thought. Tool
    calls follow the content on a line of their own.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as text, for people; text loses what is special, so encode messages."""
        return "".join(s.text for s in self.segments(messages, tools, add_generation_prompt))

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        return self._ids(self.segments(messages, tools, add_generation_prompt))[0]

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()
    ) -> tuple[list[int], int | None]:
        """(the prompt of the next reply, how many of its ids are the conversation so far).

        The later turn may leave out a thought that follows here; then its prompt differs from this
        one behind those. None where a template writes the two differently from an earlier place on.
        """
        segments = self.segments(messages, tools, True)
        so_far = self.segments(messages, tools, False)
        behind = segments[len(so_far) :]
        if segments[: len(so_far)] == so_far and behind and behind[0].token_id is not None:
            # No run of text spans the two, so neither need be encoded twice.
            ids, _ = self._ids(so_far)
            return ids + self._ids(behind)[0], len(ids)
        ids, before = self._ids(segments)[0], self._ids(so_far)[0]
        return ids, len(before) if ids[: len(before)] == before else None

    def encode_with_mask(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()
    ) -> tuple[list[int], list[bool]]:
        """The whole conversation; True on each thought, answer, call and end of the assistant.

        ValueError when a Jinja template does not tell where the assistant's words begin and end.
        """
        return self._ids(self.segments(messages, tools, False, need_mask=True))

    @abstractmethod
    def segments(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
        add_generation_prompt: bool,
        *,
        need_mask: bool = False,
    ) -> list[Segment]: ...

    def _ids(self, segments: Iterable[Segment]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        for segment in _joined(segments):
            if segment.token_id is None:
                ids += self.tokenizer.encode(segment.text)
            else:
                ids.append(segment.token_id)
            mask += [segment.learn] * (len(ids) - len(mask))
        return ids, mask

    def _own(self, text: str, *, learn: bool = False) -> list[Segment]:
        """Text of the format itself, in which special tokens are meant."""
        return [Segment(run, index, learn) for run, index in self.tokenizer.split_special(text)]

    def _thought(self, reasoning: str | None) -> list[Segment]:
        if reasoning is None:
            return []
        if self.tokenizer.special_id(THINK_OPEN) is not None:
            opening, closing = THINK_OPEN, THINK_CLOSE
        else:
            opening, closing = THINK_OPEN + "\n", "\n" + THINK_CLOSE + "\n\n"
        return [
            *self._own(opening, learn=True),
            Segment(reasoning, None, True),
            *self._own(closing, learn=True),
        ]


def tool_dict(tool: ToolSpec) -> dict[str, Any]:
    described = {"description": tool.description} if tool.description else {}
    return {"name": tool.name, **described, "parameters": dict(tool.parameters)}


def _joined(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Neighbouring text of one kind becomes one run: tokens may span it, as in the plain text."""
    held: Segment | None = None
    for segment in segments:
        if held and held.token_id is segment.token_id is None and held.learn == segment.learn:
            held = held._replace(text=held.text + segment.text)
            continue
        if held:
            yield held
        held = segment
    if held:
        yield held
