"""Logic: families of the reasoning-gym package, each with a worked thought in short local steps.

Prompts and grading are the package's own. The thoughts are written for a very small model: each
character follows from a few others that stand close by or at a fixed distance, so that no step
asks for more than copying, a digit fact or counting by one. Running counts are written `(7)`, which
a tokenizer should keep whole (`LOGIC_PHRASES`, `COUNT_WORDS`); letters and digits stay single.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from random import Random
from typing import Any

from openm1.envs.base import SingleTurnTaskset
from openm1.types import Message, Task

COUNT_BITS_BASE = 4

LOGIC_PHRASES: dict[str, tuple[str, ...]] = {
    "count_bits": (
        "How many 1 bits are there in the binary representation of the number ",
        "?",
    ),
    "spell_backward": ("Spell this word backward (example: sun -> nus): ",),
    "letter_counting": (
        'How many times does the letter "',
        '" appear in the text: "',
        '"?',
    ),
    "chain_sum": ("State the final answer to the following arithmetic problem: ", " ="),
    "gcd": (
        "Find the Greatest Common Divisor (GCD) of these numbers: ",
        ". Give only the GCD as your final answer.",
    ),
}
"""The fixed parts of each family's prompt, in order; the item stands between them."""


COUNT_WORDS: tuple[str, ...] = tuple(f"({count})" for count in range(32))
"""The running counts of the thoughts; with the phrases, what a tokenizer should keep whole."""


def think_count_bits(number: int, base: int = COUNT_BITS_BASE) -> str:
    """Divide by `base` (2, 4, 8 or 16) down to nothing, counting the bits of each remainder.

    `13` in base 4 is `13(1)3(3)`: 13 leaves remainder 1, one bit; 3 leaves 3, two more bits. Only
    dividends are written. Long division goes from left to right, and as 2**k divides 10**k, a digit
    of a quotient by 2**k depends on the digit it divides and the k digits before that one, no more.
    Base 2 has the smallest table of facts and the longest thought (about 200 tokens); base 4 needs
    half of that and still looks at three neighbouring digits only.
    """
    if base not in (2, 4, 8, 16):
        raise ValueError(f"base is {base!r}; allowed are 2, 4, 8 and 16")
    steps, count = [], 0
    while number:
        count += (number % base).bit_count()
        steps.append(f"{number}({count})")
        number //= base
    return "".join(steps)


def think_spell_backward(word: str) -> str:
    """`sun` is `0s1u2n`, then `2n1u0s` on the next line.

    Reversing at once means reading at a distance that grows with each letter. With an index
    before each letter the first line is a copy and the second a countdown in which every letter is
    looked up by the digit just written, which is one step for a single attention layer. Indices
    start at 0 so that ten letters need no second digit.
    """
    numbered = [f"{index}{letter}" for index, letter in enumerate(word)]
    return "".join(numbered) + "\n" + "".join(reversed(numbered))


def think_letter_counting(letter: str, words: list[str]) -> str:
    """`a` in `Anna ran` is `A+nna+(2)ra+n(3)`: a mark at each hit, the running count at word ends.

    The counts take the place of the spaces, so that no word of a prompt's template (" the") can
    swallow the letters to be looked at.
    """
    steps, count = [], 0
    for word in words:
        count += word.lower().count(letter)
        marked = "".join(char + "+" if char.lower() == letter else char for char in word)
        steps.append(f"{marked}({count})")
    return "".join(steps)


def _column_step(left: int, sign: str, right: int) -> str:
    """`30-12:81`: an operation and its result backwards, as carries run, in full column width."""
    result = left + right if sign == "+" else left - right
    width = len(str(max(left, right)))
    return f"{left}{sign}{right}:{str(result).zfill(width)[::-1]}"


def _signed_step(left: int, sign: str, right: int) -> str:
    """One line of a running sum: `347+85:234=432`, or rewritten first if a number is negative.

    `12-30<30-12:81=-18` and `-18+30>30-18:21=12`: what follows `<` is the size of a negative
    result, what follows `>` that of a positive one, as an operation on two positive numbers.
    """
    result = left + right if sign == "+" else left - right
    if left >= 0 and result >= 0:
        return f"{_column_step(left, sign, right)}={result}"
    size, other = abs(left), right
    inner_sign = "+" if (left < 0) == (sign == "-") else "-"
    if inner_sign == "-" and size < other:
        size, other = other, size
    mark = "<" if result < 0 else ">"
    return f"{left}{sign}{right}{mark}{_column_step(size, inner_sign, other)}={result}"


def think_chain_sum(expression: str) -> str:
    """Running sums from left to right, one line each. Terms must not carry signs of their own."""
    first, *rest = expression.split()
    if not all(term.isdigit() for term in (first, *rest[1::2])):
        raise ValueError(f"expression is {expression!r}; allowed are terms of 0 or more")
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        lines.append(_signed_step(total, sign, int(term)))
        total = total + int(term) if sign == "+" else total - int(term)
    return "\n".join(lines)


def think_gcd(left: int, right: int) -> str:
    """Euclid's algorithm: each pair on a line of its own, long division between two pairs.

    For each digit of the quotient that is not 0 there is a product, with its result backwards
    first, and a subtraction. The last pair is the answer and 0.
    """
    larger, smaller = max(left, right), min(left, right)
    lines = [f"{larger},{smaller}"]
    while smaller:
        rest, quotient = larger, str(larger // smaller)
        for place, digit in enumerate(quotient):
            if digit == "0":
                continue
            part = int(digit) * 10 ** (len(quotient) - 1 - place)
            product = smaller * part
            lines.append(f"{smaller}*{part}:{str(product)[::-1]}={product}")
            lines.append(f"{_column_step(rest, '-', product)}={rest - product}")
            rest -= product
        larger, smaller = smaller, rest
        lines.append(f"{larger},{smaller}")
    return "\n".join(lines)


THOUGHTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "count_bits": lambda item: think_count_bits(item["number"]),
    "spell_backward": lambda item: think_spell_backward(item["word"]),
    "letter_counting": lambda item: think_letter_counting(item["target_letter"], item["span"]),
    "chain_sum": lambda item: think_chain_sum(item["expression"]),
    "gcd": lambda item: think_gcd(*item["numbers"]),
}
"""From the package's metadata of one item to its worked thought."""


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
        return Task(
            family=self.name,
            prompt=(Message(role="user", content=item["question"]),),
            answer=item["answer"],
            metadata=item["metadata"],
        )

    def think(self, task: Task) -> str:
        return THOUGHTS[self.name](task.metadata)

    def grade(self, task: Task, answer: str) -> float:
        entry = {
            "question": task.prompt[0].content,
            "answer": task.answer,
            "metadata": dict(task.metadata),
        }
        try:
            score = self._dataset.score_answer(answer.strip(), entry)
        except (ArithmeticError, ValueError, TypeError, LookupError):
            # Some scorers raise on text they cannot read, and such text is a wrong answer.
            return 0.0
        return float(score == 1)
