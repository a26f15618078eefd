"""Recheck: a chain of lookups with unreliable hints, where looking for oneself is rare at first.

At each turn the environment names an operation, a fixed permutation of 16 symbols, and a hint at
its result that is right 70 % of the time. The model writes a fork: `!` and the value it finds
itself, or `.`, and the hint becomes the value. Only a chain without a wrong value is right. So
`!` stands in right and in wrong replies, as reflective tokens do (arXiv 2506.13585, section 3.1);
whoever starts with few of them has to make a rare token common.

With several kinds of operations each kind has a mark of its own, and only the right mark checks:
after another kind's mark the hint stands.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from random import Random
from string import ascii_letters, ascii_lowercase

from openm1.envs.base import SingleTurnTaskset, prompt_text, stable_hash
from openm1.types import Message, StepResult, Task

SKIP = "."
RECHECKS = "!?#$%&*+"
"""The mark of each kind of operation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecheckConfig:
    """How long the chains are, and how much there is to look up."""

    num_symbols: int = 16
    operations_per_kind: int = 8
    num_kinds: int = 1
    min_turns: int = 3
    max_turns: int = 6
    hint_right: float = 0.7
    """How often a hint is right; a wrong one is any other symbol."""

    def __post_init__(self) -> None:
        def need(good: bool, name: str, allowed: str) -> None:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {allowed}")

        need(2 <= self.num_symbols <= 26, "num_symbols", "2 to 26")
        need(1 <= self.num_kinds <= len(RECHECKS), "num_kinds", f"1 to {len(RECHECKS)}")
        most = len(ascii_letters) - self.num_symbols
        need(
            1 <= self.operations_per_kind * self.num_kinds <= most,
            "operations_per_kind",
            f"1 to {most // self.num_kinds} with {self.num_kinds} kinds",
        )
        need(1 <= self.min_turns <= self.max_turns, "min_turns", f"1 to {self.max_turns}")
        need(0 <= self.hint_right <= 1, "hint_right", "0 to 1")

    @property
    def symbols(self) -> str:
        return ascii_lowercase[: self.num_symbols]

    @property
    def operations(self) -> str:
        """Their letters, those of a kind side by side."""
        return ascii_letters[::-1][: self.num_kinds * self.operations_per_kind]

    def recheck(self, operation: str) -> str:
        """The mark that checks this operation."""
        return RECHECKS[self.operations.index(operation) // self.operations_per_kind]


class RecheckTaskset(SingleTurnTaskset):
    """Prompt `3 c`, then at each turn `Zd` -> `!g` or `.`; the answer is the values, `gab`.

    Hints are the environment's chance: each play of a task has others. They are the same for the
    n-th play of a task in every process.
    """

    name = "recheck"

    def __init__(self, config: RecheckConfig | None = None) -> None:
        self.config = config or RecheckConfig()
        self._plays: Counter[str] = Counter()

    @cached_property
    def tables(self) -> dict[str, str]:
        """Each operation's permutation: where `config.symbols` go. They never change."""
        tables: dict[str, str] = {}
        for operation in self.config.operations:
            symbols = list(self.config.symbols)
            Random(stable_hash(f"recheck/{operation}")).shuffle(symbols)
            tables[operation] = "".join(symbols)
        return tables

    def apply(self, operation: str, value: str) -> str:
        return self.tables[operation][self.config.symbols.index(value)]

    def draw(self, rng: Random) -> Task:
        num_turns = rng.randint(self.config.min_turns, self.config.max_turns)
        start = rng.choice(self.config.symbols)
        operations = "".join(rng.choice(self.config.operations) for _ in range(num_turns))
        values, value = "", start
        for operation in operations:
            value = self.apply(operation, value)
            values += value
        prompt = (Message(role="user", content=f"{operations} {start}"),)
        return Task(family=self.name, prompt=prompt, answer=values)

    def think(self, task: Task) -> str:
        """What the reply to each turn should be, one after another."""
        operations = prompt_text(task).split()[0]
        return " ".join(
            self.config.recheck(operation) + value
            for operation, value in zip(operations, task.answer, strict=True)
        )

    def hint(self, rng: Random, operation: str, value: str) -> str:
        """At the result of `operation` on the value as it stands."""
        right = self.apply(operation, value)
        if rng.random() < self.config.hint_right:
            return right
        return rng.choice(self.config.symbols.replace(right, ""))

    def make_env(self, task: Task) -> RecheckEnv:
        prompt = prompt_text(task)
        play = self._plays[prompt]
        self._plays[prompt] += 1
        return RecheckEnv(self, task, Random(stable_hash(f"{prompt}/{play}")))


class RecheckEnv:
    """One chain being played; implements `protocols.Env`."""

    def __init__(self, taskset: RecheckTaskset, task: Task, rng: Random) -> None:
        self.taskset, self.task, self.rng = taskset, task, rng
        self.operations, self.value = prompt_text(task).split()
        self.values = ""
        self.shown = ""

    async def start(self) -> list[Message]:
        return [*self.task.prompt, self._ask()]

    async def step(self, reply: Message) -> StepResult:
        """A reply that is no check of the right kind leaves the hint as the value."""
        if len(self.values) == len(self.operations):
            raise ValueError("recheck: this chain has ended already")
        operation = self.operations[len(self.values)]
        mark, found = reply.content.strip()[:1], reply.content.strip()[1:]
        checked = mark == self.taskset.config.recheck(operation)
        self.value = found if checked else self.shown
        self.values += self.value if self.value in set(self.taskset.config.symbols) else "-"
        if len(self.values) == len(self.operations) or self.values[-1] == "-":
            return StepResult(reward=self.taskset.grade(self.task, self.values), done=True)
        return StepResult(reward=0.0, done=False, messages=(self._ask(),))

    async def close(self) -> None:
        pass

    def _ask(self) -> Message:
        operation = self.operations[len(self.values)]
        self.shown = self.taskset.hint(self.rng, operation, self.value)
        return Message(role="user", content=operation + self.shown)
