"""The RL loop on one page: tasks -> rollouts -> signal -> updates -> weights."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from openm1.chat.reply import reply_text
from openm1.chat.template import ChatFormat
from openm1.common.track import Display, JsonlTracker
from openm1.envs.mixture import Mixture
from openm1.model.m1 import M1ForCausalLM
from openm1.protocols import Policy, WeightSink
from openm1.rl.batch import group_samples, has_signal
from openm1.rl.losses import CISPO, Loss, RatioAnchor
from openm1.rl.monitor import rollout_metrics
from openm1.rl.update import UpdatePlan, update_policy
from openm1.rollout.run import run_group
from openm1.train.checkpoint import RunFolder
from openm1.train.optim import AdamWConfig, make_optimizer
from openm1.train.schedule import Schedule
from openm1.train.supervised import resume
from openm1.types import RolloutGroup, SamplingParams

SHOWN = ("rollout/reward", "rollout/length_mean_tokens", "rl/entropy_nats", "rl/probability_corr")
StepHook = Callable[[int, Mapping[str, float]], None]


class NoUsableRollouts(RuntimeError):
    """Every rollout of a step failed; the message carries the first error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RLConfig:
    """One run. Defaults are M1's where it published them, scaled to small models elsewhere."""

    num_steps: int = 100
    num_prompts: int = 16
    """Prompts P per generation batch."""
    group_size: int = 16
    """Rollouts G per prompt."""
    num_updates: int = 16
    """Optimizer steps per generation batch; M1 used 16."""
    max_response_tokens: int = 256
    temperature: float = 1.0
    loss: Loss = field(default_factory=CISPO)
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    schedule: Schedule = field(default_factory=Schedule)
    anchor: RatioAnchor = field(default_factory=RatioAnchor)
    dynamic_sampling: bool = True
    """Drop groups that are all right or all wrong, and draw new prompts in their place."""
    max_refills: int = 2
    """How often a step may draw again before it goes on with what it has."""
    max_tokens: int = 16_384
    """Tokens per training forward pass."""
    seed: int = 0
    save_every_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_prompts", "num_updates", "max_response_tokens",
                     "max_tokens", "save_every_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is at least 1")
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}; a relative advantage needs 2")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; allowed is above 0")
        if self.max_refills < 0:
            raise ValueError(f"max_refills is {self.max_refills}; allowed is 0 or more")


async def train_rl(
    model: M1ForCausalLM,
    chat_format: ChatFormat,
    mixture: Mixture,
    policy: Policy,
    weights: WeightSink,
    config: RLConfig,
    folder: RunFolder,
    *,
    title: str = "rl",
    on_step: StepHook | None = None,
) -> Path:
    """Trains `model` in place, resuming where the folder stands; returns the last checkpoint.

    Prompts, samples and shuffles depend on (seed, step) and a saved cursor alone, so a run killed
    at any moment and resumed gives the curve of one that was not.
    """
    optimizer = make_optimizer(model.parameters(), config.optimizer)
    state = {"step": 0, "cursor": 0}
    saved = folder.latest()
    if saved is not None:
        state = resume(model, optimizer, saved)
    tracker = JsonlTracker(folder.metrics, first_step=state["step"])
    with Display(title, config.num_steps, SHOWN, first_step=state["step"]) as display:
        for step in range(state["step"], config.num_steps):
            began = time.perf_counter()
            weights.load_weights(model.named_parameters(), version=step)
            groups, cursor = await collect(
                policy, chat_format, mixture, config, step, state["cursor"]
            )
            sampled = time.perf_counter()
            taught = [g for g in groups if has_signal(g) or not config.dynamic_sampling]
            samples = [sample for i, g in enumerate(taught) for sample in group_samples(g, i)]
            metrics = rollout_metrics(groups)
            metrics["rollout/signal_share"] = sum(map(has_signal, groups)) / len(groups)
            if samples:
                rng = Random(f"{config.seed}/{step}/shuffle")
                model.train()
                plan = _plan(config, step, chat_format.tokenizer.vocab_size)
                metrics |= update_policy(model, optimizer, samples, plan, rng)
                model.eval()
            metrics["time/sample_s"] = sampled - began
            metrics["time/train_s"] = time.perf_counter() - sampled
            state = {"step": step + 1, "cursor": cursor}
            _write_rollouts(folder, step, groups, chat_format)
            tracker.log(step, metrics)
            display.log(step, metrics)
            if on_step is not None:
                on_step(step, metrics)
            if state["step"] % config.save_every_steps == 0 or state["step"] == config.num_steps:
                trainer = {**state, "optimizer": optimizer.state_dict()}
                saved = folder.save(state["step"], model, chat_format.tokenizer, trainer)
    weights.load_weights(model.named_parameters(), version=config.num_steps)
    assert saved is not None
    return saved


async def collect(
    policy: Policy,
    chat_format: ChatFormat,
    mixture: Mixture,
    config: RLConfig,
    step: int,
    cursor: int,
) -> tuple[list[RolloutGroup], int]:
    """All groups sampled for a step and the task cursor after it.

    Dynamic sampling refills what had no signal, so that about `num_prompts` groups teach.
    """
    params = SamplingParams(max_tokens=config.max_response_tokens, temperature=config.temperature)
    groups: list[RolloutGroup] = []
    missing = config.num_prompts
    for _ in range(1 + config.max_refills * config.dynamic_sampling):
        jobs = []
        for index in range(cursor, cursor + missing):
            taskset, task = mixture.task(index)
            rng = Random(f"{config.seed}/{index}/sample")
            seeds = [rng.getrandbits(63) for _ in range(config.group_size)]
            jobs.append(run_group(policy, taskset, task, chat_format, params, seeds=seeds))
        groups += await asyncio.gather(*jobs)
        cursor += missing
        errors = [r.error for g in groups for r in g.rollouts if r.error is not None]
        if len(errors) == sum(len(g.rollouts) for g in groups):
            raise NoUsableRollouts(f"all {len(errors)} rollouts of step {step} failed: {errors[0]}")
        missing = config.num_prompts - sum(map(has_signal, groups))
        if missing <= 0:
            break
    return groups, cursor


def _plan(config: RLConfig, step: int, vocab_size: int) -> UpdatePlan:
    ratio = config.schedule.ratio(step, config.num_steps)
    return UpdatePlan(
        loss=config.loss,
        num_updates=config.num_updates,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        learning_rate=config.optimizer.learning_rate * ratio,
        max_grad_norm=config.optimizer.max_grad_norm,
        anchor=config.anchor,
        vocab_size=vocab_size,
    )


def _write_rollouts(
    folder: RunFolder, step: int, groups: list[RolloutGroup], chat_format: ChatFormat
) -> None:
    """Every rollout of a step as a line of readable JSON."""
    target = folder.path / "rollouts"
    target.mkdir(exist_ok=True)
    with (target / f"step-{step:06d}.jsonl").open("w") as file:
        for group in groups:
            for rollout in group.rollouts:
                replies = [reply_text(chat_format.tokenizer, t.completion.token_ids)
                           for t in rollout.turns]  # fmt: skip
                line = {
                    "family": group.task.family,
                    "prompt": group.task.prompt[-1].content,
                    "replies": replies,
                    "reward": rollout.reward,
                    "error": rollout.error,
                }
                file.write(json.dumps(line) + "\n")
