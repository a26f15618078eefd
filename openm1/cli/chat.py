"""A conversation on a terminal: the thought dim, the answer plain."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console

from openm1.cli.progress import ProgressDisplay
from openm1.engine.llm import LLM
from openm1.types import Completion, Message, SamplingParams

NOTES = {"length": "[stopped at max_tokens]", "repetition": "[stopped: it repeats itself]"}
HELP = "/new starts afresh, /budget N limits the thought (/budget off frees it), /exit ends."


def run_chat(llm: LLM, params: SamplingParams, *, system: str, question: str) -> None:
    """Answers `question`, or, if it is empty, each line of standard input."""
    console = Console(highlight=False, soft_wrap=True)
    start = [Message(role="system", content=system)] if system else []
    if question:
        _answer(llm, [*start, Message(role="user", content=question)], params, console)
        return
    if sys.stdin.isatty():
        console.print(HELP, style="dim")
    messages = list(start)
    for line in _lines(console):
        if line == "/exit":
            return
        if line == "/new":
            messages = list(start)
        elif line.startswith("/budget"):
            params = _with_budget(params, line, console)
        elif line.startswith("/"):
            console.print(f"unknown command {line.split()[0]}. {HELP}", markup=False)
        else:
            messages.append(Message(role="user", content=line))
            reply = _answer(llm, messages, params, console)
            messages.append(reply)


def _lines(console: Console) -> Iterator[str]:
    while True:
        try:
            line = console.input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def _with_budget(params: SamplingParams, line: str, console: Console) -> SamplingParams:
    words = line.split()[1:]
    if words == ["off"]:
        return replace(params, thinking_budget=None)
    if len(words) == 1 and words[0].isdecimal():
        return replace(params, thinking_budget=int(words[0]))
    console.print("give /budget a number of tokens, or off")
    return params


def _answer(llm: LLM, messages: list[Message], params: SamplingParams, console: Console) -> Message:
    """Streams one reply and returns it as a message, thought included: the model saw it."""
    last = None
    with ProgressDisplay(show_answers=False) as display:
        for item in llm.stream_chat(messages, params, on_progress=display):
            if isinstance(item, Completion):
                return _finish(item, console, last)
            part, text = item
            if last == "reasoning" and part == "answer":
                console.print()
            style = "dim italic" if part == "reasoning" else None
            console.print(text, end="", style=style, markup=False)
            last = part
    raise AssertionError("the stream ended without a completion")


def _finish(completion: Completion, console: Console, last: str | None) -> Message:
    if last is not None:
        console.print()
    if note := NOTES.get(completion.finish_reason):
        console.print(note, style="dim", markup=False)
    return Message(
        role="assistant",
        content=completion.text,
        reasoning=completion.reasoning,
        tool_calls=completion.tool_calls,
    )
