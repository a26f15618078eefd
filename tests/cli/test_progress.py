"""What is told of long prompts and long answers, and to whom."""

from __future__ import annotations

import io
import sys

import pytest

from openm1.cli.progress import ProgressDisplay
from openm1.engine.llm import Progress


def steps(prompt: int, answer: int) -> list[Progress]:
    """Ten steps of a prompt, then ten of an answer."""
    return [
        Progress(
            prompt_tokens=min(i, 10) * prompt // 10,
            total_prompt_tokens=prompt,
            answer_tokens=max(i - 10, 0) * answer // 10,
            max_answer_tokens=answer,
        )
        for i in range(21)
    ]


def show(items: list[Progress], **options) -> None:
    with ProgressDisplay(line_every_s=0.0, **options) as display:
        for item in items:
            display(item)


def test_short_work_is_not_mentioned(capsys: pytest.CaptureFixture[str]) -> None:
    show(steps(8192, 2048))
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_lines_tell(capsys: pytest.CaptureFixture[str]) -> None:
    show(steps(100_000, 5_000))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 21
    assert lines[3].startswith("prompt 30,000 of 100,000 tokens, ")
    assert lines[-1].startswith("answer 5,000 of 5,000 tokens, ")
    show(steps(100_000, 5_000), show_answers=False)
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_a_terminal_sees_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    show(steps(100_000, 100))
    text = terminal.getvalue()
    assert "100,000 tokens" in text
    # The last thing done is to erase the line.
    assert text.rstrip().endswith("\x1b[2K")
