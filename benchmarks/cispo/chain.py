"""The same arms on chain arithmetic, through the framework's own loop and engine."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cispo.arms import Arm
from openm1.common.track import read_metrics
from openm1.recipes.chain import CISPO_RUN, COLD_START, PRETRAIN
from openm1.recipes.runs import run_rl, run_supervised
from openm1.train.optim import AdamWConfig
from openm1.train.schedule import Schedule

CHAIN = "chain"
NUM_STEPS = 24
FULL_SHARE = 0.02
"""Of the cold start's thoughts, those that compute after every operation."""


def chain_start(folder: Path) -> Path:
    """The recipe's two supervised stages, with fewer full thoughts; trained unless there."""
    pretrain = replace(PRETRAIN, folder=folder / "chain-pretrain")
    data = replace(COLD_START.data, chain_full_share=FULL_SHARE)
    cold_start = replace(COLD_START, folder=folder / "chain-sft", init=pretrain.folder, data=data)
    run_supervised(pretrain, "chain, pretraining")
    return run_supervised(cold_start, "chain, cold start")


def run_chain(arm: Arm, learning_rate: float, seed: int, start: Path) -> dict[str, Any]:
    """The recipe's run at a constant rate, every prompt once: steps of the arms are then alike."""
    began = time.perf_counter()
    rl = replace(
        CISPO_RUN.rl,
        num_steps=NUM_STEPS,
        num_updates=arm.num_updates,
        loss=arm.loss,
        optimizer=AdamWConfig(learning_rate=learning_rate),
        schedule=Schedule(),
        max_refills=0,
        retire_pass_rate=None,
        seed=seed,
        save_every_steps=NUM_STEPS,
    )
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        path = Path(name)
        run_rl(replace(CISPO_RUN, folder=path, init=start, rl=rl), "chain")
        lines = read_metrics(path / "metrics.jsonl")
    curves = {
        "reward": [line["rollout/reward"] for line in lines],
        "length": [line["rollout/length_mean_tokens"] for line in lines],
        "clipped": [line.get("rl/clipped_share", 0.0) for line in lines],
    }
    return {"curves": curves, "seconds": round(time.perf_counter() - began, 2)}
