"""Judges whose verdicts are a function, as policies; and answers to have them judge."""

from __future__ import annotations

import re
from collections.abc import Callable

from openm1.chat.template import ChatFormat, chat_format_for
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.types import Completion, SamplingParams

GRADED = re.compile(
    r"Question:\n(?P<question>.*)\n\n(?:Reference:\n(?P<reference>.*)\n\nAnswer:\n(?P<answer>.*)"
    r"|Answer:\n(?P<answer2>.*)\n\nReference:\n(?P<reference2>.*))\n\nGive your reasons",
    re.DOTALL,
)
COMPARED = re.compile(
    r"FIRST reply:\n(?P<first>.*)\n\nSECOND reply:\n(?P<second>.*)\n\nGive your reasons", re.DOTALL
)


class WrittenJudge:
    """Replies with what `verdict` makes of the prompt's text."""

    def __init__(self, verdict: Callable[[str], str]) -> None:
        self.verdict = verdict
        self.asked: list[str] = []
        self.tokenizer = nano_tokenizer()

    @property
    def chat_format(self) -> ChatFormat:
        return chat_format_for(self.tokenizer)

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        text = self.tokenizer.decode(prompt_ids)
        self.asked.append(text)
        ids = tuple(self.tokenizer.encode(self.verdict(text)))
        return Completion(token_ids=ids, logprobs=(0.0,) * len(ids))


def graded(text: str) -> tuple[str, str, bool]:
    """Reference, answer, and whether the reference stands first."""
    found = GRADED.search(text)
    assert found is not None, text
    if found["reference"] is not None:
        return found["reference"], found["answer"], True
    return found["reference2"], found["answer2"], False


def compared(text: str) -> tuple[str, str]:
    found = COMPARED.search(text)
    assert found is not None, text
    return found["first"], found["second"]
