"""The same questions in other words: how a person would ask what a family's tasks ask."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random

from openm1.envs.base import QuestionEnv, SingleTurnTaskset, prompt_text, stable_hash
from openm1.envs.logic import read_factors, read_kinship
from openm1.types import Message, Task

PREFIXES = ("", "", "", "", "please ", "hey, ", "can you tell me: ", "question: ", "quick one: ")
SUFFIXES = ("", "", "", "?", "?", ".", " please", " thanks", "!")
POLYGONS = {3: "triangle", 4: "quadrilateral", 5: "pentagon", 6: "hexagon"}
PLURALS = {
    "butterfly": "butterflies", "firefly": "fireflies", "praying mantis": "praying mantises",
    "woodlouse": "woodlice", "leech": "leeches", "cockroach": "cockroaches",
    "jellyfish": "jellyfish", "starfish": "starfish", "deer": "deer", "sheep": "sheep",
    "shrimp": "shrimp",
}  # fmt: skip

OPEN_ENDED = ("letter_counting", "word_sequence_reversal")
"""Their questions may end in the item itself, which a closing word would lengthen."""

Wording = Callable[[Task, Random], str]


def _listed(items: Sequence[str], rng: Random) -> str:
    """`a, b and c`, or with a comma before each."""
    if len(items) == 1:
        return items[0]
    last = rng.choice((" and ", ", and ", ", "))
    return ", ".join(items[:-1]) + last + items[-1]


def _sum(task: Task, rng: Random) -> str:
    text = task.metadata["expression"]
    kind = rng.random()
    if kind < 0.3:
        text = text.replace(" ", "")
    elif kind < 0.5:
        text = text.replace("+", "plus").replace("-", rng.choice(("minus", "minus", "take away")))
    return rng.choice(
        (
            "what is {e}", "what's {e}", "calculate {e}", "compute {e}", "how much is {e}", "{e}",
            "{e} =", "work out {e}", "what does {e} come to", "solve {e}", "add this up: {e}",
            "what do you get for {e}", "i need the result of {e}", "evaluate {e}",
        )
    ).format(e=text)  # fmt: skip


def _product(task: Task, rng: Random) -> str:
    a, b = read_factors(prompt_text(task))
    return rng.choice(
        (
            "what is {a} times {b}", "what's {a} x {b}", "{a} * {b}", "{a}*{b}", "{a} x {b}",
            "multiply {a} by {b}", "what is the product of {a} and {b}", "how much is {a}*{b}",
            "calculate {a} times {b}", "compute {a} * {b}", "{a} times {b} =",
            "multiply {a} and {b}", "what do you get if you multiply {a} with {b}",
            "what is {a} multiplied by {b}", "{a} boxes with {b} apples each, how many apples",
        )
    ).format(a=a, b=b)  # fmt: skip


def _pair(*wordings: str) -> Wording:
    def word(task: Task, rng: Random) -> str:
        a, b = task.metadata["numbers"]
        return rng.choice(wordings).format(a=a, b=b)

    return word


def _number(*wordings: str) -> Wording:
    return lambda task, rng: rng.choice(wordings).format(n=task.metadata["number"])


def _spell(task: Task, rng: Random) -> str:
    word = task.metadata["word"]
    shown = rng.choice((word, word, f'"{word}"', f"'{word}'"))
    return rng.choice(
        (
            "reverse the word {w}", "spell {w} backwards", "write {w} in reverse",
            "what is {w} backward", "how do you spell {w} backwards", "{w} reversed",
            "turn the word {w} around", "reverse {w}", "what is {w} spelled backwards",
            "write {w} backwards", "the letters of {w} in reverse order", "flip the word {w}",
            "read {w} from right to left", "say {w} backwards",
        )
    ).format(w=shown)  # fmt: skip


def _letters(task: Task, rng: Random) -> str:
    letter, text = task.metadata["target_letter"], " ".join(task.metadata["span"])
    if " " not in text and rng.random() < 0.7:
        return rng.choice(
            (
                "how many {l}'s are in {t}", "how many {l} in {t}", "count the {l}s in {t}",
                "how many {l}s are there in the word {t}", "how often is {l} in {t}",
                "how many times does {l} appear in {t}", "how many letters {l} does {t} have",
                "number of {l} in the word {t}", "how many {l}'s in the word \"{t}\"",
            )
        ).format(l=letter, t=text)  # fmt: skip
    return rng.choice(
        (
            'how many {l}\'s are in "{t}"', "count the letter {l} in: {t}",
            'how often does the letter {l} occur in "{t}"', 'count the {l}s in "{t}"',
            'how many times is {l} in "{t}"', "how many {l}'s does this have: {t}",
            "number of times {l} appears in: {t}", "how many letters {l} are in this text: {t}",
            "how often do you see {l} in: {t}",
        )
    ).format(l=letter, t=text)  # fmt: skip


def _words(task: Task, rng: Random) -> str:
    words = rng.choice((", ", ", ", " ")).join(task.metadata["words"])
    return rng.choice(
        (
            "reverse this list: {w}", "put these words in the opposite order: {w}",
            "reverse the order of these words: {w}", "list these backwards: {w}",
            "write these words in reverse order: {w}", "turn this list around: {w}",
            "reverse the list {w}", "these words from last to first: {w}",
            "say these words in reverse order: {w}",
        )
    ).format(w=words)  # fmt: skip


def _legs(task: Task, rng: Random) -> str:
    animals = []
    for name, count in task.metadata["animals"].items():
        plural = PLURALS.get(name, name + "s") if rng.random() < 0.8 else name + "s"
        animals.append(f"{count} {plural if count > 1 else name}")
    return rng.choice(
        (
            "how many legs do {a} have", "i have {a}. how many legs is that",
            "count the legs: {a}", "what is the total number of legs of {a}",
            "how many legs are there on {a}", "legs of {a}", "a farm has {a}, how many legs in all",
            "there are {a} in my garden. how many legs", "i see {a}. count the legs",
            "{a}: how many legs altogether", "how many legs do {a} have together",
            "if you have {a}, how many legs do they have in total",
        )
    ).format(a=_listed(animals, rng))  # fmt: skip


def _equation(task: Task, rng: Random) -> str:
    equation, variable = task.metadata["equation"], task.metadata["variable"]
    kind = rng.random()
    if kind < 0.3:
        equation = equation.replace("*", "").replace(" ", "")
    elif kind < 0.6:
        equation = equation.replace("*", "")
    elif kind < 0.8:
        equation = equation.replace("*", " * ")
    return rng.choice(
        (
            "solve {e}", "what is {v} if {e}", "find {v}: {e}", "{e}, what is {v}", "{e}",
            "solve the equation {e}", "if {e}, what is {v}", "which {v} satisfies {e}",
            "{e}. find {v}", "solve for {v} in {e}", "what's {v} when {e}", "for which {v} is {e}",
            "can you solve {e} for {v}",
        )
    ).format(e=equation, v=variable)  # fmt: skip


def _polygon(task: Task, rng: Random) -> str:
    sides = task.metadata["n_sides"]
    unit = rng.choice(("", "", " degrees", "°"))
    known = _listed([f"{int(angle)}{unit}" for angle in task.metadata["known_angles"]], rng)
    return rng.choice(
        (
            "a {p} has angles {k}. what is the last angle",
            "the angles of a {p} are {k} and one more. how big is it",
            "what is the missing angle of a {p} with {k}",
            "in a {p} the known angles are {k}, find the remaining one",
            "a polygon with {n} sides has the angles {k}. what is the other angle",
            "find the missing angle: {p}, {k}",
            "the first angles of a {p} are {k}. what is the last",
            "a {p} with angles {k}: what is the other angle",
            "if a {p} has angles of {k}, what is the remaining angle",
        )
    ).format(p=POLYGONS[sides], n=sides, k=known)  # fmt: skip


def _complex(task: Task, rng: Random) -> str:
    pair = prompt_text(task).split(": ")[1]
    if rng.random() < 0.7:
        pair = re.sub(r"\.0+(?=\D)", "", pair)
    if rng.random() < 0.4:
        pair = pair.replace(" + ", "+").replace(" - ", "-")
    return rng.choice(
        (
            "what is {e}", "calculate {e}", "compute {e}", "{e}", "{e} =", "how much is {e}",
            "work out {e}", "evaluate {e} with complex numbers", "complex numbers: {e}",
        )
    ).format(e=pair)  # fmt: skip


def _siblings(task: Task, rng: Random) -> str:
    """Only for the siblings' question; the others keep the package's own words."""
    if task.metadata["task_type"] != "siblings":
        return prompt_text(task)
    text = prompt_text(task)
    name, sisters = text.split()[0], int(task.answer) - 1
    brothers = next(n for n, kind in re.findall(r"(\d+) (brother|sister)", text) if kind[0] == "b")
    return rng.choice(
        (
            "{a} has {b} brothers and {s} sisters. how many sisters does her brother have",
            "{a} has {b} brothers and {s} sisters. how many sisters do her brothers have",
            "a girl has {s} sisters and {b} brothers. how many sisters does each brother have",
            "{a} is a girl with {s} sisters and {b} brothers. how many sisters does her brother "
            "have",
            "if {a} has {s} sisters and {b} brothers, how many sisters does {a}'s brother have",
            "{a} has {s} sisters and she also has {b} brothers. her brother has how many sisters",
        )
    ).format(a=name, b=brothers, s=sisters)  # fmt: skip


def _syllogism(task: Task, rng: Random) -> str:
    first, second, last = (task.metadata[k] for k in ("premise1", "premise2", "conclusion"))
    return rng.choice(
        (
            "if {p} and {q}, does it follow that {c}",
            "{p}. {q}. is it true that {c}",
            "{p}. {q}. so {c}. is that right",
            "suppose {p} and {q}. can we say that {c}",
            "{p} and {q}. does that mean {c}",
            "given that {p} and that {q}, is it certain that {c}",
            "{p}; {q}; therefore {c}. valid",
        )
    ).format(p=_lower(first), q=_lower(second), c=_lower(last))  # fmt: skip


def _kinship(task: Task, rng: Random) -> str:
    story, who, whom = read_kinship(task)
    return rng.choice(
        (
            "{s} what is {a} to {b}", "{s} who is {a} to {b}", "{s} how is {a} related to {b}",
            "{s} so {a} is {b}'s what", "{s} what is the relation of {a} to {b}",
            "{s} {a} is the what of {b}", "how is {a} related to {b}? {s}",
        )
    ).format(s=story, a=who, b=whom)  # fmt: skip


def _chain(task: Task, rng: Random) -> str:
    start, *operations = prompt_text(task).split()
    return rng.choice(
        (
            "start with {v} and do {o}, last digit only", "last digit of each step: {v} {o}",
            "{v} {o} modulo 10", "begin at {v}, then {o}. keep only the last digit",
            "from {v} go {o} (mod 10)", "chain: {v} {o}",
        )
    ).format(v=start, o=" ".join(operations))  # fmt: skip


def _hop(task: Task, rng: Random) -> str:
    start, hops, _, *pairs = prompt_text(task).split()
    return rng.choice(
        (
            "start at {a} and follow {n} hops: {p}", "where do {n} hops from {a} lead: {p}",
            "{n} hops from {a}: {p}", "follow the arrows {n} hops from {a}: {p}",
            "begin at {a}, {n} hops: {p}", "i am at {a} and make {n} hops: {p}",
        )
    ).format(a=start, n=hops, p=" ".join(pairs))  # fmt: skip


WORDINGS: dict[str, Wording] = {
    "chain": _chain,
    "hop": _hop,
    "count_bits": _number(
        "how many ones are in {n} in binary", "number of 1s in the binary form of {n}",
        "popcount of {n}", "count the set bits of {n}", "how many one bits does {n} have",
        "in base 2, how many ones does {n} have", "hamming weight of {n}",
        "how many 1s has {n} in binary", "how many bits are set in {n}",
        "count the 1 bits in {n}", "write {n} in binary. how many ones",
    ),
    "spell_backward": _spell,
    "letter_counting": _letters,
    "word_sequence_reversal": _words,
    "chain_sum": _sum,
    "products": _product,
    "gcd": _pair(
        "what is the gcd of {a} and {b}", "gcd({a}, {b})", "greatest common divisor of {a} and {b}",
        "find the largest number that divides both {a} and {b}", "gcd of {a} and {b}",
        "what's the highest common factor of {a} and {b}", "hcf of {a} and {b}",
        "what is the biggest common divisor of {a} and {b}", "find the gcd of {a}, {b}",
        "greatest common factor of {a} and {b}", "compute gcd {a} {b}",
    ),
    "lcm": _pair(
        "what is the lcm of {a} and {b}", "lcm({a}, {b})", "least common multiple of {a} and {b}",
        "find the smallest number that both {a} and {b} divide", "lcm of {a} and {b}",
        "what's the lowest common multiple of {a} and {b}", "find the lcm of {a}, {b}",
        "smallest common multiple of {a} and {b}", "compute lcm {a} {b}",
    ),
    "prime_factorization": _number(
        "factor {n}", "factorise {n}", "factorize {n} into primes", "prime factors of {n}",
        "what are the prime factors of {n}", "write {n} as a product of primes",
        "decompose {n} into prime factors", "find the prime factors of {n}",
        "prime factorization of {n}", "what is the prime factorization of {n}",
        "break {n} down into primes", "split {n} into prime factors",
    ),
    "leg_counting": _legs,
    "simple_equations": _equation,
    "simple_geometry": _polygon,
    "complex_arithmetic": _complex,
    "aiw": _siblings,
    "syllogism": _syllogism,
    "family_relationships": _kinship,
}  # fmt: skip
"""Per family a person's way of asking for what a task asks."""


def reword(task: Task, rng: Random) -> Task:
    """The task with its question in other words; answer and grading stay.

    Raises ValueError for a family without other words.
    """
    if task.family not in WORDINGS:
        raise ValueError(f"no other words for {task.family!r}; there are {', '.join(WORDINGS)}")
    text = WORDINGS[task.family](task, rng)
    suffix = rng.choice(SUFFIXES)
    text = rng.choice(PREFIXES) + text + ("" if task.family in OPEN_ENDED else suffix)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return replace(task, prompt=(Message(role="user", content=text),))


def _lower(statement: str) -> str:
    return statement[0].lower() + statement[1:]


class RewordedTaskset:
    """A family whose questions all come in other words; `gcd:words` in the catalog."""

    def __init__(self, taskset: SingleTurnTaskset) -> None:
        self.taskset = taskset
        self.name = f"{taskset.name}:words"

    def train(self, seed: int) -> Iterator[Task]:
        for number, task in enumerate(self.taskset.train(seed)):
            yield reword(task, Random(stable_hash(f"{self.name}/train/{seed}/{number}")))

    def test(self, seed: int, num_samples: int) -> list[Task]:
        """The family's own held-out tasks, each in other words."""
        return [
            reword(task, Random(stable_hash(f"{self.name}/test/{seed}/{number}")))
            for number, task in enumerate(self.taskset.test(seed, num_samples))
        ]

    def solution(self, task: Task, rng: Random) -> Message:
        """Raises ValueError: a thought follows from the family's words, which are gone."""
        raise ValueError(f"{self.name} has no worked thoughts; {self.taskset.name} has")

    def make_env(self, task: Task) -> QuestionEnv:
        return QuestionEnv(self.taskset, task)

    def validate(self, task: Task) -> None:
        self.taskset.validate(task)
