"""Run folders and atomic checkpoints.

runs/<name>/: config.json, metrics.jsonl, checkpoints/step-00000100/ (a loadable model, its
tokenizer, trainer.pt with optimizer and counters).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openm1.chat.tokenizer import Tokenizer
from openm1.common.config import load_config, save_config, to_jsonable
from openm1.model.m1 import M1ForCausalLM

TRAINER_FILE = "trainer.pt"


@dataclass(frozen=True)
class RunFolder:
    """Where one run writes. `open` makes it, or checks that it belongs to the same config."""

    path: Path

    @classmethod
    def open(cls, path: str | Path, config: Any) -> RunFolder:
        """Raises ValueError when the folder holds a run with another config: nothing is lost."""
        folder = cls(Path(path))
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        file = folder.path / "config.json"
        if file.exists():
            before, now = json.loads(file.read_text()), to_jsonable(config)
            if before != now:
                keys = dict.fromkeys([*before, *now])
                changed = [key for key in keys if before.get(key) != now.get(key)]
                raise ValueError(
                    f"{folder.path} holds a run with another config ({', '.join(changed)} differ); "
                    "give another folder, or the same config to resume"
                )
        else:
            save_config(config, file)
        return folder

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def load_config(self, cls: type[Any]) -> Any:
        return load_config(cls, self.path / "config.json")

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        found = sorted(self.checkpoints.glob("step-*"))
        return found[-1] if found else None

    def save(
        self,
        step: int,
        model: M1ForCausalLM,
        tokenizer: Tokenizer | None,
        trainer: dict[str, Any],
        *,
        keep: int = 2,
    ) -> Path:
        """Writes a checkpoint beside its place, then renames it: it is whole or absent."""
        target = self.checkpoints / f"step-{step:08d}"
        temporary = self.checkpoints / f".step-{step:08d}-{os.getpid()}"
        for leftover in self.checkpoints.glob(".*"):
            shutil.rmtree(leftover)
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        torch.save(trainer, temporary / TRAINER_FILE)
        if target.exists():
            _remove(target)
        temporary.rename(target)
        for old in sorted(self.checkpoints.glob("step-*"))[:-keep]:
            _remove(old)
        return target


def _remove(checkpoint: Path) -> None:
    """Takes its name away first: one that is half deleted must not pass for whole."""
    hidden = checkpoint.with_name(f".{checkpoint.name}-removed")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `trainer`."""
    return torch.load(checkpoint / TRAINER_FILE, weights_only=True)
