"""A whole recipe as one command, killed three times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from openm1.recipes.catalog import recipe_stages

COMMAND = "import sys; from openm1.cli.main import main; main(sys.argv[1:])"
SHARE = "0.02"
PATIENCE_S = 180.0
STAGES = ("pretrain", "sft", "rl")


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "train", "chain", f"--folder={folder}", f"--share={SHARE}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors.decode()


def kill_in(stage: str, folder: Path, delay_s: float) -> None:
    """Starts or resumes the recipe and kills it a little after `stage` has begun."""
    process = start(folder)
    deadline = time.monotonic() + PATIENCE_S
    while not (folder / stage / "config.json").exists():
        assert process.poll() is None, "the recipe ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay_s)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_recipe_killed_in_each_stage_ends_as_one_left_alone(tmp_path: Path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    finish(start(alone))
    rng = Random(5)
    for stage in STAGES:
        kill_in(stage, killed, rng.uniform(0.0, 0.5))
    finish(start(killed))
    for stage in STAGES:
        one, other = (
            sorted((folder / stage / "checkpoints").iterdir())[-1] for folder in (alone, killed)
        )
        assert one.name == other.name
        weights = [(folder / "model.safetensors").read_bytes() for folder in (one, other)]
        assert weights[0] == weights[1]


def test_stages_follow_each_other_in_the_folder_that_is_given(tmp_path: Path):
    stages = recipe_stages("nano", tmp_path, share=0.01)
    assert list(stages) == ["drill", "pretrain", "multiturn", "sft", "rl"]
    folders = [run.folder for run in stages.values()]
    assert folders == [tmp_path / name for name in stages]
    assert [run.init for run in stages.values()] == [None, *folders[:-1]]
    assert recipe_stages("nano")["rl"].folder == Path("runs/nano/rl")


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_an_impossible_share_is_refused(share: float):
    with pytest.raises(ValueError, match="share is"):
        recipe_stages("chain", share=share)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="recipe is 'chess'; allowed are chain"):
        recipe_stages("chess")
