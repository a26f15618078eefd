"""Every recipe by name, and its stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from openm1.recipes import chain, nano
from openm1.recipes.runs import RLRun, SupervisedRun, run_rl, run_supervised
from openm1.train.parallel import Processes

RECIPES: dict[str, dict[str, SupervisedRun | RLRun]] = {
    "chain": {"pretrain": chain.PRETRAIN, "sft": chain.COLD_START, "rl": chain.CISPO_RUN},
    "chain-windows": {
        "pretrain": chain.PRETRAIN,
        "sft": chain.COLD_START,
        "rl": chain.WINDOWS_RUN,
    },
    "chain-curriculum": {
        "pretrain": chain.PRETRAIN,
        "sft": chain.COLD_START,
        "rl": chain.CURRICULUM_RUN,
    },
    "chain-pass-rate": {
        "pretrain": chain.PRETRAIN,
        "sft": chain.COLD_START,
        "rl": chain.PASS_RATE_RUN,
    },
    "nano": {
        "drill": nano.DRILL,
        "pretrain": nano.PRETRAIN,
        "multiturn": nano.MULTITURN,
        "sft": nano.COLD_START,
        "rl": nano.CISPO_RUN,
    },
}


def recipe_stage(name: str, stage: str) -> SupervisedRun | RLRun:
    """`stage` is "pretrain", "sft" or "rl", say. Raises ValueError where there is none such."""
    stages = _stages(name)
    if stage not in stages:
        raise ValueError(f"stage of {name} is {stage!r}; allowed are {', '.join(stages)}")
    return stages[stage]


def recipe_stages(
    name: str, folder: Path | None = None, share: float = 1.0
) -> dict[str, SupervisedRun | RLRun]:
    """A recipe's stages in order, each in a folder of its name under `folder`, if one is given.

    `share` of 0.01 does a hundredth of each stage's steps, to try a recipe out. Raises ValueError
    for an unknown recipe or a share outside 0 to 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; allowed is above 0, at most 1")
    stages, init = {}, None
    for stage, run in _stages(name).items():
        place = run.folder if folder is None else folder / stage
        stages[stage] = _scaled(replace(run, folder=place, init=init), share)
        init = place
    return stages


def run_recipe(name: str, folder: Path | None = None, share: float = 1.0) -> Path:
    """All stages of a recipe, one after the other; returns the last checkpoint.

    Stopped at any moment and called again it goes on where it was. Under torchrun its processes
    share the supervised stages; the first does reinforcement learning, and the others end there.
    """
    processes = Processes.joined()
    checkpoint = None
    for stage, run in recipe_stages(name, folder, share).items():
        if isinstance(run, SupervisedRun):
            checkpoint = run_supervised(run, stage)
        elif processes.is_first:
            # The others' cores are free from here on.
            torch.set_num_threads(torch.get_num_threads() * processes.count)
            checkpoint = run_rl(run, stage)
    assert checkpoint is not None
    return checkpoint


def _stages(name: str) -> dict[str, SupervisedRun | RLRun]:
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; allowed are {', '.join(RECIPES)}")
    return RECIPES[name]


def _scaled(run: SupervisedRun | RLRun, share: float) -> SupervisedRun | RLRun:
    if share == 1:
        return run
    config = run.rl if isinstance(run, RLRun) else run.train
    steps = max(1, round(share * config.num_steps))
    shorter = {"num_steps": steps, "save_every_steps": min(config.save_every_steps, steps)}
    if isinstance(run, RLRun):
        return replace(run, rl=replace(run.rl, **shorter))
    return replace(run, train=replace(run.train, **shorter))
