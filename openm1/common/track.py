"""Where metrics go: a JSON line per step on disk, a progress bar or plain lines for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class JsonlTracker:
    """Appends `{"step": .., name: value, ..}` lines to metrics.jsonl.

    Opened for a run that resumes at `first_step`, it drops the lines from there on: they belong to
    steps that will be done again.
    """

    def __init__(self, path: Path, *, first_step: int = 0) -> None:
        self.path = path
        if path.exists():
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < first_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(path)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def _whole_lines(path: Path) -> list[str]:
    """A run killed while writing leaves a last line without its newline; it is left out."""
    return path.read_text().split("\n")[:-1]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl."""
    return [json.loads(line) for line in _whole_lines(path)]


class Display:
    """Shows a training run: a Rich bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(
        self,
        title: str,
        num_steps: int,
        show: Sequence[str],
        *,
        first_step: int = 0,
        line_every_s: float = 10.0,
    ) -> None:
        """`show` are the metric names worth a person's attention, in order."""
        self.title, self.num_steps, self.show = title, num_steps, show
        self._line_every_s, self._last_line = line_every_s, 0.0
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task(
                title, total=num_steps, completed=first_step, metrics=""
            )

    def __enter__(self) -> Display:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`step` counts from 0."""
        shown = "  ".join(
            f"{name.rsplit('/', 1)[-1]} {metrics[name]:.4g}"
            for name in self.show
            if name in metrics
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=step + 1, metrics=shown)
            return
        now = time.monotonic()
        if now - self._last_line >= self._line_every_s or step + 1 == self.num_steps:
            self._last_line = now
            print(f"{self.title} {step + 1}/{self.num_steps}  {shown}", file=sys.stderr, flush=True)
