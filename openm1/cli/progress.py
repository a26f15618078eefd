"""Long prompts and long answers in view: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from openm1.engine.llm import Progress

LONG_PROMPT_TOKENS = 8192
LONG_ANSWER_TOKENS = 2048
LINE_EVERY_S = 10.0


class ProgressDisplay:
    """Called with each `Progress`; writes to standard error, and nothing about what is short."""

    def __init__(self, *, show_answers: bool = True, line_every_s: float = LINE_EVERY_S) -> None:
        """`show_answers` is False where the answer itself is seen growing."""
        self._show_answers, self._line_every_s = show_answers, line_every_s
        self._bars: Bars | None = None
        self._phase = ""
        self._began = self._last_line = 0.0

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_phase()

    def __call__(self, progress: Progress) -> None:
        if progress.prompt_tokens < progress.total_prompt_tokens:
            total = progress.total_prompt_tokens
            self._show("prompt", progress.prompt_tokens, total, total > LONG_PROMPT_TOKENS)
        else:
            total = progress.max_answer_tokens
            is_long = total > LONG_ANSWER_TOKENS and self._show_answers
            self._show("answer", progress.answer_tokens, total, is_long)

    def _show(self, phase: str, done: int, total: int, is_long: bool) -> None:
        if phase != self._phase:
            self._end_phase()
            self._phase = phase
            self._began = self._last_line = time.perf_counter()
            if is_long and sys.stderr.isatty():
                self._bars = _bars()
                self._bars.add_task(phase, total=total, rate="")
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=done, rate=self._rate(done))
        elif is_long and time.perf_counter() - self._last_line >= self._line_every_s:
            self._last_line = time.perf_counter()
            print(f"{phase} {done:,} of {total:,} tokens, {self._rate(done)}", file=sys.stderr)

    def _rate(self, done: int) -> str:
        return f"{done / max(time.perf_counter() - self._began, 1e-3):,.0f} tokens/s"

    def _end_phase(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        self._phase = ""


def _bars() -> Bars:
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,} tokens"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bars.start()
    return bars
