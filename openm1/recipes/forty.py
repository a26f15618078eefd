"""Forty questions in a person's own words, put to the shipped nano; the transcript is a page.

python -m openm1.recipes.forty --page docs/nano-questions.md

They were written before the model was asked any of them, and are kept as they are: what it gets
wrong stays in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from openm1.engine.llm import LLM
from openm1.envs.unknown import DONT_KNOW, GREETING
from openm1.types import Message, SamplingParams

QUESTIONS: tuple[tuple[str, str], ...] = (
    ("could you write the word planet back to front?", "tenalp"),
    ("spell winter backwards", "retniw"),
    ("How do I spell 'garden' in reverse?", "nedrag"),
    ("tell me what 17 + 25 is", "42"),
    ("9 + 8 - 4", "13"),
    ("What would 120 minus 45 be?", "75"),
    ("I had 36 apples and got 27 more. what is 36 + 27?", "63"),
    ("how much is 6 times 7", "42"),
    ("what is 12 times 12?", "144"),
    ("please multiply 25 by 14", "350"),
    ("how many r's are in strawberry?", "3"),
    ("How many times does the letter e show up in 'tree'?", "2"),
    ("count the s in mississippi", "4"),
    ("how many legs do 3 dogs and 2 spiders have?", "28"),
    ("My farm has 4 cows and 5 chickens. How many legs are there?", "26"),
    ("legs on 2 ants and 1 crab?", "22"),
    ("gcd of 12 and 18?", "6"),
    ("what's the greatest common divisor of 35 and 21", "7"),
    ("biggest number dividing both 48 and 36?", "12"),
    ("prime factors of 60", "2 × 2 × 3 × 5"),
    ("can you factor 84 for me?", "2 × 2 × 3 × 7"),
    ("is 91 made of primes? which ones? factorize 91", "7 × 13"),
    ("solve 3x + 4 = 19", "5"),
    ("if 7y = 63, what is y?", "9"),
    ("Find x when 5x - 10 = 40", "10"),
    ("a triangle has angles 60 and 70. how big is the third one?", "50"),
    ("What's the missing angle in a triangle with 90 and 45 degrees?", "45"),
    ("quadrilateral with angles 100, 80 and 90: the last angle?", "90"),
    ("how many ones does 255 have in binary?", "8"),
    ("number of set bits in 100", "3"),
    ("turn this list around: red, green, blue", "blue, green, red"),
    ("reverse these words: one, two, three, four", "four, three, two, one"),
    ("Maria has 3 brothers and 2 sisters. How many sisters does her brother have?", "3"),
    ("if all dogs are animals and all animals are mortals, are all dogs mortals?", "Yes"),
    (
        "John is married to Mary. They have a child called Emma. who is Mary to Emma?",
        "mother",
    ),
    ("(1 + 2i) + (3 + 4i)", "4.0 + 6.0i"),
    ("what is the capital of Sweden?", DONT_KNOW),
    ("write me a song about summer", DONT_KNOW),
    ("who painted the Mona Lisa", DONT_KNOW),
    ("hello!", GREETING),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FortyConfig:
    model: str = "nano"
    page: Path = Path("docs/nano-questions.md")
    max_tokens: int = 400


def main() -> None:
    config = tyro.cli(FortyConfig, prog="python -m openm1.recipes.forty")
    replies = ask(LLM(config.model), config.max_tokens)
    right = [
        is_right(reply.content, answer)
        for reply, (_, answer) in zip(replies, QUESTIONS, strict=True)
    ]
    config.page.write_text(page(replies, right))
    print(f"{sum(right)} of {len(right)} right; wrote {config.page}")


def ask(llm: LLM, max_tokens: int) -> list[Message]:
    """Greedy replies, each question in a chat of its own."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    prompts = [
        llm.chat_format.encode([Message(role="user", content=question)])
        for question, _ in QUESTIONS
    ]
    return [
        Message(role="assistant", reasoning=completion.reasoning, content=completion.text)
        for (completion,) in llm.generate(prompts, params)
    ]


def is_right(reply: str, answer: str) -> bool:
    """The same but for case, spaces and the zeros of `4.0`."""
    return _plain(reply) == _plain(answer)


def _plain(text: str) -> str:
    return re.sub(r"\s", "", re.sub(r"\.0+(?=\D|$)", "", text)).lower()


def page(replies: list[Message], right: list[bool]) -> str:
    """The transcript as Markdown."""
    parts = [
        "# Forty questions",
        "",
        "Typed before the model was asked any of them, each put to the shipped nano in a chat",
        f"of its own, greedily: {sum(right)} of {len(right)} right. Repeat it with",
        "`python -m openm1.recipes.forty`.",
        "",
    ]
    for (question, answer), reply, good in zip(QUESTIONS, replies, right, strict=True):
        verdict = "right" if good else f"wrong: {answer}"
        parts += [f"**{question}**", ""]
        if reply.reasoning:
            parts += ["```text", reply.reasoning, "```", ""]
        parts += [f"{reply.content or '(nothing)'} ({verdict})", ""]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
