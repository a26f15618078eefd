"""Run folders and atomic checkpoints.

runs/<name>/: config.json, metrics.jsonl, checkpoints/step-00000100/ (a loadable model, its
tokenizer, trainer.pt with optimizer and counters).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from openm1.chat.tokenizer import Tokenizer
from openm1.common.config import load_config, save_config, to_jsonable
from openm1.common.errors import RunStopped
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
        with self.writing():
            for leftover in self.checkpoints.glob(".*"):
                shutil.rmtree(leftover)
            try:
                _write(temporary, model, tokenizer, trainer)
            except (OSError, SafetensorError):
                # Half a checkpoint on a full disk only keeps others from writing.
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            if target.exists():
                _remove(target)
            temporary.rename(target)
            for old in sorted(self.checkpoints.glob("step-*"))[:-keep]:
                _remove(old)
        return target

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What cannot be written here ends the run with a sentence that says how to go on."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            latest = self.latest()
            rest = "no checkpoint is whole yet" if latest is None else f"{latest.name} is whole"
            raise RunStopped(
                f"{self.path} could not be written or read ({error}); {rest}. Mend that, then give "
                "the same command to go on from there"
            ) from error


def _write(
    folder: Path, model: M1ForCausalLM, tokenizer: Tokenizer | None, trainer: dict[str, Any]
) -> None:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    with (folder / TRAINER_FILE).open("wb") as file:
        try:
            torch.save(trainer, file)
        except RuntimeError as error:
            # torch's archive writer, when it is told of a full disk, complains of its own.
            raise OSError(f"{folder.name}/{TRAINER_FILE}: {error}") from error


def _remove(checkpoint: Path) -> None:
    """Takes its name away first: one that is half deleted must not pass for whole."""
    hidden = checkpoint.with_name(f".{checkpoint.name}-removed")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `trainer`."""
    return torch.load(checkpoint / TRAINER_FILE, weights_only=True)
