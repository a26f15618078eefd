from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from openm1.evals.metrics import TaskMetrics
from openm1.recipes import demo
from openm1.recipes.demo_report import Answer, DemoResult, Stage, Trace, write_report
from openm1.types import Message

NASTY = "<script>alert('&')</script>"
PNG = b"\x89PNG\r\n\x1a\n"


def stage(name: str, accuracy: float) -> Stage:
    metrics = TaskMetrics(
        accuracy=accuracy,
        accuracy_low=0.0,
        accuracy_high=1.0,
        num_samples=40,
        majority_accuracy=0.1,
        mean_reasoning_tokens=3.25,
        mean_completion_tokens=5.0,
        cut_share=0.0,
    )
    curve = {0: 0.125, 5: accuracy}
    return Stage(name=name, checkpoint=Path("x"), metrics=metrics, accuracy_by_budget=curve)


@pytest.fixture
def result(tmp_path: Path) -> DemoResult:
    for name in ("rl", "rl-capped"):
        lines = [
            {"step": step, "rollout/reward": step / 4, "rollout/length_mean_tokens": 5.0 + step}
            for step in range(4)
        ]
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    right = Message(role="assistant", reasoning=NASTY, content="8")
    wrong = Message(role="assistant", content="<b>5</b>")
    return DemoResult(
        folder=tmp_path,
        stages=[stage(NASTY, 0.5), stage("before", 0.11), stage("after", 0.97), stage("cap", 0.3)],
        traces=[Trace("4 +4 é", "8", wrong, right)],
        answers=[Answer(f"{NASTY}?", "8", right)],
    )


class Tags(HTMLParser):
    """Collects the names of all tags; void ones are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.opened.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_shows_its_numbers_and_none_of_its_texts_is_markup(result: DemoResult):
    write_report(result.folder / "report.html", result, 61.7)
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.opened
    assert page.count("&lt;b&gt;5&lt;/b&gt;") == 1
    assert page.count("&lt;script&gt;") == 4
    for number in ("11.0%", "97.0%", "62 seconds", "12%", "40 held-out", "budget 5", "4 +4 é"):
        assert number in page
    assert page.count('class="right"') == 2
    assert page.count('class="wrong"') == 1


def test_the_plots_are_pngs_beside_the_report_and_inside_it(result: DemoResult):
    write_report(result.folder / "report.html", result, 1.0)
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    pictures = sorted(result.folder.glob("*.png"))
    assert [picture.name for picture in pictures] == ["budget.png", "cispo.png"]
    assert all(picture.read_bytes().startswith(PNG) for picture in pictures)
    assert len(re.findall("data:image/png;base64,[A-Za-z0-9+/=]{1000,}", page)) == 2
    # Nothing is fetched from anywhere.
    assert "http" not in page


def test_starting_over_removes_only_what_a_demo_wrote(
    result: DemoResult, monkeypatch: pytest.MonkeyPatch
):
    folder = result.folder
    write_report(folder / "report.html", result, 1.0)
    (folder / "rl" / "checkpoints").mkdir()
    (folder / "notes.txt").write_text("mine")

    def train_and_measure(where: Path, console: Console) -> DemoResult:
        assert where == folder
        assert not (folder / "report.html").exists()
        assert not any((folder / name).exists() for name in demo.RUNS)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_and_measure", train_and_measure)
    monkeypatch.setattr(demo, "enable_fast_fp32_matmul", lambda: "highest")
    monkeypatch.setattr(demo.torch, "set_num_threads", lambda count: None)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(folder)
    assert (folder / "notes.txt").read_text() == "mine"
