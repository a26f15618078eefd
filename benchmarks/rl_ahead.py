"""CISPO with rollouts ahead of updates against both in turns, on the same cores."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.contestant import OURS
from openm1.engine.llm import LLM
from openm1.envs.catalog import make_taskset
from openm1.envs.mixture import Mixture
from openm1.model.m1 import M1ForCausalLM
from openm1.recipes import nano
from openm1.rl.local import train_rl_locally
from openm1.train.checkpoint import RunFolder
from openm1.train.schedule import Schedule

if TYPE_CHECKING:
    from benchmarks.registry import Race

NUM_STEPS = 6
"""The first ones fill the queue; what is timed are the last four."""
WARMUP_STEPS = 2
TASKS_SEED = 7


def ahead_race(threads: int) -> Race:
    """nano's recipe with half of the batch. What runs side by side has half of the threads each."""
    from benchmarks.registry import Race

    llm = LLM("nano")
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    config = replace(
        nano.CISPO_RUN.rl,
        num_steps=NUM_STEPS,
        num_prompts=16,
        schedule=Schedule(),
        # The same work in every step.
        dynamic_sampling=False,
        retire_pass_rate=None,
        save_every_steps=10_000,
    )
    threads = threads or torch.get_num_threads()

    def steps_s(max_staleness: int, threads: int) -> float:
        ends: list[float] = []

        def note(step: int, metrics: Mapping[str, float]) -> None:
            ends.append(time.perf_counter())

        model = M1ForCausalLM(llm.model.config)
        model.load_state_dict(llm.model.state_dict())
        mixture = Mixture([make_taskset(name) for name in nano.FAMILIES], seed=TASKS_SEED)
        mine = replace(config, max_staleness=max_staleness)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with tempfile.TemporaryDirectory() as path:
                run = RunFolder.open(path, mine)
                train_rl_locally(model, tokenizer, mixture, mine, run, on_step=note)
        finally:
            torch.set_num_threads(before)
        return ends[-1] - ends[WARMUP_STEPS - 1]

    # Nominal, the same for both: the ratio of rates is then that of seconds.
    rollouts = config.num_prompts * config.group_size * (NUM_STEPS - WARMUP_STEPS)
    return Race(
        num_tokens=rollouts * config.max_response_tokens,
        contestants={
            OURS: partial(steps_s, 1, max(1, threads // 2)),
            "openm1, in turns": partial(steps_s, 0, threads),
        },
        goals={"openm1, in turns": 1.0},
    )
