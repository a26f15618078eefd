"""Worked thoughts on people and classes of things: who is whose, what follows from what."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping

_MARRIED = re.compile(r"(\w+) is married to (\w+)\.")
_CHILDREN = re.compile(r"They have (?:a child called (\w+)|children called ([^.]+))\.")
_STATEMENT = re.compile(r"(All|No|Some) (\w+) are (not )?(\w+)")


def read_family(story: str) -> dict[str, list[tuple[str, str]]]:
    """For each name its relatives one step away: `<` a parent, `>` a child, `=` husband or wife."""
    steps: dict[str, list[tuple[str, str]]] = {}

    def add(who: str, step: str, whom: str) -> None:
        steps.setdefault(who, []).append((step, whom))

    couple: tuple[str, str] | None = None
    for sentence in re.findall(r"[^.]+\.", story):
        if married := _MARRIED.search(sentence):
            couple = (married[1], married[2])
            add(couple[0], "=", couple[1])
            add(couple[1], "=", couple[0])
        elif (born := _CHILDREN.search(sentence)) and couple:
            for child in re.findall(r"[A-Z]\w*", born[1] or born[2]):
                for parent in couple:
                    add(child, "<", parent)
                    add(parent, ">", child)
    return steps


def think_family_relationships(story: str, who: str, whom: str, gender: str) -> str:
    """The shortest way from `whom` to `who`, and the gender: ` Ethan< Lily< Nova female`."""
    steps = read_family(story)
    ways = {whom: f" {whom}"}
    queue = deque([whom])
    while queue and who not in ways:
        at = queue.popleft()
        for step, name in sorted(steps[at]):
            if name not in ways:
                ways[name] = f"{ways[at]}{step} {name}"
                queue.append(name)
    return f"{ways[who]} {gender}"


FEMALE_RELATIONS = (
    "mother", "sister", "daughter", "wife", "grandmother", "aunt", "niece", "mother-in-law",
)  # fmt: skip
MALE_RELATIONS = (
    "father", "brother", "son", "husband", "grandfather", "uncle", "nephew", "father-in-law",
)  # fmt: skip


def think_syllogism(metadata: Mapping[str, str]) -> str:
    """The statements in letters: `A lawyers B birds C tigers`, then ` Some A not B` and so on."""
    letters: dict[str, str] = {}
    lines = []
    for name in ("premise1", "premise2", "conclusion"):
        quantifier, subject, negation, predicate = _STATEMENT.fullmatch(metadata[name]).groups()  # type: ignore[union-attr]
        for term in (subject, predicate):
            if term not in letters:
                letters[term] = "ABC"[len(letters)]
        not_word = " not" if negation else ""
        lines.append(f"{quantifier} {letters[subject]}{not_word} {letters[predicate]}")
    terms = " ".join(f"{letter} {term}" for term, letter in letters.items())
    return "\n".join([terms, *lines])


def think_aiw(sisters: int) -> str:
    """Sisters, women among friends or among colleagues: she herself comes on top."""
    return f"{sisters}+1={sisters + 1}"
