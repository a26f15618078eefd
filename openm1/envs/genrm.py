"""A generative reward model: a judge that writes its reasons before its verdict, over any `Policy`.

M1 judged what no rule can grade (arXiv 2506.13585, section 4): against a reference answer on five
grades, and pairwise against a reference reply as -1, 0 or 1. Judges favour a position, so each
question is put twice with the two texts swapped.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Literal

from openm1.chat.format import ChatFormat
from openm1.chat.reply import parse_reply
from openm1.envs.base import GraderError, prompt_text
from openm1.protocols import Env, Policy, Taskset
from openm1.types import Message, SamplingParams, StepResult, Task

GRADES = {"1": 0.0, "2": 0.25, "3": 0.5, "4": 0.75, "5": 1.0}
CHOICES = ("FIRST", "SECOND", "TIE")
JUDGING = SamplingParams(max_tokens=2048, temperature=0.0)

GRADE_TASK = """Judge how far the answer agrees with the reference. Its length, style and order on \
this page are of no account; what counts is whether it says the same.

Question:
{question}

{parts}

Give your reasons, then a last line "Verdict: N" with N from 1 to 5: 1 contradicts the reference, \
2 is mostly wrong, 3 is half right, 4 is right with small flaws, 5 fully agrees."""

COMPARE_TASK = """Judge which reply answers the question better. Length, style and order on this \
page are of no account.

Question:
{question}

FIRST reply:
{first}

SECOND reply:
{second}

Give your reasons, then a last line "Verdict: FIRST", "Verdict: SECOND" or "Verdict: TIE"."""


class NoVerdict(GraderError):
    """The judge's reply has no verdict of the allowed ones: an error, never a grade of 0."""


class Judge:
    """Asks a policy for verdicts. Each call is two requests, one per order of the texts.

    Raises GraderError where the policy fails, NoVerdict where it does not judge.
    """

    def __init__(
        self, policy: Policy, chat_format: ChatFormat, params: SamplingParams = JUDGING
    ) -> None:
        self.policy, self.chat_format, self.params = policy, chat_format, params

    async def grade(self, *, question: str, reference: str, answer: str) -> float:
        """0, 1/4, .. 1 for the agreement with the reference; the mean over both orders."""
        parts = (f"Reference:\n{reference}", f"Answer:\n{answer}")
        orders = ("\n\n".join(parts), "\n\n".join(reversed(parts)))
        verdicts = await asyncio.gather(
            *(self._ask(GRADE_TASK.format(question=question, parts=o), GRADES) for o in orders)
        )
        return sum(GRADES[verdict] for verdict in verdicts) / 2

    async def compare(self, *, question: str, reference: str, answer: str) -> float:
        """1 if the answer beats the reference in both orders, -1 if it loses in both, else 0."""
        pairs = ((answer, reference), (reference, answer))
        first, second = await asyncio.gather(
            *(
                self._ask(COMPARE_TASK.format(question=question, first=a, second=b), CHOICES)
                for a, b in pairs
            )
        )
        if (first, second) == ("FIRST", "SECOND"):
            return 1.0
        return -1.0 if (first, second) == ("SECOND", "FIRST") else 0.0

    async def _ask(self, text: str, allowed: dict[str, float] | tuple[str, ...]) -> str:
        prompt_ids = self.chat_format.encode([Message(role="user", content=text)])
        try:
            completion = await self.policy.generate(prompt_ids, self.params)
        except Exception as failure:
            raise GraderError(f"the judge failed: {type(failure).__name__}: {failure}") from failure
        reply = parse_reply(self.chat_format.tokenizer, completion.token_ids).content
        found = re.findall(r"Verdict: *(\w+)", reply)
        if not found or found[-1] not in allowed:
            raise NoVerdict(
                f"the judge's reply ends with {reply[-80:]!r}; allowed is a last line 'Verdict: ..'"
                f" with one of {', '.join(allowed)}"
            )
        return found[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardShaping:
    """From a judge's score to a reward: overpaid length is taken off, then it is clipped."""

    low: float = 0.0
    """-1 for a judge that compares."""
    high: float = 1.0
    cost_per_char: float = 0.0
    """Taken off for each character of the answer above `typical_chars`, given for each below.
    Negative for a judge that pays for brevity."""
    typical_chars: float = 0.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low}, high is {self.high}; allowed is low below high")
        if not math.isfinite(self.cost_per_char):
            raise ValueError(f"cost_per_char is {self.cost_per_char}; allowed is a finite number")
        if not 0 <= self.typical_chars < math.inf:
            raise ValueError(f"typical_chars is {self.typical_chars}; allowed is 0 or more")

    def reward(self, score: float, length_chars: int) -> float:
        cost = self.cost_per_char * (length_chars - self.typical_chars)
        return min(max(score - cost, self.low), self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """One judged answer, for whoever watches the judge."""

    question: str
    reward: float
    """After shaping."""
    rule_reward: float
    """What the rule of the judged taskset says: answers with the same are equally correct."""
    length_chars: int


Mode = Literal["grade", "compare"]


class JudgedTaskset:
    """The tasks of another taskset with a judge's reward in place of the rule's; a `Taskset`.

    The rule still grades, for the watcher alone. `shaping` may be set anew while a run goes on.
    """

    def __init__(
        self,
        inner: Taskset,
        judge: Judge,
        *,
        mode: Mode = "grade",
        shaping: RewardShaping | None = None,
        watcher: Callable[[Judgement], None] | None = None,
    ) -> None:
        if mode not in ("grade", "compare"):
            raise ValueError(f"mode is {mode!r}; allowed are grade, compare")
        self.inner, self.judge, self.watcher = inner, judge, watcher
        self.name = inner.name
        self._score = judge.grade if mode == "grade" else judge.compare
        self.shaping = shaping or RewardShaping(low=0.0 if mode == "grade" else -1.0)

    def charge_for_length(self, cost_per_char: float, typical_chars: float) -> None:
        """Takes that much more off for each character than now; the point without cost moves."""
        total = self.shaping.cost_per_char + cost_per_char
        self.shaping = replace(self.shaping, cost_per_char=total, typical_chars=typical_chars)

    def state(self) -> dict[str, float]:
        """What was set anew while a run went on, for its checkpoint."""
        return asdict(self.shaping)

    def load_state(self, state: dict[str, float]) -> None:
        self.shaping = RewardShaping(**state)

    async def score(self, task: Task, answer: str, rule_reward: float) -> float:
        question = prompt_text(task)
        raw = await self._score(question=question, reference=task.answer, answer=answer)
        reward = self.shaping.reward(raw, len(answer))
        if self.watcher is not None:
            judgement = Judgement(
                question=question,
                reward=reward,
                rule_reward=rule_reward,
                length_chars=len(answer),
            )
            self.watcher(judgement)
        return reward

    def train(self, seed: int) -> Iterator[Task]:
        return self.inner.train(seed)

    def test(self, seed: int, num_samples: int) -> list[Task]:
        return self.inner.test(seed, num_samples)

    def solution(self, task: Task, rng: Random) -> Message:
        return self.inner.solution(task, rng)

    def make_env(self, task: Task) -> Env:
        return JudgedEnv(self, task)

    def validate(self, task: Task) -> None:
        """Of the rule: what a judge says of gold and garbage is a measurement, not a check."""
        self.inner.validate(task)


class JudgedEnv:
    """Plays the inner environment and has its last reply judged; implements `protocols.Env`."""

    def __init__(self, taskset: JudgedTaskset, task: Task) -> None:
        self.taskset, self.task = taskset, task
        self.env = taskset.inner.make_env(task)

    async def start(self) -> list[Message]:
        return await self.env.start()

    async def step(self, reply: Message) -> StepResult:
        result = await self.env.step(reply)
        if not result.done:
            return result
        reward = await self.taskset.score(self.task, reply.content, result.reward)
        return replace(result, reward=reward)

    async def close(self) -> None:
        await self.env.close()
