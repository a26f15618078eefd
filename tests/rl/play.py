"""A taskset whose one lesson a tiny model can learn in seconds, and policies without a model."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from openm1.chat.template import ChatFormat, chat_format_for
from openm1.chat.tokenizer import END_OF_SENTENCE
from openm1.envs.base import SingleTurnTaskset
from openm1.recipes.runs import ModelShape
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.types import Completion, Message, SamplingParams, Task

TINY = ModelShape(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=32,
    softmax_period=4,
    num_local_experts=2,
)


class OneDigit(SingleTurnTaskset):
    """Whatever the question, the answer is 7."""

    name = "one_digit"

    def draw(self, rng: Random) -> Task:
        question = f"{rng.randrange(10)} +{rng.randrange(10)} -{rng.randrange(10)}"
        return Task(family=self.name, prompt=(Message(role="user", content=question),), answer="7")

    def think(self, task: Task) -> str:
        return ""


class WrittenPolicy:
    """Replies with what `reply` makes of the question and the seed."""

    def __init__(self, reply: Callable[[str, int], str]) -> None:
        self.reply = reply
        self.tokenizer = nano_tokenizer()
        self.asked: list[tuple[str, SamplingParams]] = []
        self.version = -1

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        question = self.tokenizer.decode(prompt_ids).split("user name=user\n")[1]
        question = question.split(END_OF_SENTENCE)[0]
        self.asked.append((question, params))
        assert params.seed is not None
        ids = self.tokenizer.encode(self.reply(question, params.seed))
        ids.append(self.tokenizer.special_tokens[END_OF_SENTENCE])
        return Completion(
            token_ids=tuple(ids),
            logprobs=(-0.5,) * len(ids),
            forced=(False,) * len(ids),
            policy_versions=(self.version,) * len(ids),
        )

    def load_weights(self, tensors: object, *, version: int) -> None:
        self.version = version


def nano_format() -> ChatFormat:
    return chat_format_for(nano_tokenizer())
