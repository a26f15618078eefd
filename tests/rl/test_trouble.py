"""What goes wrong in a run is told, counted and survived, or ends it where it can go on."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openm1.cli import main as cli
from openm1.common.errors import RunStopped
from openm1.common.track import read_metrics
from openm1.envs.base import QuestionEnv
from openm1.envs.mixture import Mixture
from openm1.model.m1 import M1ForCausalLM
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.rl import update
from openm1.rl.collect import NoUsableRollouts
from openm1.rl.config import RLConfig
from openm1.rl.loop import StepHook, train_rl
from openm1.train.checkpoint import RunFolder
from openm1.train.step import NonFiniteGradient
from openm1.types import Message, StepResult, Task

from .play import TINY, OneDigit, WrittenPolicy, nano_format
from .test_loop import sometimes

CONFIG = RLConfig(
    num_steps=4,
    num_prompts=6,
    group_size=4,
    num_updates=2,
    max_response_tokens=4,
    save_every_steps=1,
    env_timeout_s=0.05,
)


def run(
    path: Path,
    taskset: OneDigit | None = None,
    config: RLConfig = CONFIG,
    on_step: StepHook | None = None,
) -> RunFolder:
    model = M1ForCausalLM(TINY.config(nano_tokenizer()))
    folder = RunFolder.open(path, config)
    policy = WrittenPolicy(sometimes)
    mixture = Mixture([taskset or OneDigit()], seed=3)
    asyncio.run(
        train_rl(model, nano_format(), mixture, policy, policy, config, folder, on_step=on_step)
    )
    return folder


def result(folder: RunFolder) -> tuple[list[dict[str, float]], bytes]:
    rows = [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_metrics(folder.metrics)
    ]
    latest = folder.latest()
    assert latest is not None
    return rows, (latest / "model.safetensors").read_bytes()


@pytest.mark.parametrize("limit_bytes", [0, 2_000, 120_000])
def test_a_full_disk_ends_a_run_that_resumes_when_there_is_room(tmp_path: Path, limit_bytes: int):
    """At 0 nothing can be written, then the tokenizer or the weights cannot, then the optimizer."""

    def fill(step: int, _: object) -> None:
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(RunStopped, match=r"could not be written.*; step-00000002 is whole"):
            run(tmp_path / "full", on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # What was half written does not keep others from writing.
    names = sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002"]
    assert result(run(tmp_path / "full")) == result(run(tmp_path / "roomy"))


def test_a_full_disk_is_told_too_where_metrics_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("openm1.rl.loop.write_rollouts", full)
    with pytest.raises(RunStopped, match=r"No space left on device.*no checkpoint is whole yet"):
        run(tmp_path)


def test_the_command_line_says_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(*_: object) -> None:
        raise RunStopped("the disk is full")

    monkeypatch.setattr(cli, "train_stage", stopped)
    with pytest.raises(SystemExit) as ended:
        cli.main(["rl", "chain"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "openm1: the disk is full\n"


@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_loss_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_of_them: bool
):
    """One such update is skipped and counted; a step without another one ends the run."""
    calls = 0

    def poisoned(*arguments: object):
        nonlocal calls
        calls += 1
        computed = policy_loss(*arguments)  # pyright: ignore[reportArgumentType]
        bad = calls == 4 or (all_of_them and calls > 2)
        return replace(computed, loss=computed.loss * float("nan")) if bad else computed

    policy_loss = update.policy_loss
    monkeypatch.setattr(update, "policy_loss", poisoned)
    if all_of_them:
        with pytest.raises(NonFiniteGradient, match="none of a step's 2 updates"):
            run(tmp_path)
        monkeypatch.undo()
        rows, _ = result(run(tmp_path))
        assert [row["step"] for row in rows] == list(range(CONFIG.num_steps))
        return
    folder = run(tmp_path)
    rows, _ = result(folder)
    assert [row.get("errors/nonfinite_update", 0) for row in rows] == [0, 1, 0, 0]
    assert [row["rl/num_updates"] for row in rows] == [2, 1, 2, 2]
    latest = folder.latest()
    assert latest is not None
    model = M1ForCausalLM.from_pretrained(latest)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


class Bad(OneDigit):
    """Goes wrong in one way for questions that begin with some digits."""

    def __init__(self, way: str, starts: str) -> None:
        self.way, self.starts = way, starts

    def make_env(self, task: Task) -> QuestionEnv:
        bad = task.prompt[-1].content[0] in self.starts
        return BadEnv(self, task) if bad else super().make_env(task)


class BadEnv(QuestionEnv):
    taskset: Bad

    async def step(self, reply: Message) -> StepResult:
        if self.taskset.way == "crashes":
            raise OSError("the environment is gone")
        if self.taskset.way == "waits":
            await asyncio.sleep(300)
        if self.taskset.way == "computes":
            time.sleep(300)
        return StepResult(reward=float("nan"))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("crashes", "OSError: the environment is gone"),
        ("waits", "OutOfPatience: step of the environment took longer than 0.05 s"),
        ("computes", "OutOfPatience: step of the environment took longer than 0.05 s"),
        ("pays nan", "ValueError: the reward is nan; allowed are finite numbers"),
    ],
)
def test_a_bad_environment_is_counted_and_the_others_are_learned_from(
    tmp_path: Path, way: str, message: str
):
    config = replace(CONFIG, num_steps=2, max_refills=0)
    folder = run(tmp_path / "some", Bad(way, "13579"), config)
    rows, _ = result(folder)
    assert sum(row.get("errors/env", 0) for row in rows) > 0
    assert all(row["rollout/error_share"] < 1 for row in rows)
    text = "".join(path.read_text() for path in (folder.path / "rollouts").iterdir())
    assert message in text
    with pytest.raises(NoUsableRollouts, match=f"of step 0 failed: {message}"):
        run(tmp_path / "all", Bad(way, "0123456789"), config)
