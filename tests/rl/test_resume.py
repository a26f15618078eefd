"""A run killed with SIGKILL twenty times and resumed each time is the run left alone.

The run is `openm1 rl` itself, in processes forked from one that has imported everything: starting
an interpreter twenty times would take longer than the training.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from openm1.common.track import read_metrics

NUM_KILLS = int(os.environ.get("OPENM1_KILLS", "20"))
NUM_STEPS = 2 * NUM_KILLS
GROWS_AFTER = 7
"""Steps in the first window."""
PATIENCE_S = 240.0


def options(init: Path, folder: Path) -> list[str]:
    values = {
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
        "rl.save-every-steps": 1,
        # Each checkpoint holds groups that were sampled ahead and not yet learned from.
        "rl.max-staleness": 1,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def fork(work: Callable[[], None], log: Path) -> int:
    """The id of a process that does the work, its output in a file."""
    if child := os.fork():
        return child
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def drive(init: Path, folder: Path) -> None:
    """The run left alone, then the run killed; prints how far it was at each kill."""
    from openm1.cli.main import main

    def start(target: Path) -> int:
        arguments = ["rl", "chain", *options(init, target)]
        return fork(lambda: main(arguments), folder / f"{target.name}.log")

    alone, killed = folder / "alone", folder / "killed"
    # In this process, so that what it imports and loads need not be loaded twenty times.
    main(["rl", "chain", *options(init, alone)])
    rows = read_metrics(alone / "metrics.jsonl")
    step_s = fmean(row["time/sample_s"] + row["time/train_s"] for row in rows[2:])
    rng = random.Random(2026)
    startup_s = 0.0
    for number in range(NUM_KILLS):
        began, before = time.monotonic(), last_checkpoint(killed)
        child = start(killed)
        if number and rng.random() < 0.25:
            time.sleep(rng.uniform(0, startup_s))
        else:
            wait_for(lambda: last_checkpoint(killed) != before)  # noqa: B023 (called at once)
            startup_s = time.monotonic() - began
            time.sleep(rng.uniform(0, 1.5 * step_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"it ended before kill {number}"
        print("reached", len(read_metrics(killed / "metrics.jsonl")))
    assert os.waitpid(start(killed), 0)[1] == 0, (folder / "killed.log").read_text()


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends, "the run does not go on"
        time.sleep(0.002)


def untimed(metrics: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_metrics(metrics)
    ]


def last_checkpoint(folder: Path) -> Path | None:
    return max((folder / "checkpoints").glob("step-*"), default=None)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_like_one_left_alone(tmp_path: Path, guesser: Path):
    driven = subprocess.run(
        [sys.executable, "-m", "tests.rl.test_resume", guesser, tmp_path],
        # Sums of several threads may come in another order the second time.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
    )
    assert driven.returncode == 0, driven.stderr
    progress = [int(count) for count in re.findall(r"reached (\d+)", driven.stdout)]
    assert len(progress) == NUM_KILLS
    # They struck all over the run, not only at its beginning.
    assert len(set(progress)) > NUM_KILLS / 3
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    rows = untimed(killed / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    assert rows == untimed(alone / "metrics.jsonl")
    windows = [row["rollout/window_tokens"] for row in rows]
    assert windows == [6] * GROWS_AFTER + [7] * (NUM_STEPS - GROWS_AFTER)
    assert {row["rl/staleness_max"] for row in rows} == {0.0, 1.0}
    assert sum("rl/num_updates" in row for row in rows) > NUM_STEPS / 3
    for name in sorted(path.name for path in (alone / "rollouts").iterdir()):
        one, other = ((run / "rollouts" / name).read_bytes() for run in (alone, killed))
        assert one == other
    end = f"checkpoints/step-{NUM_STEPS:08d}/model.safetensors"
    weights, again = ((run / end).read_bytes() for run in (alone, killed))
    assert weights == again
    assert weights != (guesser / "model.safetensors").read_bytes()


if __name__ == "__main__":
    drive(Path(sys.argv[1]), Path(sys.argv[2]))
