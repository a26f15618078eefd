from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openm1.common import config as config_file
from openm1.model.m1 import M1ForCausalLM
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.train import checkpoint as checkpoint_file
from openm1.train.checkpoint import RunFolder, load_trainer_state
from openm1.train.optim import AdamWConfig
from openm1.train.supervised import SupervisedConfig

from .tiny import tiny_model, weights

CONFIG = SupervisedConfig(num_steps=7)


class Killed(Exception):
    """Stands for a signal that no code survives."""


def kill(*_: object, **__: object) -> None:
    raise Killed


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.open(tmp_path / "run", CONFIG)


def save(folder: RunFolder, step: int, model: M1ForCausalLM | None = None, **options) -> Path:
    model = model or tiny_model(dtype=torch.float32, seed=step)
    return folder.save(step, model, None, {"step": step}, **options)


def test_what_was_saved_comes_back(folder: RunFolder):
    model = tiny_model(dtype=torch.float32)
    trainer = {"step": 3, "cursor": 5, "optimizer": {"moment": torch.arange(3.0)}}
    path = folder.save(3, model, nano_tokenizer(), trainer)
    assert folder.latest() == path
    assert torch.equal(weights(M1ForCausalLM.from_pretrained(path)), weights(model))
    state = load_trainer_state(path)
    assert (state["step"], state["cursor"]) == (3, 5)
    assert torch.equal(state["optimizer"]["moment"], torch.arange(3.0))
    assert (path / "tokenizer.json").is_file()


def test_the_newest_few_are_kept(folder: RunFolder):
    assert folder.latest() is None
    for step in (1, 2, 30, 4):
        save(folder, step)
    # By number, not by age.
    assert [p.name for p in sorted(folder.checkpoints.iterdir())] == [
        "step-00000004",
        "step-00000030",
    ]
    assert folder.latest() == folder.checkpoints / "step-00000030"


@pytest.mark.parametrize(
    ("owner", "name"), [(torch, "save"), (M1ForCausalLM, "save_pretrained"), (Path, "rename")]
)
def test_a_run_killed_while_saving_has_its_last_whole_checkpoint(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
):
    whole = save(folder, 1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill)
        with pytest.raises(Killed):
            save(folder, 2)
    assert folder.latest() == whole
    assert load_trainer_state(whole) == {"step": 1}
    save(folder, 2)
    assert {p.name for p in folder.checkpoints.iterdir()} == {"step-00000001", "step-00000002"}


def test_a_run_killed_while_saving_leaves_remains_that_the_next_save_removes(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", kill)
        with pytest.raises(Killed):
            save(folder, 1)
    assert [p.name[:6] for p in folder.checkpoints.iterdir()] == [".step-"]
    assert folder.latest() is None
    # A signal inside the model's own saving leaves a folder of this kind.
    (folder.checkpoints / "..step-00000001-7.new-7").mkdir()
    path = save(folder, 2)
    assert list(folder.checkpoints.iterdir()) == [path]


@pytest.mark.parametrize("steps", [(1, 1), (1, 2)], ids=["written again", "grown old"])
def test_a_run_killed_while_removing_has_no_half_checkpoint(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, int]
):
    first, second = steps
    save(folder, first)

    def half_remove(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            next(path.iterdir()).unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file.shutil, "rmtree", half_remove)
        with pytest.raises(Killed):
            save(folder, second, keep=1)
    for path in folder.checkpoints.glob("step-*"):
        M1ForCausalLM.from_pretrained(path)
        load_trainer_state(path)
    save(folder, 9, keep=1)
    assert [p.name for p in folder.checkpoints.iterdir()] == ["step-00000009"]


def test_a_folder_belongs_to_one_config(folder: RunFolder):
    assert RunFolder.open(folder.path, CONFIG).load_config(SupervisedConfig) == CONFIG
    before = (folder.path / "config.json").read_bytes()
    other = replace(CONFIG, optimizer=AdamWConfig(learning_rate=0.5))
    with pytest.raises(ValueError, match=r"another config \(optimizer differ\)"):
        RunFolder.open(folder.path, other)
    with pytest.raises(ValueError, match="num_steps"):
        RunFolder.open(folder.path, AdamWConfig())
    assert (folder.path / "config.json").read_bytes() == before


def test_a_run_killed_before_its_config_was_written_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(config_file.Path, "replace", kill)
        with pytest.raises(Killed):
            RunFolder.open(tmp_path, CONFIG)
    assert RunFolder.open(tmp_path, CONFIG).load_config(SupervisedConfig) == CONFIG
