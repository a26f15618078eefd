"""Chain: digit arithmetic from left to right, modulo ten, where each thought chooses its stride.

After every operation of the thought there is a fork: write the result so far, or the next
operation. Computing each time is easy for a tiny model; several operations at once are not. That
makes "think in small steps" a thing that reinforcement learning can find.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from openm1.envs.base import SingleTurnTaskset, prompt_text
from openm1.types import Message, Task

OPERANDS = {"+": "0123456789", "-": "0123456789", "*": "379"}
"""Every operation permutes the ten digits, so answers are uniform and chance is exactly 10 %."""

CHAIN_WORDS: tuple[str, ...] = (
    *(f" {sign}{operand}" for sign, operands in OPERANDS.items() for operand in operands),
    *(f" ={digit}" for digit in range(10)),
)
"""What a tokenizer should write as one token; the leading digit stays a plain character."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainConfig:
    """How long the chains are, and how the short thoughts look."""

    min_operations: int = 2
    max_operations: int = 6
    short_compute_share: float = 0.1
    """The chance that a short thought computes at a fork before the last one."""

    def __post_init__(self) -> None:
        if not 2 <= self.min_operations <= self.max_operations:
            raise ValueError(
                f"operations are {self.min_operations} to {self.max_operations}; "
                "allowed is 2 <= min_operations <= max_operations"
            )
        if not 0.0 <= self.short_compute_share < 1.0:
            raise ValueError(
                f"short_compute_share is {self.short_compute_share!r}; allowed is 0 to below 1"
            )


def apply_operation(value: int, operation: str) -> int:
    """`apply_operation(4, "-9")` is 5."""
    sign, operand = operation[0], int(operation[1:])
    if sign == "+":
        return (value + operand) % 10
    if sign == "-":
        return (value - operand) % 10
    if sign == "*":
        return value * operand % 10
    raise ValueError(f"chain operation is {operation!r}; it must start with one of + - *")


class ChainTaskset(SingleTurnTaskset):
    """Prompt `4 -9 +8 *9 +1`, full thought `4 -9 =5 +8 =3 *9 =7 +1 =8`, answer `8`."""

    name = "chain"

    def __init__(self, config: ChainConfig | None = None) -> None:
        self.config = config or ChainConfig()

    def draw(self, rng: Random) -> Task:
        num_operations = rng.randint(self.config.min_operations, self.config.max_operations)
        value = rng.randrange(10)
        items = [str(value)]
        for _ in range(num_operations):
            sign = rng.choice("+-*")
            operation = sign + rng.choice(OPERANDS[sign])
            items.append(operation)
            value = apply_operation(value, operation)
        prompt = (Message(role="user", content=" ".join(items)),)
        return Task(family=self.name, prompt=prompt, answer=str(value))

    def think(self, task: Task) -> str:
        num_operations = len(prompt_text(task).split()) - 1
        return self._write(task, computed=[True] * num_operations)

    def trace(self, task: Task, rng: Random, *, share_full: float) -> Message:
        """The full thought with probability `share_full`, else a short one; both are correct.

        A short thought skips at least one fork and computes at the last, so every number it
        writes is right, but some of them follow several operations at once.
        """
        if not 0.0 <= share_full <= 1.0:
            raise ValueError(f"share_full is {share_full!r}; allowed is 0 to 1")
        if rng.random() < share_full:
            return self.solution(task, rng)
        num_forks = len(prompt_text(task).split()) - 2
        computed = [rng.random() < self.config.short_compute_share for _ in range(num_forks)]
        if all(computed):
            computed[rng.randrange(num_forks)] = False
        thought = self._write(task, computed=[*computed, True])
        return Message(role="assistant", reasoning=thought, content=task.answer)

    def _write(self, task: Task, *, computed: list[bool]) -> str:
        start, *operations = prompt_text(task).split()
        items, value = [start], int(start)
        for operation, compute in zip(operations, computed, strict=True):
            value = apply_operation(value, operation)
            items.append(operation)
            if compute:
                items.append(f"={value}")
        return " ".join(items)
