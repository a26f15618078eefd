"""A step of CISPO against TRL's: the same weights, prompts, batch and number of updates."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.contestant import OURS
from benchmarks.trl_peer import MARK
from openm1.chat.template import chat_format_for
from openm1.engine.llm import LLM
from openm1.envs.catalog import make_taskset
from openm1.envs.mixture import Mixture
from openm1.model.m1 import M1ForCausalLM
from openm1.recipes import nano
from openm1.rl.config import RLConfig
from openm1.rl.local import train_rl_locally
from openm1.rl.losses import CISPO
from openm1.train.checkpoint import RunFolder
from openm1.train.schedule import Schedule

if TYPE_CHECKING:
    from benchmarks.registry import Race

TRL_PYTHON = "OPENM1_TRL_PYTHON"
"""Environment variable: the interpreter of an environment that TRL is installed in."""
TASKS_SEED = 7
MOST_STEPS = 100
"""Turns that there are prompts for."""
CHAIN = RLConfig(num_prompts=16, group_size=16, num_updates=16, max_response_tokens=32)
"""Short replies: a dozen tokens."""
NANO = nano.CISPO_RUN.rl
"""The recipe that nano was made by."""


class TrlPeer:
    """The process of `trl_peer`."""

    def __init__(self, python: str) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("trl_peer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self._log.seek(0)
        raise RuntimeError(f"TRL ended with {self._process.wait()}:\n{self._log.read()[-4000:]}")

    def close(self) -> None:
        self._process.communicate()
        self._log.close()


def save_for_transformers(model: M1ForCausalLM, folder: str) -> list[float]:
    """Writes what transformers computes the same function from; returns its rotary frequencies.

    transformers rotates whole heads, i with i + D/2, where a model may rotate only the first R
    dimensions, i with i + R/2. So each head's q and k are put in another order, and frequencies
    of 0 leave the rest as they are.
    """
    config = model.config
    rotated, size = config.rotary_dim, config.head_dim
    still = (size - rotated) // 2
    pairs, rest = torch.arange(size).split([rotated, 2 * still])
    order = torch.cat([pairs[: rotated // 2], rest[:still], pairs[rotated // 2 :], rest[still:]])
    weights = dict(model.state_dict())
    for name, weight in weights.items():
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            weights[name] = weight.unflatten(0, (-1, size))[:, order].flatten(0, 1)
    whole = M1ForCausalLM(replace(config, rotary_dim=size))
    whole.load_state_dict(weights)
    whole.save_pretrained(folder, layout="transformers")
    exponents = torch.arange(0, rotated, 2, dtype=torch.float64) / rotated
    return [*(config.rope_theta**-exponents).tolist(), *[0.0] * still]


def cispo_race(python: str, families: tuple[str, ...], recipe: RLConfig, threads: int) -> Race:
    from benchmarks.registry import Race

    config = replace(
        recipe,
        num_steps=2,
        loss=CISPO(eps_is_high=4.0),
        schedule=Schedule(),
        # The same work in every step.
        dynamic_sampling=False,
        retire_pass_rate=None,
        save_every_steps=10_000,
    )
    mixture = Mixture([make_taskset(name) for name in families], seed=TASKS_SEED)

    llm = LLM("nano")
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    folder = tempfile.TemporaryDirectory()
    frequencies = save_for_transformers(llm.model, folder.name)
    tokenizer.save_pretrained(folder.name)
    peer = TrlPeer(python)
    job: dict[str, Any] = {"model": folder.name, "frequencies": frequencies}
    job["threads"] = threads or torch.get_num_threads()
    job |= _trl_settings(llm, mixture, config)
    peer.ask({"train": job})
    tokens: dict[str, list[float]] = {OURS: [], "TRL": []}
    rewards: dict[str, list[float]] = {OURS: [], "TRL": []}
    cpu_s: dict[str, list[float]] = {OURS: [], "TRL": []}

    def ours() -> float:
        """The second step of a run; the first makes room in memory."""
        ends: list[float] = []
        cpu_ends: list[float] = []

        def note(step: int, metrics: Mapping[str, float]) -> None:
            ends.append(time.perf_counter())
            cpu_ends.append(time.process_time())
            if step:
                tokens[OURS].append(metrics["rollout/length_mean_tokens"])
                rewards[OURS].append(metrics["rollout/reward"])

        model = M1ForCausalLM(llm.model.config)
        model.load_state_dict(llm.model.state_dict())
        with tempfile.TemporaryDirectory() as path:
            run = RunFolder.open(path, config)
            train_rl_locally(model, tokenizer, mixture, config, run, on_step=note)
        cpu_s[OURS].append(cpu_ends[1] - cpu_ends[0])
        return ends[1] - ends[0]

    def theirs() -> float:
        done = peer.ask({"step": 1})
        tokens["TRL"].append(done["tokens"] / (config.num_prompts * config.group_size))
        rewards["TRL"].append(done["reward"])
        cpu_s["TRL"].append(done["cpu_s"])
        return done["seconds"]

    def close() -> None:
        peer.close()
        folder.cleanup()
        # Processor time hardly depends on what else runs on the machine.
        for name, spent in cpu_s.items():
            print(
                f"{name}: {statistics.median(spent):.2f} CPU seconds a step; means "
                f"{statistics.mean(tokens[name]):.1f} tokens a reply, "
                f"reward {statistics.mean(rewards[name]):.2f}"
            )

    # Nominal, the same for both: the ratio of rates is then that of seconds.
    num_tokens = config.num_prompts * config.group_size * config.max_response_tokens
    return Race(
        num_tokens=num_tokens,
        contestants={OURS: ours, "TRL GRPOTrainer": theirs},
        goals={"TRL GRPOTrainer": 10.0},
        close=close,
    )


def _trl_settings(llm: LLM, mixture: Mixture, config: RLConfig) -> dict[str, Any]:
    assert llm.tokenizer is not None
    chat_format = chat_format_for(llm.tokenizer)
    # The second of our steps is measured, so all of theirs but the first have its prompts.
    steps = [0, *[1] * MOST_STEPS]
    numbers = [step * config.num_prompts + i for step in steps for i in range(config.num_prompts)]
    tasks = [mixture.task(number)[1] for number in numbers]
    return {
        "prompts": [llm.tokenizer.decode(chat_format.encode(task.prompt)) for task in tasks],
        "answers": [task.answer for task in tasks],
        "num_prompts": config.num_prompts,
        "group_size": config.group_size,
        "num_updates": config.num_updates,
        "max_tokens": config.max_response_tokens,
        "learning_rate": config.optimizer.learning_rate,
        # A cap, where ours is an offset from 1.
        "cap": 5.0,
    }
