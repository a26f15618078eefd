"""The RL loop on one page: tasks -> rollouts -> signal -> updates -> weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from openm1.chat.template import ChatFormat
from openm1.common.track import Display, JsonlTracker
from openm1.envs.mixture import Mixture
from openm1.model.m1 import M1ForCausalLM
from openm1.protocols import Policy, WeightSink
from openm1.rl.batch import Sample, group_samples, has_signal, signal_metrics
from openm1.rl.collect import TaskStream, collect
from openm1.rl.config import RLConfig
from openm1.rl.monitor import rollout_metrics
from openm1.rl.record import write_rollouts
from openm1.rl.stages import WindowState, advance, late_grad_norm, late_loss, window_tokens
from openm1.rl.update import UpdatePlan, update_policy
from openm1.train.checkpoint import RunFolder
from openm1.train.optim import make_optimizer
from openm1.train.supervised import resume
from openm1.types import RolloutGroup

SHOWN = ("rollout/reward", "rollout/length_mean_tokens", "rl/entropy_nats", "rl/probability_corr")
StepHook = Callable[[int, Mapping[str, float]], None]


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

    Prompts, samples, shuffles and the window depend on (seed, step) and on what a checkpoint holds
    alone, so a run killed at any moment and resumed gives the curve of one that was not.
    """
    optimizer = make_optimizer(model.parameters(), config.optimizer)
    tasks, window, first_step = TaskStream(mixture), WindowState(), 0
    saved = folder.latest()
    if saved is not None:
        state = resume(model, optimizer, saved)
        first_step, window = state["step"], WindowState.from_dict(state["window"])
        tasks.load_state(state["tasks"])
    tracker = JsonlTracker(folder.metrics, first_step=first_step)
    with Display(title, config.num_steps, SHOWN, first_step=first_step) as display:
        for step in range(first_step, config.num_steps):
            began = time.perf_counter()
            weights.load_weights(model.named_parameters(), version=step)
            tokens = window_tokens(config.growth, window, config.max_response_tokens)
            groups = await collect(
                policy, chat_format, tasks, config, step=step, window_tokens=tokens
            )
            sampled = time.perf_counter()
            metrics = rollout_metrics(groups) | signal_metrics(groups, config.batch, tokens)
            metrics["rollout/window_tokens"] = tokens
            if samples := _samples(groups, config, tokens):
                rng = Random(f"{config.seed}/{step}/shuffle")
                model.train()
                plan = _plan(config, step, window, chat_format.tokenizer.vocab_size)
                metrics |= update_policy(model, optimizer, samples, plan, rng)
                model.eval()
            metrics |= _times(sampled - began, time.perf_counter() - sampled, groups, samples)
            window = advance(
                config.growth,
                window,
                perplexity=metrics["rollout/perplexity"],
                length_p99_tokens=metrics["rollout/longest_reply_p99_tokens"],
                window_tokens=tokens,
            )
            write_rollouts(folder.path, step, groups, chat_format.tokenizer)
            tracker.log(step, metrics)
            display.log(step, metrics)
            if on_step is not None:
                on_step(step, metrics)
            done = step + 1
            if done % config.save_every_steps == 0 or done == config.num_steps:
                state = {"step": done, "tasks": tasks.state(), "window": window.to_dict()}
                trainer = {**state, "optimizer": optimizer.state_dict()}
                saved = folder.save(done, model, chat_format.tokenizer, trainer)
    weights.load_weights(model.named_parameters(), version=config.num_steps)
    assert saved is not None
    return saved


def _samples(groups: list[RolloutGroup], config: RLConfig, window_tokens: int) -> list[Sample]:
    """What a step learns from."""
    taught = [g for g in groups if has_signal(g, config.batch) or not config.dynamic_sampling]
    return [
        sample
        for number, group in enumerate(taught)
        for sample in group_samples(group, number, config.batch, window_tokens)
    ]


def _times(
    sample_s: float, train_s: float, groups: list[RolloutGroup], samples: list[Sample]
) -> dict[str, float]:
    """Sampled are replies' tokens; trained are those of whole samples, prompts included."""
    sampled = sum(r.num_completion_tokens for group in groups for r in group.rollouts)
    trained = sum(len(sample.token_ids) for sample in samples)
    return {
        "time/sample_s": sample_s,
        "time/train_s": train_s,
        "time/sampled_tokens_per_s": sampled / sample_s,
        "time/trained_tokens_per_s": trained / train_s,
    }


def _plan(config: RLConfig, step: int, window: WindowState, vocab_size: int) -> UpdatePlan:
    ratio = config.schedule.ratio(step, config.num_steps)
    return UpdatePlan(
        loss=late_loss(config.growth, window, config.loss),
        num_updates=config.num_updates,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        learning_rate=config.optimizer.learning_rate * ratio,
        max_grad_norm=late_grad_norm(config.growth, window, config.optimizer.max_grad_norm),
        anchor=config.anchor,
        vocab_size=vocab_size,
    )
