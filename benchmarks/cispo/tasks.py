"""The tasks of the comparison: chains, model, cold start and length of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cispo.cold_start import ColdStart, train_cold_start
from benchmarks.cispo.lockstep import Words
from benchmarks.cispo.run import Curriculum
from openm1.envs.recheck import RecheckConfig, RecheckTaskset
from openm1.model.config import M1Config, post_norm_config
from openm1.model.m1 import M1ForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareTask:
    about: str
    recheck: RecheckConfig = field(default_factory=RecheckConfig)
    cold_start: ColdStart = field(default_factory=ColdStart)
    num_steps: int = 24
    curriculum: Curriculum | None = None

    @property
    def lengths(self) -> tuple[int, int]:
        return self.recheck.min_turns, self.recheck.max_turns

    def words(self) -> Words:
        return Words(RecheckTaskset(self.recheck))


def model_config(words: Words) -> M1Config:
    """A lightning and a softmax layer, 85 thousand parameters."""
    return post_norm_config(
        vocab_size=words.vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        period=2,
        num_local_experts=2,
    )


def start_weights(name: str, task: CompareTask, folder: Path) -> Path:
    """The cold start's checkpoint, trained unless it is there."""
    path = folder / f"cold-start-{name}"
    if not (path / "config.json").is_file():
        words = task.words()
        model = M1ForCausalLM(model_config(words), seed=task.cold_start.seed)
        train_cold_start(model, words, task.lengths, task.cold_start)
        model.save_pretrained(path)
    return path


LEVELS = 6

TASKS: dict[str, CompareTask] = {
    "recheck": CompareTask(about="chains of 3 to 6 operations, one kind of check"),
    "ladder": CompareTask(
        about=(
            f"{LEVELS} levels: each brings a kind of operation with a mark of its own, in half of "
            "the turns, and every other level a longer chain"
        ),
        recheck=RecheckConfig(num_kinds=LEVELS, operations_per_kind=4, max_turns=8),
        cold_start=ColdStart(num_steps=600),
        num_steps=40,
        curriculum=Curriculum(
            lengths=tuple((3 + level // 2, 6 + level // 2) for level in range(LEVELS)),
            kinds=tuple(range(1, LEVELS + 1)),
            passed=0.85,
        ),
    ),
}
