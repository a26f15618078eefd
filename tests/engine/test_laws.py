"""Whatever happens beside, before and in between, a request gets the tokens it gets alone."""

from __future__ import annotations

import os
from collections import Counter
from random import Random

import pytest
import torch

from openm1.engine.engine import Engine
from openm1.engine.request import Request
from openm1.model.m1 import M1ForCausalLM
from openm1.types import Completion, SamplingParams

from .tiny import CLOSE, FP64_ERROR, OPEN, complete, engine_for, hybrid_config, poison_unused

NUM_GAMES = int(os.environ.get("OPENM1_LAW_GAMES", "100"))
"""Set it to thousands for a long search."""
NUM_MOVES = 10
LONGEST = 48

Case = tuple[list[int], SamplingParams]


class Broken(BaseException):
    """Comes from anywhere, like Ctrl-C."""


def small_model() -> M1ForCausalLM:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attn_type_list": (0, 1),
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
    }
    return M1ForCausalLM(hybrid_config(**sizes), dtype=torch.float64, seed=1).eval()


def cases() -> list[Case]:
    """Prompts that share beginnings of all lengths, and every kind of request."""
    draw = Random(0)
    base = [draw.randrange(CLOSE + 1, 80) for _ in range(LONGEST)]
    found: list[Case] = []
    kinds: list[dict] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 1.0, "thinking_budget": 2, "thinking_grace": 2},
        {"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    ]
    for number in range(40):
        prompt = base[: draw.randrange(1, LONGEST - 6)]
        prompt += [draw.randrange(CLOSE + 1, 80) for _ in range(draw.choice([0, 0, 1, 5]))]
        kind = kinds[number % len(kinds)]
        if "thinking_budget" in kind:
            prompt.append(OPEN)
        max_tokens, priority = draw.randrange(1, 11), draw.choice([0, 0, 1])
        params = SamplingParams(max_tokens=max_tokens, seed=number, priority=priority, **kind)
        found.append((prompt, params))
    return found


@pytest.fixture(scope="module")
def world() -> tuple[M1ForCausalLM, list[Case], list[Completion]]:
    model, pool = small_model(), cases()
    expected = [complete(engine_for(model), [prompt], [params])[0] for prompt, params in pool]
    return model, pool, expected


class Game:
    """One engine with tight and odd limits, and random moves against it."""

    def __init__(self, model: M1ForCausalLM, pool: list[Case], seed: int) -> None:
        self.draw = draw = Random(seed)
        self.model, self.pool = model, pool
        page_tokens = draw.choice([1, 4, 8])
        self.engine: Engine = engine_for(
            model,
            page_tokens=page_tokens,
            max_num_seqs=draw.choice([1, 4, 8]),
            max_step_tokens=draw.choice([1, 4, 16, 64]),
            # The longest takes 128 bytes for each of 57 tokens, and 1,024 for its state.
            memory_budget_bytes=int(8_500 * draw.uniform(1, 2)),
        )
        self.requests: list[tuple[int, Request]] = []
        self.seen: Counter[str] = Counter()

    def play(self) -> None:
        moves = (self.submit, self.submit_group, self.step, self.abort, self.reload, self.fail)
        for _ in range(3):
            self.submit()
        for _ in range(NUM_MOVES):
            (move,) = self.draw.choices(moves, weights=(5, 1, 12, 2, 0.5, 0.7))
            move()
            self.check()
        while self.engine.has_work:
            self.step()
            self.check()

    def check(self) -> None:
        self.engine.check_integrity()
        memory = self.engine.memory
        assert memory.in_use_bytes <= memory.budget_bytes
        if self.requests:
            poison_unused(self.engine)

    def submit(self) -> None:
        case = self.draw.randrange(len(self.pool))
        prompt, params = self.pool[case]
        marks = (self.draw.randrange(1, 50),) if self.draw.random() < 0.3 else ()
        self.requests.append((case, self.engine.submit(prompt, params, snapshot_at=marks)))

    def submit_group(self) -> None:
        case = self.draw.randrange(len(self.pool))
        for _ in range(self.draw.randrange(2, 5)):
            self.requests.append((case, self.engine.submit(*self.pool[case])))

    def step(self) -> None:
        running = [r for _, r in self.requests if r.sequence is not None]
        self.engine.step()
        self.seen["preempted"] += sum(
            r.sequence is None and r.finish_reason is None for r in running
        )

    def abort(self) -> None:
        if self.requests:
            self.engine.abort(self.draw.choice(self.requests)[1])

    def reload(self) -> None:
        """The same weights again, so that all replies must stay as they are."""
        in_flight = self.draw.choice(["recompute", "keep"])
        copies = [(name, p.detach().clone()) for name, p in self.model.named_parameters()]
        version = self.engine.policy_version + 1
        self.engine.load_weights(copies, version=version, in_flight=in_flight)
        self.seen[in_flight] += self.engine.has_work

    def fail(self) -> None:
        """An error somewhere in a layer, or after the books' orders were carried out."""
        if not self.engine.has_work:
            return

        def broken(*_: object) -> None:
            raise Broken

        layer = self.draw.randrange(-1, len(self.model.model.layers))
        try:
            if layer < 0:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(self.engine._runner.pools, "release", broken)
                    self.engine.step()
            else:
                with self.model.model.layers[layer].register_forward_pre_hook(broken):
                    self.engine.step()
        except Broken:
            self.seen["broken"] += 1


@pytest.mark.slow
def test_random_games_give_what_each_request_gives_alone(world) -> None:
    model, pool, expected = world
    seen: Counter[str] = Counter()
    for seed in range(NUM_GAMES):
        game = Game(model, pool, seed)
        game.play()
        for case, request in game.requests:
            reply, alone = game.engine.completion(request), expected[case]
            seen[reply.finish_reason] += 1
            seen["cached"] += reply.cached_tokens > 0
            length = len(reply.token_ids)
            assert reply.token_ids == alone.token_ids[:length], f"game {seed}"
            assert reply.logprobs == pytest.approx(alone.logprobs[:length], abs=FP64_ERROR)
            if reply.finish_reason != "abort":
                assert (length, reply.finish_reason, reply.thought_end) == (
                    len(alone.token_ids),
                    alone.finish_reason,
                    alone.thought_end,
                )
        seen += game.seen
        # Nothing is left but prefixes, and then nothing at all.
        memory = game.engine.memory
        assert memory.in_use_bytes == memory.cached_bytes
        game.engine.load_weights([], version=0)
        assert game.engine.memory.in_use_bytes == 0
        game.engine.check_integrity()
    # The games are about something.
    for what in ("length", "abort", "cached", "preempted", "broken", "recompute", "keep"):
        assert seen[what] >= NUM_GAMES // 20, seen
