from __future__ import annotations

from pathlib import Path

import pytest

from openm1.common.track import Display, JsonlTracker, read_metrics


def test_lines_come_back_in_order(tmp_path: Path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log(0, {"a/b": 1.5})
    tracker.log(1, {"a/b": 2, "c": "text"})
    assert read_metrics(tracker.path) == [
        {"step": 0, "a/b": 1.5},
        {"step": 1, "a/b": 2, "c": "text"},
    ]


@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', '{"step": 4}', "{"])
@pytest.mark.parametrize("first_step", [0, 2, 4])
def test_a_resumed_run_drops_what_it_will_do_again(tmp_path: Path, torn: str, first_step: int):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in range(4):
        tracker.log(step, {"loss": step})
    with path.open("a") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3]
    resumed = JsonlTracker(path, first_step=first_step)
    resumed.log(first_step, {"loss": -1})
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(first_step + 1))
    assert [row["loss"] for row in rows] == [*range(first_step), -1]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_away_from_a_terminal_progress_is_plain_lines(capfd: pytest.CaptureFixture[str]):
    with Display("run", 3, ["train/loss", "gone"], line_every_s=1e9) as display:
        for step in range(3):
            display.log(step, {"train/loss": 0.123456, "other": 9})
    assert capfd.readouterr().err.splitlines()[-1] == "run 3/3  loss 0.1235"
