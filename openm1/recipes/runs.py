"""One stage of a training as a value, and how it runs: the base of every recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from openm1.chat.template import ChatFormat, chat_format_for
from openm1.chat.tokenizer import Tokenizer
from openm1.data.packing import Example
from openm1.data.sft import conversation_example
from openm1.engine.llm import load_tokenizer
from openm1.envs.base import stable_hash
from openm1.envs.calculator import calculator_conversation
from openm1.envs.catalog import make_levels, make_taskset
from openm1.envs.chain import ChainTaskset
from openm1.envs.curriculum import Course, Curriculum, CurriculumConfig
from openm1.envs.logic import EASIER, LogicTaskset
from openm1.envs.mixture import Mixture
from openm1.envs.wordings import WORDINGS, reword
from openm1.model.config import M1Config, post_norm_config
from openm1.model.m1 import M1ForCausalLM
from openm1.protocols import Taskset
from openm1.recipes.pass_rate import PassRateFilter, keep_learnable
from openm1.recipes.vocabulary import nano_tokenizer, padded_vocab_size
from openm1.rl.config import RLConfig
from openm1.rl.local import train_rl_locally
from openm1.rl.loop import StepHook
from openm1.train.checkpoint import RunFolder
from openm1.train.parallel import Processes
from openm1.train.supervised import Source, SupervisedConfig, train_supervised
from openm1.types import Message, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A nano model's size; everything else has M1's ratios."""

    hidden_size: int = 64
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    intermediate_size: int = 64
    softmax_period: int = 8
    """Every such layer is softmax: 8 is M1's 7:1, 4 is 3:1."""
    num_local_experts: int = 4

    def config(self, tokenizer: Tokenizer) -> M1Config:
        return post_norm_config(
            vocab_size=padded_vocab_size(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            period=self.softmax_period,
            num_local_experts=self.num_local_experts,
            max_position_embeddings=10_240_000,
            eos_token_id=tokenizer.eos_token_id,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceData:
    """Worked solutions of tasks as conversations."""

    families: dict[str, float]
    """Tasksets and their weights."""
    batch_tokens: int = 4096
    """Tokens per optimizer step, filled with whole conversations."""
    chain_full_share: float = 1.0
    """Share of chain's thoughts that compute after every operation; the others take short cuts."""
    max_turns: int = 1
    """Conversations ask one to this many questions, one after the other."""
    direct_share: dict[str, float] = field(default_factory=dict)
    """Per family, the share of conversations that answer without a thought."""
    easier_share: float = 0.0
    """Share of items drawn easier than the family's difficulty, where it has such items."""
    reworded_share: float = 0.0
    """Share of questions asked in other words, where a family has them."""
    calculator_share: float = 0.0
    """Share of conversations that offer a calculator and use it."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "max_turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is at least 1")
        for name in ("chain_full_share", "easier_share", "reworded_share", "calculator_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is 0 to 1")
        if unknown := set(self.direct_share) - set(self.families):
            raise ValueError(f"direct_share names {sorted(unknown)}, which are not in families")


class TraceSource:
    """`train.supervised.Source`: the conversations of a step, from (seed, step) alone."""

    def __init__(self, data: TraceData, chat_format: ChatFormat) -> None:
        self.data, self.chat_format = data, chat_format
        self.mixture = Mixture(
            [make_taskset(name) for name in data.families],
            weights=list(data.families.values()),
            seed=data.seed,
        )
        self.easier = {
            name: LogicTaskset(name, **EASIER[name]) for name in data.families if name in EASIER
        }

    def __call__(self, step: int) -> Sequence[Example]:
        examples: list[Example] = []
        room = self.data.batch_tokens
        # Steps are far apart in the stream: no batch reaches into the next one's tasks.
        place = step * 1_000_000
        while room > 0:
            rng = self._random(place, "turns")
            num_turns = rng.randint(1, self.data.max_turns)
            if rng.random() < self.data.calculator_share:
                messages, tools = calculator_conversation(self._random(place, "calculator"))
            else:
                # One way of answering for the whole chat: its later replies go like its first.
                hurry = self._random(place, "hurry").random()
                turns = [self._turn(place + i, hurry) for i in range(num_turns)]
                messages, tools = [message for turn in turns for message in turn], []
            place += num_turns
            examples.append(conversation_example(self.chat_format, messages, tools))
            room -= len(examples[-1].token_ids)
        return examples

    def _turn(self, place: int, hurry: float) -> list[Message]:
        """A question, in the family's words or a person's, and its reply."""
        taskset, task = self.mixture.task(place)
        rng = self._random(place, "question")
        if rng.random() < self.data.easier_share and task.family in self.easier:
            easier = self.easier[task.family]
            task = next(easier.train(stable_hash(f"{self.data.seed}/{place}/easier")))
        asked = task
        if rng.random() < self.data.reworded_share and task.family in WORDINGS:
            asked = reword(task, rng)
        return [*asked.prompt, self._reply(taskset, task, hurry, self._random(place, "reply"))]

    def _random(self, place: int, use: str) -> Random:
        """Its own numbers for each use: shared ones would tie what should be independent."""
        return Random(stable_hash(f"{self.data.seed}/{place}/{use}"))

    def _reply(self, taskset: Taskset, task: Task, hurry: float, rng: Random) -> Message:
        if hurry < self.data.direct_share.get(task.family, 0.0):
            return Message(role="assistant", reasoning="", content=task.answer)
        if isinstance(taskset, ChainTaskset):
            return taskset.trace(task, rng, share_full=self.data.chain_full_share)
        return taskset.solution(task, rng)


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedRun:
    """Pretraining (from scratch) or fine-tuning (from `init`)."""

    folder: Path
    data: TraceData
    train: SupervisedConfig
    init: Path | None = None
    """A checkpoint to start from; None starts from random weights of `shape`."""
    shape: ModelShape = field(default_factory=ModelShape)
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RLRun:
    """Reinforcement learning from a checkpoint."""

    folder: Path
    init: Path
    families: dict[str, float]
    rl: RLConfig
    curriculum: CurriculumConfig | None = None
    """With one, each family begins with its easiest tasks; their rules verify all of them."""
    pass_rate: PassRateFilter | None = None
    """With one, the start plays some prompts first, and only those it sometimes gets right stay."""
    max_num_seqs: int = 256

    def __post_init__(self) -> None:
        if self.curriculum is not None and self.pass_rate is not None:
            raise ValueError("a curriculum draws its own tasks; allowed is it or pass_rate")


def run_supervised(run: SupervisedRun, title: str) -> Path:
    """Trains or resumes; returns the last checkpoint."""
    processes = Processes.joined()
    # The first one makes the folder, the others find it whole.
    if not processes.is_first:
        processes.wait()
    folder = RunFolder.open(run.folder, run)
    if processes.is_first:
        processes.wait()
    if run.init is None:
        tokenizer = nano_tokenizer()
        model = M1ForCausalLM(run.shape.config(tokenizer), seed=run.seed)
    else:
        model, tokenizer = load_start(run.init)
    source: Source = TraceSource(run.data, chat_format_for(tokenizer))
    return train_supervised(model, source, run.train, folder, tokenizer=tokenizer, title=title)


def run_rl(run: RLRun, title: str, on_step: StepHook | None = None) -> Path:
    """Trains or resumes; returns the last checkpoint."""
    folder = RunFolder.open(run.folder, run)
    model, tokenizer = load_start(run.init)
    mixture = _mixture(run)
    if run.pass_rate is not None:
        mixture = keep_learnable(
            mixture,
            run.pass_rate,
            model,
            tokenizer,
            run.rl,
            run.folder,
            max_num_seqs=run.max_num_seqs,
        )
    return train_rl_locally(
        model,
        tokenizer,
        mixture,
        run.rl,
        folder,
        title=title,
        max_num_seqs=run.max_num_seqs,
        on_step=on_step,
    )


def _mixture(run: RLRun) -> Mixture:
    if run.curriculum is not None:
        courses = [Course(levels=make_levels(n), weight=w) for n, w in run.families.items()]
        return Curriculum(courses, run.curriculum, seed=run.rl.seed)
    tasksets = [make_taskset(name) for name in run.families]
    return Mixture(tasksets, weights=list(run.families.values()), seed=run.rl.seed)


def load_start(path: Path) -> tuple[M1ForCausalLM, Tokenizer]:
    """A checkpoint's model and tokenizer; a run folder stands for its newest checkpoint."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; run the stage before this one, or give --init")
    if (path / "checkpoints").is_dir():
        latest = RunFolder(path).latest()
        if latest is None:
            raise ValueError(f"{path} holds no whole checkpoint yet")
        path = latest
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer.json, which training needs")
    return M1ForCausalLM.from_pretrained(path), tokenizer
