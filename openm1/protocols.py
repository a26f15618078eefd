"""The verbs that cross folders. Read with `types`, this is the whole interface of the project."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from openm1.types import Completion, Message, SamplingParams, StepResult, Task

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Policy(Protocol):
    """Whatever continues a prompt: the embedded engine, or an HTTP endpoint."""

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        """One completion of `prompt_ids` (params.n must be 1).

        Calls that share a `session` tell the policy that each prompt extends the last one, so that
        it may keep the sequence's cache between them. The result never depends on it.
        """
        ...


class Env(Protocol):
    """One task being played: made, started, stepped until done, closed, discarded."""

    async def start(self) -> list[Message]: ...

    async def step(self, reply: Message) -> StepResult: ...

    async def close(self) -> None: ...


class Taskset(Protocol):
    """A family of tasks that can check itself without a model."""

    name: str

    def train(self, seed: int) -> Iterator[Task]:
        """An endless stream, the same for the same seed, disjoint from `test` by prompt."""
        ...

    def test(self, seed: int, num_samples: int) -> list[Task]:
        """Held-out tasks with prompts no `train` stream contains."""
        ...

    def solution(self, task: Task, rng: Random) -> Message:
        """A worked thought and the right answer, as a model should write them."""
        ...

    def make_env(self, task: Task) -> Env: ...

    def validate(self, task: Task) -> None:
        """Raises ValueError unless gold scores 1, empty 0, garbage 0 and quoting the prompt 0."""
        ...


class GrammarMatcher(Protocol):
    """One answer on its way through a grammar."""

    def consume(self, token_id: int) -> bool:
        """Takes the answer's next token; False, and nothing taken, where the grammar forbids it."""
        ...

    def allowed(self, num_left: int) -> np.ndarray:
        """Bool by token id: what may come next, at least one token, end of sentence included.

        The reply may have `num_left` tokens more; a matcher may see to it that it ends in time.
        """
        ...


class Grammar(Protocol):
    """What an answer must look like, as a language over token ids."""

    def start(self) -> GrammarMatcher:
        """A matcher at the beginning of an answer."""
        ...


class WeightSink(Protocol):
    """Whatever can take new weights between two steps."""

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None: ...


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None: ...
