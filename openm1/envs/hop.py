"""Hop: follow a chain of key-value pairs, one lookup after another."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

from openm1.envs.base import SingleTurnTaskset, prompt_text
from openm1.types import Message, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class HopConfig:
    """How many pairs there are and how far the walk goes."""

    num_pairs: int = 8
    min_hops: int = 1
    max_hops: int = 5

    def __post_init__(self) -> None:
        if not 3 <= self.num_pairs <= len(ascii_lowercase):
            raise ValueError(f"num_pairs is {self.num_pairs!r}; allowed is 3 to 26")
        # The walk must not come back to its start, and the thought counts down in one digit.
        if not 1 <= self.min_hops <= self.max_hops <= min(9, self.num_pairs - 1):
            raise ValueError(
                f"hops are {self.min_hops} to {self.max_hops}; allowed is "
                f"1 <= min_hops <= max_hops <= {min(9, self.num_pairs - 1)}"
            )


def hop_words(config: HopConfig) -> tuple[str, ...]:
    """What a tokenizer should write as one token: each possible pair, and each count of hops."""
    letters = ascii_lowercase[: config.num_pairs]
    pairs = (f" {key}>{value}" for key in letters for value in letters if key != value)
    return (*(f" {count} hops" for count in range(config.max_hops + 1)), *pairs)


HOP_WORDS: tuple[str, ...] = hop_words(HopConfig())


class HopTaskset(SingleTurnTaskset):
    """Prompt `c 3 hops: a>f c>b b>h h>a ...`, thought `c 3 hops c>b 2 hops b>h ...`, answer `a`.

    The pairs form one cycle through all letters, so that no key maps to itself and no walk returns
    to its start: always giving one letter scores 1 in 8, guessing any but the start 1 in 7. The
    thought names each pair it follows and then the hops still to go, so that the next step and
    the end can be read off its last two tokens.
    """

    name = "hop"

    def __init__(self, config: HopConfig | None = None) -> None:
        self.config = config or HopConfig()

    def draw(self, rng: Random) -> Task:
        cycle = list(ascii_lowercase[: self.config.num_pairs])
        rng.shuffle(cycle)
        num_hops = rng.randint(self.config.min_hops, self.config.max_hops)
        pairs = [f"{key}>{value}" for key, value in zip(cycle, cycle[1:] + cycle[:1], strict=True)]
        rng.shuffle(pairs)
        # The cycle has been shuffled: walking from its first letter is walking from any.
        text = f"{cycle[0]} {num_hops} hops: {' '.join(pairs)}"
        prompt = (Message(role="user", content=text),)
        return Task(family=self.name, prompt=prompt, answer=cycle[num_hops])

    def think(self, task: Task) -> str:
        key, num_hops, _, *pairs = prompt_text(task).split()
        values = dict(pair.split(">") for pair in pairs)
        items = [key, num_hops, "hops"]
        for remaining in reversed(range(int(num_hops))):
            items += [f"{key}>{values[key]}", str(remaining), "hops"]
            key = values[key]
        return " ".join(items)
