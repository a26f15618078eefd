"""Worked thoughts on letters, bits and words: copying with marks, and counting by one."""

from __future__ import annotations

from collections.abc import Sequence

COUNT_BITS_BASE = 4

COUNT_WORDS: tuple[str, ...] = tuple(f"({count})" for count in range(32))
"""Running counts and remainders; with the phrases, what a tokenizer should keep whole."""


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


def think_word_sequence_reversal(words: Sequence[str]) -> str:
    """`me, law, and` is `0me 1law 2and`, then `2and 1law 0me` on the next line."""
    numbered = [f"{index}{word}" for index, word in enumerate(words)]
    return " ".join(numbered) + "\n" + " ".join(reversed(numbered))
