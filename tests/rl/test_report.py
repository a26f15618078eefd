from __future__ import annotations

import re
from pathlib import Path

import pytest

from openm1.cli.main import main
from openm1.common.track import read_metrics
from openm1.rl.record import read_rollouts, recorded_steps, write_rollouts
from openm1.rl.report import ReportConfig, report_page, write_report
from openm1.types import Completion, Message, Rollout, RolloutGroup, Task, Turn
from tests.recipes.test_demo_report import Tags
from tests.server.browser import browser, is_there

from .play import nano_format
from .test_loop import CONFIG, WrittenPolicy, sometimes, train

NASTY = "<script>alert('&')</script>"
WORDS = 5000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _, _ = train(tmp_path_factory.mktemp("run"), WrittenPolicy(sometimes))
    return folder.path


def test_a_finished_run_is_one_page(run: Path, capsys: pytest.CaptureFixture[str]):
    main(["report", str(run)])
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "2 of 2 steps, finished" in page and "newest checkpoint step-00000002" in page
    for title in ("Reward", "Entropy (nats)", "Weights of tokens", "Throughput (tokens/s)"):
        assert f"<b>{title}</b>" in page
    # What this run has not is not there.
    assert "Value of the critic" not in page and "What went wrong" not in page
    assert not re.search(r"(src|href)=", page)
    rewards = [row["rollout/reward"] for row in read_metrics(run / "metrics.jsonl")]
    assert f"{rewards[0]:.3f} &rarr; {rewards[1]:.3f}" in page
    assert page.count('<details class="rollout"') == 2 * 6 * CONFIG.group_size


def test_steps_and_numbers_can_be_chosen(run: Path):
    page = report_page(run, ReportConfig(steps=(1,), max_groups=2, max_rollouts=3))
    assert page.count('<details class="rollout"') == 6
    assert re.findall(r"<summary>Step (\d+)", page) == ["1"]
    with pytest.raises(
        ValueError, match=r"steps \[7\] have no rollouts; there are those of 0 to 1"
    ):
        report_page(run, ReportConfig(steps=(7,)))
    with pytest.raises(ValueError, match="max_groups is 0"):
        ReportConfig(max_groups=0)


def test_a_run_that_goes_on_has_a_page_at_every_moment(run: Path, tmp_path: Path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    page = report_page(tmp_path, ReportConfig())
    assert "no checkpoint yet" in page and "None were recorded" in page
    # Killed in the middle of a line, with rollouts of a step that is not done.
    lines = (run / "metrics.jsonl").read_text().split("\n")
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    (tmp_path / "rollouts").mkdir()
    for step in (0, 1):
        text = (run / "rollouts" / f"step-{step:06d}.jsonl").read_text()
        (tmp_path / "rollouts" / f"step-{step:06d}.jsonl").write_text(text[:-10])
    page = report_page(tmp_path, ReportConfig())
    assert "1 of 2 steps, not finished" in page
    assert re.findall(r"<summary>Step (\d+)", page) == ["0"]
    (tmp_path / "metrics.jsonl").unlink()
    assert "No step of 2 is finished yet" in report_page(tmp_path, ReportConfig())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("", "", "has no config.json, so it is no run folder"),
        ("config.json", "{", "is no JSON"),
        ("config.json", '{"kind": "SupervisedRun"}', "of kind 'SupervisedRun'; a report is made"),
        ("config.json", "[]", "of kind None"),
    ],
)
def test_what_is_no_run_is_refused(
    tmp_path: Path, name: str, text: str, message: str, capsys: pytest.CaptureFixture[str]
):
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ValueError, match="is no folder"):
        report_page(tmp_path / "nowhere", ReportConfig())


def long_group() -> RolloutGroup:
    """Two turns with a thought of thousands of tokens, and markup where text should be."""
    tokenizer = nano_format().tokenizer
    task = Task(family="t", prompt=(Message(role="user", content=NASTY),), answer="7")
    thought = f"<think>{'4 +3 ' * WORDS}</think>{NASTY}"
    ids = tuple(tokenizer.encode(thought, allow_special=True))
    said = tuple(tokenizer.encode("no, again"))
    first = Turn(prompt_ids=(1,), completion=Completion(token_ids=ids, logprobs=(-1.0,) * len(ids)))
    last = Completion(
        token_ids=tuple(tokenizer.encode("7")), logprobs=(-1.0,), finish_reason="length"
    )
    second = Turn(prompt_ids=(1, *ids, *said), completion=last)
    return RolloutGroup(
        task=task,
        rollouts=[
            Rollout(task=task, turns=(first, second), reward=1.0),
            Rollout(task=task, turns=(first,), reward=0.0),
            Rollout(task=task, error=NASTY, error_source="env"),
        ],
    )


def test_rollouts_are_written_and_read_back(tmp_path: Path):
    write_rollouts(tmp_path, 3, [long_group()], nano_format().tokenizer)
    assert recorded_steps(tmp_path) == [3]
    first, _, failed = read_rollouts(tmp_path, 3)
    assert first["between"] == ["no, again"]
    assert first["replies"][1] == first["expected"] == "7"
    assert (failed["replies"], failed["error"], failed["reward"]) == ([], NASTY, None)
    assert first["num_tokens"] > WORDS


@pytest.fixture
def long_run(run: Path, tmp_path: Path) -> Path:
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    write_rollouts(tmp_path, 1, [long_group()], nano_format().tokenizer)
    write_report(tmp_path, tmp_path / "report.html")
    return tmp_path


def test_texts_are_no_markup(long_run: Path):
    page = (long_run / "report.html").read_text()
    assert page.count("&lt;script&gt;alert") == 6
    assert NASTY not in page


@pytest.mark.browser
@pytest.mark.skipif(not is_there(), reason="needs chromium and chromedriver")
def test_a_person_can_read_a_long_rollout(long_run: Path):
    with browser() as window:
        window.open((long_run / "report.html").as_uri())
        assert window.run("return document.querySelectorAll('.charts figure').length") > 8
        assert window.text(".step[open] > summary").startswith("Step 1")
        window.click(".group > summary")
        window.click(".rollout > summary")
        thought = "document.querySelector('.rollout[open] .thought')"
        assert window.run(f"return {thought}.innerText").startswith("4 +3 4 +3")
        height, whole = window.run(f"return [{thought}.clientHeight, {thought}.scrollHeight]")
        assert height < 860 < whole
        assert window.run(f"return {thought}.scrollWidth <= {thought}.clientWidth")
        window.click("button[data-kind=cut]")
        visible = "[...document.querySelectorAll('.rollout')].filter(r => !r.hidden).length"
        assert window.run(f"return {visible}") == 1
        window.click("button[data-kind=failed]")
        # A phone need not scroll sideways.
        window.resize(390, 844, phone=True)
        wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        assert not window.run(f"return {wide}")
        # The values under the pointer are told.
        chart = "document.querySelector('svg[data-curves]')"
        window.run(
            f"const box = {chart}.getBoundingClientRect(); {chart}.dispatchEvent("
            "new PointerEvent('pointermove', {clientX: box.right - 12, clientY: box.top + 9}))"
        )
        assert "at 1" in window.text("figcaption")
