"""The rollouts of a step as lines of readable JSON, written by a run and read by its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from openm1.chat.reply import reply_text
from openm1.chat.tokenizer import Tokenizer
from openm1.envs.base import prompt_text
from openm1.types import Rollout, RolloutGroup


def rollouts_folder(run: Path) -> Path:
    return run / "rollouts"


def write_rollouts(
    run: Path, step: int, groups: Sequence[RolloutGroup], tokenizer: Tokenizer
) -> None:
    """Every rollout of a step, failed ones too; groups are numbered in the order of the batch."""
    target = rollouts_folder(run)
    target.mkdir(exist_ok=True)
    with (target / f"step-{step:06d}.jsonl").open("w") as file:
        for number, group in enumerate(groups):
            for rollout in group.rollouts:
                line = {"group": number, **_line(rollout, tokenizer)}
                file.write(json.dumps(line) + "\n")


def _line(rollout: Rollout, tokenizer: Tokenizer) -> dict[str, Any]:
    turns = rollout.turns
    # What the environment said between the turns, as the model saw it.
    between = [
        tokenizer.decode(after.prompt_ids[len(turn.prompt_ids) + len(turn.completion.token_ids) :])
        for turn, after in pairwise(turns)
    ]
    return {
        "family": rollout.task.family,
        "prompt": prompt_text(rollout.task),
        "expected": rollout.task.answer,
        "replies": [reply_text(tokenizer, turn.completion.token_ids) for turn in turns],
        "between": between,
        "num_tokens": rollout.num_completion_tokens,
        "finish_reason": turns[-1].completion.finish_reason if turns else None,
        "reward": rollout.reward,
        "error": rollout.error,
    }


def recorded_steps(run: Path) -> list[int]:
    """The steps whose rollouts are there, in order."""
    return sorted(
        int(file.stem.split("-")[1]) for file in rollouts_folder(run).glob("step-*.jsonl")
    )


def read_rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a step. One that a killed run left half written is left out."""
    file = rollouts_folder(run) / f"step-{step:06d}.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]
