"""The cases: what is measured, against whom, and the ratio we want to reach.

A `Race` is timed: contestants take turns at the same work with the same weights, dtype and threads.
A `Report` measures something else of ours, once.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks import reports
from benchmarks.cispo_step import CHAIN, NANO, TRL_PYTHON, cispo_race
from benchmarks.contestant import OURS, OpenM1
from benchmarks.peers import (
    VLLM_PYTHON,
    LlamaCppPeer,
    Peer,
    TransformersPeer,
    VllmPeer,
    random_weights,
    shape_315m,
    shape_547m,
    vllm_name,
)
from benchmarks.rl_ahead import ahead_race
from benchmarks.server import NUM_TOKENS, QUESTIONS, contestants
from benchmarks.train import train_race
from openm1.model.config import M1Config, post_norm_config
from openm1.model.int8 import quantize_int8
from openm1.recipes import nano
from openm1.rl.config import RLConfig

Seconds = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Race:
    """`contestants` maps a name to work on `num_tokens` tokens that returns its seconds."""

    num_tokens: int
    contestants: dict[str, Seconds]
    goals: dict[str, float] = field(default_factory=dict)
    """How many times as fast as a contestant we want to be."""
    num_rounds: int = 1
    """Turns are shared out among them."""
    begin_round: Callable[[int], None] = lambda number: None
    """Called with 0, 1, ... before each."""
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Case:
    about: str
    race: Callable[[int], Race] | None = None
    """Given the number of threads."""
    report: Callable[[int], dict[str, Any]] | None = None


def nano_shape() -> M1Config:
    """Hidden 256, 7 lightning layers and 1 softmax, 4 heads of 64, 8 experts, top 2: 11 M.

    transformers rotates whole heads, so rotary_dim is head_dim: both compute the same function.
    """
    return post_norm_config(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=1,
        rotary_dim=64,
        intermediate_size=128,
        num_local_experts=8,
    )


@contextmanager
def closing_on_error(peers: list[Any]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for peer in peers:
            peer.close()
        raise


def against_transformers(
    ask: Callable[[Peer | OpenM1], Seconds],
    num_tokens: int,
    goal: float,
    dtype: torch.dtype,
    threads: int,
) -> Race:
    model = random_weights(nano_shape(), dtype)
    ours, peer = OpenM1(model), TransformersPeer(model)
    return Race(
        num_tokens=num_tokens,
        contestants={OURS: ask(ours), peer.name: ask(peer)},
        goals={peer.name: goal},
        close=lambda: [each.close() for each in (ours, peer)],  # pyright: ignore
    )


def nano_decode(batch: int, context: int, goal: float, dtype: torch.dtype, threads: int) -> Race:
    # So many that the first of a turn, on caches that the others have filled, count little.
    steps = max(32, 64 // batch)

    def ask(one: Peer | OpenM1) -> Seconds:
        return lambda: one.decode_s(batch, context, steps)

    return against_transformers(ask, batch * steps, goal, dtype, threads)


def nano_prefill(num_tokens: int, goal: float, dtype: torch.dtype, threads: int) -> Race:
    if dtype == torch.float32:
        # For both: on CPUs with bf16 products it makes transformers several times as fast.
        torch.set_float32_matmul_precision("medium")

    def ask(one: Peer | OpenM1) -> Seconds:
        return lambda: one.prefill_s(num_tokens)

    return against_transformers(ask, num_tokens, goal, dtype, threads)


def server_race(stream: bool, threads: int) -> Race:
    server, bare = contestants(stream=stream)
    return Race(
        num_tokens=NUM_TOKENS * len(QUESTIONS),
        contestants={OURS: server.replies_s, bare.name: bare.replies_s},
        goals={bare.name: 0.9},
        close=server.close,
    )


def big_contestants(batch: int, context: int, threads: int) -> list[Peer | OpenM1]:
    """OpenM1, llama.cpp in bf16 and Q8_0, and vLLM where there is one."""
    model = random_weights(shape_315m(), torch.bfloat16)
    made: list[Any] = []
    with closing_on_error(made):
        made.append(OpenM1(model))
        room = {"max_batch": batch, "max_context": context + 512, "threads": threads}
        made.append(LlamaCppPeer(model, **room))
        made.append(LlamaCppPeer(model, quantization="q8_0", **room))
        if os.environ.get(VLLM_PYTHON):
            made.append(VllmPeer(model.config, **room))
    return made


def big_race(
    ask: Callable[[Peer | OpenM1], Seconds],
    made: list[Peer | OpenM1],
    num_tokens: int,
    goal: float,
) -> Race:
    return Race(
        num_tokens=num_tokens,
        contestants={one.name: ask(one) for one in made},
        goals={"llama.cpp bfloat16": goal},
        close=lambda: [one.close() for one in made],  # pyright: ignore
    )


def big_decode(batch: int, goal: float, threads: int) -> Race:
    steps = 16

    def ask(one: Peer | OpenM1) -> Seconds:
        return lambda: one.decode_s(batch, 256, steps)

    return big_race(ask, big_contestants(batch, 256, threads), batch * steps, goal)


def big_prefill(goal: float, threads: int) -> Race:
    def ask(one: Peer | OpenM1) -> Seconds:
        return lambda: one.prefill_s(2048)

    return big_race(ask, big_contestants(1, 2048, threads), 2048, goal)


VLLM_SHAPES = {"": shape_315m, "-547m": shape_547m}


class OnVllm:
    """The plugin and mixtures of experts of vLLM's own in the same engine, one of the same widths
    and one with as many weights; kept for all cases of a shape.

    Which of three processes was started first is worth a tenth to it, for as long as they run. So
    each is first, second and last in a third of the turns. In CPU time: a machine is seldom quiet.
    """

    current: OnVllm | None = None
    """Whose processes run: of one shape at a time, as a start takes half a minute and gigabytes."""

    def __init__(self, shape: str, threads: int) -> None:
        self.shape = shape
        room = {"max_batch": 32, "max_context": 2560, "threads": threads, "cpu_time": True}
        start = partial(VllmPeer, VLLM_SHAPES[shape](), **room)
        self._makers = {OURS: partial(start, plugin=True)}
        self._makers |= {vllm_name(w): partial(start, wide_attention=w) for w in (False, True)}
        self._order = list(self._makers)
        self.running: dict[str, VllmPeer] = {}

    @classmethod
    def of(cls, shape: str, threads: int) -> OnVllm:
        if cls.current is None or cls.current.shape != shape:
            cls.stop()
            cls.current = cls(shape, threads)
        return cls.current

    @classmethod
    def stop(cls) -> None:
        if cls.current is not None:
            cls.current.close()
        cls.current = None

    @property
    def names(self) -> list[str]:
        return list(self._makers)

    def begin_round(self, number: int) -> None:
        """Starts them anew, the one that was first as the last; but goes on with the last round of
        the case before."""
        if self.running and number == 0:
            return
        self.close()
        self._order = [*self._order[1:], self._order[0]]
        for name in self._order:
            self.running[name] = self._makers[name]()

    def close(self) -> None:
        while self.running:
            self.running.popitem()[1].close()


atexit.register(OnVllm.stop)


def on_vllm(ask: Callable[[VllmPeer], float], num_tokens: int, shape: str, threads: int) -> Race:
    engines = OnVllm.of(shape, threads)

    def ask_one(name: str) -> float:
        return ask(engines.running[name])

    names = engines.names
    return Race(
        num_tokens=num_tokens,
        contestants={name: partial(ask_one, name) for name in names},
        goals={name: 0.95 for name in names if name != OURS},
        num_rounds=len(names),
        begin_round=engines.begin_round,
    )


def vllm_decode(shape: str, context: int, batch: int, threads: int) -> Race:
    # Short turns: what else the machine does then hits all alike. Give it --repeats 24.
    return on_vllm(lambda one: one.decode_s(batch, context, 8), batch * 8, shape, threads)


def vllm_prefill(shape: str, threads: int) -> Race:
    return on_vllm(lambda one: one.prefill_s(2048), 2048, shape, threads)


def _vllm_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for shape in VLLM_SHAPES:
        size = shape.lstrip("-").replace("m", " M") or "315 M"
        for batch, context in ((1, 256), (8, 256), (32, 256), (1, 2000), (8, 2000)):
            suffix = "" if context == 256 else "-2k"
            cases[f"vllm-decode{shape}{suffix}-b{batch}"] = Case(
                about=f"the plugin in vLLM, decode, {size} bf16, context {context}, batch {batch}",
                race=partial(vllm_decode, shape, context, batch),
            )
        cases[f"vllm-prefill{shape}"] = Case(
            about=f"the plugin in vLLM, prefill, {size} bf16, 2048 tokens",
            race=partial(vllm_prefill, shape),
        )
    return cases


def fork(threads: int) -> Race:
    """Prefill of 16 samples of one prompt of 4096 tokens, and of 16 different ones."""
    ours = OpenM1(random_weights(nano_shape(), torch.float32))

    def once(same: bool) -> float:
        prompts = [ours.random_ids(4096) for _ in range(1 if same else 16)]
        return ours.timed_prompts((prompts * 16)[:16])

    return Race(
        num_tokens=16 * 4096,
        contestants={OURS: lambda: once(True), "openm1, 16 cold prompts": lambda: once(False)},
        goals={"openm1, 16 cold prompts": 12.0},
    )


def int8_decode(threads: int) -> Race:
    """One sequence, int8 against bf16 weights of ours and against llama.cpp's Q8_0."""
    full = OpenM1(random_weights(shape_315m(), torch.bfloat16))
    model = random_weights(shape_315m(), torch.bfloat16)
    quantize_int8(model, torch.randint(0, 1000, (1, 16)))
    ours = OpenM1(model)
    room = {"max_batch": 1, "max_context": 768, "threads": threads}
    peer = LlamaCppPeer(full.model, quantization="q8_0", **room)
    contestants = {OURS: ours, "openm1 bf16": full, peer.name: peer}
    return Race(
        num_tokens=16,
        contestants={name: partial(one.decode_s, 1, 256, 16) for name, one in contestants.items()},
        close=lambda: [one.close() for one in contestants.values()],  # pyright: ignore
    )


def _nano_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for context, goals in ((1024, (10, 8, 8)), (16_384, (10, 10, 10))):
            for batch, goal in zip((1, 8, 32), goals, strict=True):
                name = f"decode-nano-{kind}-{context // 1024}k-b{batch}"
                about = f"decode, nano {kind}, context {context}, batch {batch}"
                race = partial(nano_decode, batch, context, goal, dtype)
                cases[name] = Case(about=about, race=race)
        for length, goal in ((4096, 1.3), (16_384, 2.0), (65_536, 3.0)):
            name = f"prefill-nano-{kind}-{length // 1024}k"
            race = partial(nano_prefill, length, goal, dtype)
            cases[name] = Case(about=f"prefill, nano {kind}, {length} tokens", race=race)
    return cases


def _batch_of(config: RLConfig) -> str:
    return f"{config.num_prompts} x {config.group_size} replies, {config.num_updates} updates"


def _trl_cases() -> dict[str, Case]:
    python = os.environ.get(TRL_PYTHON)
    if not python:
        return {}
    return {
        "cispo-step-chain": Case(
            about=f"a step of CISPO, nano fp32: chains, {_batch_of(CHAIN)}",
            race=partial(cispo_race, python, ("chain",), CHAIN),
        ),
        "cispo-step-nano": Case(
            about=f"a step of CISPO, nano fp32: its recipe, {_batch_of(NANO)}",
            race=partial(cispo_race, python, tuple(nano.FAMILIES), NANO),
        ),
    }


CASES: dict[str, Case] = {
    **_nano_cases(),
    **_trl_cases(),
    **{
        f"decode-315m-b{batch}": Case(
            about=f"decode, 315 M bf16, batch {batch}", race=partial(big_decode, batch, goal)
        )
        for batch, goal in ((1, 1.2), (8, 2.0), (32, 4.0))
    },
    "prefill-315m": Case(about="prefill, 315 M bf16, 2048 tokens", race=partial(big_prefill, 6.0)),
    **_vllm_cases(),
    "fork": Case(about="16 samples of one 4096-token prompt against 16 cold", race=fork),
    **{
        f"server-{kind}": Case(
            about=f"32 replies of nano, {kind}, over HTTP against the bare engine",
            race=partial(server_race, kind == "streamed"),
        )
        for kind in ("whole", "streamed")
    },
    "rl-ahead": Case(about="CISPO, rollouts ahead of updates against in turns", race=ahead_race),
    "train": Case(about="forward and backward, nano fp32, 4 x 512", race=train_race),
    "prefix": Case(about="tokens cached of half-shared prompts", report=reports.prefix),
    "long": Case(about="time per token against context", report=reports.long_contexts),
    "memory": Case(about="peak memory of a 256K prefill", report=reports.prefill_memory),
    "million": Case(about="a prompt of 1,000,000 tokens (minutes)", report=reports.million),
    "int8": Case(about="int8 weights on the 315 M shape", race=int8_decode),
}
