"""Every recipe by name, and its stages."""

from __future__ import annotations

from openm1.recipes import chain, nano
from openm1.recipes.runs import RLRun, SupervisedRun

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
    "nano": {"pretrain": nano.PRETRAIN, "sft": nano.COLD_START, "rl": nano.CISPO_RUN},
}


def recipe_stage(name: str, stage: str) -> SupervisedRun | RLRun:
    """`stage` is "pretrain", "sft" or "rl". Raises ValueError for an unknown recipe or stage."""
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; allowed are {', '.join(RECIPES)}")
    if stage not in RECIPES[name]:
        raise ValueError(f"stage of {name} is {stage!r}; allowed are {', '.join(RECIPES[name])}")
    return RECIPES[name][stage]
