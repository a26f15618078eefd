"""What every single-turn task shares: its environment, its self-check and the hold-out rule."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random

from openm1.protocols import Env
from openm1.types import Message, StepResult, Task

HELD_OUT_ONE_IN = 10
"""One prompt in this many belongs to the test side, in every family."""

MAX_FRUITLESS_DRAWS = 20_000
"""Draws without a usable prompt after which a family is taken to have run dry."""

GARBAGE = "?!"
"""A reply that answers no question of any family."""


class GraderError(RuntimeError):
    """What grades a reply broke or gave no verdict: `Rollout.error_source` is then "grader"."""


def prompt_text(task: Task) -> str:
    """The words of the question, which are what the hold-out rule and distinctness look at."""
    return "\n".join(message.content for message in task.prompt)


def normalise_prompt(prompt: str) -> str:
    """Prompts that differ only in case or spacing are one prompt to the hold-out rule."""
    return " ".join(prompt.lower().split())


def stable_hash(text: str) -> int:
    """64 bits that are the same in every process, unlike the built-in hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is for testing only. It depends on nothing but its words.

    Holding out by seed would not do: generators repeat items under neighbouring seeds, and small
    prompt spaces overlap under any two seeds.
    """
    return stable_hash(normalise_prompt(prompt)) % HELD_OUT_ONE_IN == 0


def majority_accuracy(tasks: Sequence[Task]) -> float:
    """The accuracy of always giving the commonest answer: what a skill has to beat."""
    if not tasks:
        raise ValueError("majority_accuracy needs at least one task, but the sequence is empty")
    return Counter(task.answer for task in tasks).most_common(1)[0][1] / len(tasks)


class SingleTurnTaskset(ABC):
    """A taskset whose tasks are one question and one reply; a family adds `draw` and `think`."""

    name: str

    @abstractmethod
    def draw(self, rng: Random) -> Task:
        """One task from either side of the hold-out, determined by `rng` alone."""

    @abstractmethod
    def think(self, task: Task) -> str:
        """The worked thought that leads to `task.answer`, every step written out."""

    def grade(self, task: Task, answer: str) -> float:
        """1.0 when the answer, stripped, is the gold answer to the letter, else 0.0."""
        return float(answer.strip() == task.answer)

    def solution(self, task: Task, rng: Random) -> Message:
        """The same for every `rng` here; families with several good thoughts may use it."""
        return Message(role="assistant", reasoning=self.think(task), content=task.answer)

    def train(self, seed: int) -> Iterator[Task]:
        rng = self._rng("train", seed)
        while True:
            yield self._draw_new(rng, held_out=False, seen=frozenset())

    def test(self, seed: int, num_samples: int) -> list[Task]:
        """Distinct prompts. Raises ValueError if the family has too few held-out ones."""
        if num_samples < 0:
            raise ValueError(f"num_samples is {num_samples!r}; allowed is 0 or more")
        rng = self._rng("test", seed)
        tasks: list[Task] = []
        seen: set[str] = set()
        while len(tasks) < num_samples:
            task = self._draw_new(rng, held_out=True, seen=seen)
            seen.add(normalise_prompt(prompt_text(task)))
            tasks.append(task)
        return tasks

    def make_env(self, task: Task) -> Env:
        return QuestionEnv(self, task)

    def validate(self, task: Task) -> None:
        """Raises ValueError unless gold scores 1, empty 0, garbage 0 and quoting the prompt 0."""
        prompt = prompt_text(task)
        replies = {
            "the gold answer": (task.answer, 1.0),
            "an empty answer": ("", 0.0),
            "garbage": (GARBAGE, 0.0),
            "quoting the prompt": (prompt, 0.0),
        }
        for kind, (reply, expected) in replies.items():
            score = self.grade(task, reply)
            if score != expected:
                raise ValueError(
                    f"{self.name}: {kind} scores {score}, must be {expected}; prompt {prompt!r}"
                )

    def _rng(self, side: str, seed: int) -> Random:
        # The hash keeps the streams of neighbouring seeds, and of families, apart.
        return Random(stable_hash(f"{self.name}/{side}/{seed}"))

    def _draw_new(self, rng: Random, *, held_out: bool, seen: set[str] | frozenset[str]) -> Task:
        for _ in range(MAX_FRUITLESS_DRAWS):
            task = self.draw(rng)
            prompt = prompt_text(task)
            if is_held_out(prompt) == held_out and normalise_prompt(prompt) not in seen:
                return task
        raise ValueError(
            f"{self.name}: no {'new held-out' if held_out else 'training'} prompt in "
            f"{MAX_FRUITLESS_DRAWS} draws after {len(seen)}; ask for fewer samples"
        )


class QuestionEnv:
    """A question and one reply to it; implements `protocols.Env`."""

    def __init__(self, taskset: SingleTurnTaskset, task: Task) -> None:
        self.taskset = taskset
        self.task = task
        self.done = False

    async def start(self) -> list[Message]:
        return list(self.task.prompt)

    async def step(self, reply: Message) -> StepResult:
        if self.done:
            raise ValueError(f"{self.task.family}: this question has been answered already")
        self.done = True
        return StepResult(reward=self.taskset.grade(self.task, reply.content), done=True)

    async def close(self) -> None:
        self.done = True
