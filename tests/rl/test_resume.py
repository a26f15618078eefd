"""A run killed with SIGKILL in the middle of CISPO and resumed is the run left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openm1.common.track import read_metrics

NUM_STEPS = 16
SAVE_EVERY = 4
GROWS_AFTER = 11
"""Steps in the first window: no checkpoint falls on its end."""
COMMAND = "import sys; from openm1.cli.main import main; main(sys.argv[1:])"
PATIENCE_S = 120.0


def start(init: Path, folder: Path) -> subprocess.Popen[bytes]:
    options = {
        "folder": folder,
        "init": init,
        "rl.num-steps": NUM_STEPS,
        "rl.num-prompts": 4,
        "rl.group-size": 8,
        "rl.num-updates": 4,
        "rl.max-response-tokens": 6,
        "rl.growth.later-tokens": 7,
        "rl.growth.horizon-steps": GROWS_AFTER,
        "rl.growth.near-share": 0.1,
        "rl.growth.perplexity-tolerance": 1.0,
        "rl.optimizer.learning-rate": 1e-3,
        "rl.save-every-steps": SAVE_EVERY,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "rl", "chain", *arguments],
        # Sums of several threads may come in another order the second time.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors.decode()


def kill_between_checkpoints(process: subprocess.Popen[bytes], metrics: Path) -> int:
    """Kills the run once it is two steps or more past its second checkpoint and before its last.

    It is stopped while we look, so that what we see is where it dies. Returns the steps it did.
    """
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
        if not metrics.exists():
            continue
        process.send_signal(signal.SIGSTOP)
        done = len(read_metrics(metrics))
        if done > 2 * SAVE_EVERY and done % SAVE_EVERY >= 2:
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            return done
        process.send_signal(signal.SIGCONT)
    process.kill()
    raise AssertionError("the run did not get far enough to be killed")


def untimed(metrics: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_metrics(metrics)
    ]


def last_checkpoint(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_killed_run_ends_like_one_left_alone(tmp_path: Path, guesser: Path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    undisturbed = start(guesser, alone)
    done = kill_between_checkpoints(start(guesser, killed), killed / "metrics.jsonl")
    assert SAVE_EVERY < int(last_checkpoint(killed).name[-8:]) < done < NUM_STEPS
    finish(start(guesser, killed))
    finish(undisturbed)

    rows = untimed(killed / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    windows = [row["rollout/window_tokens"] for row in rows]
    assert windows == [6] * GROWS_AFTER + [7] * (NUM_STEPS - GROWS_AFTER)
    assert rows == untimed(alone / "metrics.jsonl")
    assert sum("rl/num_updates" in row for row in rows) > NUM_STEPS / 2
    ends = [last_checkpoint(folder) for folder in (alone, killed)]
    assert ends[0].name == ends[1].name == f"step-{NUM_STEPS:08d}"
    weights, again = ((end / "model.safetensors").read_bytes() for end in ends)
    assert weights == again
    assert weights != (guesser / "model.safetensors").read_bytes()
