"""Two processes that share every step end where one alone does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from openm1.data.packing import Example
from openm1.train.parallel import ALONE, Processes

TRAIN = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from openm1.recipes import chain
from openm1.recipes.runs import run_supervised
run = replace(chain.PRETRAIN, folder=Path(sys.argv[1]))
run = replace(run, train=replace(run.train, num_steps=int(sys.argv[2]), save_every_steps=2))
run_supervised(run, "t")
"""


def train(folder: Path, processes: int, steps: int) -> None:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = folder.parent / "train.py"
    script.write_text(TRAIN)
    done = subprocess.run(
        [*launch, str(script), str(folder), str(steps)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/step-{step:08d}/model.safetensors")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").open()]


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    train(tmp_path / "one", 1, 4)
    train(tmp_path / "two", 2, 4)
    alone, together = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(alone) == len(together) == 4
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=2e-3, atol=0)
    # The same data and the same loss: only the balance loss is each process's own.
    assert abs(together[0] - alone[0]) < 1e-5


def test_a_stopped_run_of_two_goes_on(tmp_path: Path) -> None:
    train(tmp_path / "run", 2, 4)
    undisturbed = weights(tmp_path / "run", 4)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    train(tmp_path / "run", 2, 4)
    resumed = weights(tmp_path / "run", 4)
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)


def test_alone_everything_is_its_own() -> None:
    assert ALONE.is_first and ALONE.sums([1.5, 2.0], torch.device("cpu")) == [1.5, 2.0]


def test_shares_are_whole_and_even() -> None:
    lengths = [90, 3, 41, 40, 77, 12, 5, 60, 33, 2]
    examples = [Example(token_ids=[i] * n, loss_mask=[True] * n) for i, n in enumerate(lengths)]
    shares = [Processes(rank, 3).share(examples) for rank in range(3)]
    taken = sorted(example.token_ids[0] for share in shares for example in share)
    assert taken == list(range(10))
    tokens = [sum(len(example.token_ids) for example in share) for share in shares]
    assert max(tokens) - min(tokens) <= 12
    assert ALONE.share(examples) == examples
