"""OpenM1 itself behind the questions that the peers answer."""

from __future__ import annotations

import random
import time

from openm1.engine.config import EngineConfig, SpecialTokens
from openm1.engine.engine import Engine
from openm1.engine.request import Request
from openm1.model.m1 import M1ForCausalLM
from openm1.types import SamplingParams

OURS = "openm1"


class OpenM1:
    """The engine as users get it: what is timed are its steps, scheduling and sampling included."""

    name = OURS

    def __init__(self, model: M1ForCausalLM, **config: object) -> None:
        self.model = model
        self.engine = Engine(
            model,
            SpecialTokens(vocab_size=model.config.vocab_size),
            EngineConfig(**config),  # pyright: ignore[reportArgumentType]
        )
        self._running: dict[tuple[int, int], list[Request]] = {}

    def submit(self, prompt_ids: list[int], max_tokens: int) -> Request:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return self.engine.submit(prompt_ids, params)

    def run(self, *requests: Request) -> None:
        while any(request.finish_reason is None for request in requests):
            self.engine.step()

    def random_ids(self, length: int) -> list[int]:
        return random.choices(range(self.model.config.vocab_size), k=length)

    def prefill_s(self, num_tokens: int) -> float:
        return self.timed_prompts([self.random_ids(num_tokens)])

    def timed_prompts(self, prompts: list[list[int]]) -> float:
        """Seconds until each of these, all asked at once, has its first token."""
        began = time.perf_counter()
        self.run(*[self.submit(prompt, 1) for prompt in prompts])
        return time.perf_counter() - began

    def decode_s(self, batch: int, context: int, num_tokens: int) -> float:
        """Contexts grow from call to call, as the peers' do."""
        key = batch, context
        if key not in self._running:
            self.close()
            requests = [self.submit(self.random_ids(context), 100_000) for _ in range(batch)]
            while not all(request.output_ids for request in requests):
                self.engine.step()
            self._running[key] = requests
        began = time.perf_counter()
        for _ in range(num_tokens):
            self.engine.step()
        return time.perf_counter() - began

    def close(self) -> None:
        for requests in self._running.values():
            for request in requests:
                self.engine.abort(request)
        self._running.clear()
