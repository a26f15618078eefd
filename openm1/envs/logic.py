"""Logic: families of the reasoning-gym package, each with a worked thought in short local steps.

Prompts and grading are the package's own; the thoughts are in `envs.thoughts`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from random import Random
from typing import Any

from openm1.envs.base import SingleTurnTaskset, prompt_text
from openm1.envs.phrases import ANIMALS
from openm1.envs.thoughts.letters import (
    think_count_bits,
    think_letter_counting,
    think_spell_backward,
    think_word_sequence_reversal,
)
from openm1.envs.thoughts.numbers import (
    think_chain_sum,
    think_complex_arithmetic,
    think_gcd,
    think_lcm,
    think_leg_counting,
    think_prime_factorization,
    think_products,
    think_simple_equations,
    think_simple_geometry,
)
from openm1.envs.thoughts.relations import (
    FEMALE_RELATIONS,
    think_aiw,
    think_family_relationships,
    think_syllogism,
)
from openm1.types import Message, Task

_EQUATION = re.compile(
    r"(?:(?P<first>\d+) - )?(?P<minus>-?)(?:(?P<factor>\d+)\*)?[a-z]"
    r"(?: (?P<sign>[+-]) (?P<last>\d+))?"
)
_ASKED = re.compile(r"(?:What is|How is|What relation is) (\w+) (?:related )?to (\w+)\?")
_WITHOUT_UNKNOWN = re.compile(r": -?\d+ = -?\d+$")
_NOT_A_NUMBER = re.compile(r"(?i)\bnan\b|\binf(inity)?\b")


def read_equation(equation: str) -> tuple[int, int, int]:
    """`84*t + 4370 = 9410` or `7 - 3*t = 1` as (factor, constant, value)."""
    left, value = equation.split(" = ")
    match = _EQUATION.fullmatch(left)
    if match is None:
        raise ValueError(f"equation is {equation!r}; allowed is one unknown, once")
    factor = int(match["factor"] or 1) * (-1 if match["minus"] or match["first"] else 1)
    constant = int(match["first"] or match["last"] or 0) * (-1 if match["sign"] == "-" else 1)
    return factor, constant, int(value)


def read_kinship(task: Task) -> tuple[str, str, str]:
    """The story, and who is asked to be what to whom."""
    story, question = prompt_text(task).split("\n\n")
    match = _ASKED.match(question)
    assert match is not None
    return story, match[1], match[2]


def _think_kinship(task: Task) -> str:
    gender = "female" if task.answer in FEMALE_RELATIONS else "male"
    return think_family_relationships(*read_kinship(task), gender)


def _think_complex(item: Mapping[str, Any]) -> str:
    (a, b), (c, d), (e, f) = (map(int, item[name]) for name in ("num1", "num2", "result"))
    signs = {"+": "+", "-": "-", "*": "×", "/": "÷"}
    return think_complex_arithmetic((a, b), signs[item["operation"]], (c, d), (e, f))


def _think_legs(item: Mapping[str, Any]) -> str:
    return think_leg_counting(
        [(count, name, ANIMALS[name]) for name, count in item["animals"].items()]
    )


def read_factors(question: str) -> list[int]:
    """The numbers of a product."""
    return [int(number) for number in re.findall(r"\d+", question)]


THOUGHTS: dict[str, Callable[[Task], str]] = {
    "count_bits": lambda task: think_count_bits(task.metadata["number"]),
    "spell_backward": lambda task: think_spell_backward(task.metadata["word"]),
    "letter_counting": lambda task: think_letter_counting(
        task.metadata["target_letter"], task.metadata["span"]
    ),
    "word_sequence_reversal": lambda task: think_word_sequence_reversal(task.metadata["words"]),
    "chain_sum": lambda task: think_chain_sum(task.metadata["expression"]),
    "products": lambda task: think_products(*read_factors(prompt_text(task))),
    "gcd": lambda task: think_gcd(*task.metadata["numbers"]),
    "lcm": lambda task: think_lcm(*task.metadata["numbers"]),
    "prime_factorization": lambda task: think_prime_factorization(task.metadata["number"]),
    "leg_counting": lambda task: _think_legs(task.metadata),
    "simple_equations": lambda task: think_simple_equations(
        *read_equation(task.metadata["equation"])
    ),
    "simple_geometry": lambda task: think_simple_geometry(
        task.metadata["n_sides"], [int(angle) for angle in task.metadata["known_angles"]]
    ),
    "complex_arithmetic": lambda task: _think_complex(task.metadata),
    "aiw": lambda task: think_aiw(int(task.answer) - 1),
    "syllogism": lambda task: think_syllogism(task.metadata),
    "family_relationships": _think_kinship,
}
"""From one of the package's items to its worked thought."""

REDUCED: dict[str, dict[str, Any]] = {
    "products": {"max_digits": 3},
    "simple_equations": {"max_terms": 2, "max_value": 20},
}
"""Families that are asked here at less than the package's default difficulty, and how."""

EASIER: dict[str, dict[str, Any]] = {
    "count_bits": {"max_n": 1000},
    "letter_counting": {"min_words": 1, "max_words": 4},
    "word_sequence_reversal": {"max_words": 4},
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "products": {"max_digits": 2},
    "gcd": {"max_value": 100},
    "lcm": {"max_value": 20},
    "prime_factorization": {"max_value": 100},
    "leg_counting": {"min_animals": 1, "max_animals": 3, "max_instances": 9},
    "simple_equations": {"max_terms": 2, "max_value": 9},
    "simple_geometry": {"max_sides": 4},
}
"""Options for items easier than the package's default: to begin with, and to chat about."""


class LogicTaskset(SingleTurnTaskset):
    """One family of reasoning-gym, with the package's defaults unless `options` change them.

    `LogicTaskset("chain_sum", max_terms=3, max_digits=2)` is an easier sum. Reward is 1.0 only for
    the package's full score: many of its scorers pay fractions for fragments.
    """

    def __init__(self, name: str, **options: Any) -> None:
        if name not in THOUGHTS:
            raise ValueError(f"logic family is {name!r}; allowed are {', '.join(THOUGHTS)}")
        self.name = name
        self.options = options

    @cached_property
    def _dataset(self) -> Any:
        # Importing the package takes seconds, so only a family that is used pays for it.
        try:
            import reasoning_gym
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the tasks of {self.name} come from reasoning-gym: pip install 'openm1[logic]'"
            ) from error

        return reasoning_gym.create_dataset(self.name, seed=0, size=2**40, **self.options)

    def draw(self, rng: Random) -> Task:
        # The package seeds item i with seed + i, so items under neighbouring seeds are the same.
        # Indices far apart in one long dataset are independent, and cost no new dataset.
        item = self._dataset[rng.getrandbits(40)]
        # An equation whose unknown has dropped out, such as 7 = 7, has no answer.
        while _WITHOUT_UNKNOWN.search(item["question"]):
            item = self._dataset[rng.getrandbits(40)]
        return Task(
            family=self.name,
            prompt=(Message(role="user", content=item["question"]),),
            answer=item["answer"],
            metadata=item["metadata"],
        )

    def think(self, task: Task) -> str:
        return THOUGHTS[self.name](task)

    def grade(self, task: Task, answer: str) -> float:
        entry = {
            "question": task.prompt[0].content,
            "answer": task.answer,
            "metadata": dict(task.metadata),
        }
        # A distance that is not a number counts as none at all in some scorers.
        if _NOT_A_NUMBER.search(answer):
            return 0.0
        try:
            score = self._dataset.score_answer(answer.strip(), entry)
        except (ArithmeticError, ValueError, TypeError, LookupError):
            # Some scorers raise on text they cannot read, and such text is a wrong answer.
            return 0.0
        return float(score == 1)
