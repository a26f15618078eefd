"""The RL loop on one page: tasks -> rollouts -> signal -> updates -> weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Protocol

from openm1.chat.template import ChatFormat
from openm1.common.track import Display, JsonlTracker
from openm1.envs.mixture import Mixture
from openm1.model.m1 import M1ForCausalLM
from openm1.protocols import Policy, WeightSink
from openm1.rl.batch import Sample, group_samples, has_signal, signal_metrics
from openm1.rl.collect import collect
from openm1.rl.config import RLConfig
from openm1.rl.critic import CriticTrainer
from openm1.rl.monitor import rollout_metrics, staleness_metrics
from openm1.rl.queue import Entry, RolloutQueue, group_player
from openm1.rl.record import write_rollouts
from openm1.rl.stages import WindowState, advance, late_grad_norm, late_loss, window_tokens
from openm1.rl.tasks import TaskStream
from openm1.rl.update import UpdatePlan, measure_agreement, update_policy
from openm1.train.checkpoint import RunFolder
from openm1.train.optim import make_optimizer
from openm1.train.supervised import resume
from openm1.types import RolloutGroup

SHOWN = ("rollout/reward", "rollout/length_mean_tokens", "rl/entropy_nats", "rl/probability_corr")
StepHook = Callable[[int, Mapping[str, float]], None]


class Stateful(Protocol):
    """Something beside the model whose state belongs in a checkpoint: a monitor, a judge."""

    def state(self) -> Any:
        """Plain values and lists and dicts of them."""
        ...

    def load_state(self, state: Any) -> None: ...


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
    stateful: Mapping[str, Stateful] | None = None,
) -> Path:
    """Trains `model` in place, resuming where the folder stands; returns the last checkpoint.

    Prompts, samples, shuffles and the window depend on (seed, step) and on what a checkpoint holds
    alone, so a run killed at any moment and resumed gives the curve of one that was not; with
    `in_flight` other than "wait" it loses nothing, but who is done first is up to the machine.
    `on_step` is called before a step is saved. With a staleness above 0, `weights` must not share
    the model's storage: rollouts go on while it is trained.
    """
    run = _Run(model, chat_format, mixture, policy, weights, config, stateful or {})
    saved = folder.latest()
    first_step = 0 if saved is None else run.restore(saved)
    with folder.writing():
        tracker = JsonlTracker(folder.metrics, first_step=first_step)
    with Display(title, config.num_steps, SHOWN, first_step=first_step) as display:
        try:
            for step in range(first_step, config.num_steps):
                metrics, groups = await run.step(step)
                with folder.writing():
                    write_rollouts(folder.path, step, groups, chat_format.tokenizer)
                    tracker.log(step, metrics)
                display.log(step, metrics)
                if on_step is not None:
                    on_step(step, metrics)
                done = step + 1
                if done % config.save_every_steps == 0 or done == config.num_steps:
                    saved = folder.save(done, model, chat_format.tokenizer, run.state(done))
        finally:
            await run.queue.close()
    weights.load_weights(model.named_parameters(), version=config.num_steps)
    assert saved is not None
    return saved


class _Run:
    """What moves from step to step."""

    def __init__(
        self,
        model: M1ForCausalLM,
        chat_format: ChatFormat,
        mixture: Mixture,
        policy: Policy,
        weights: WeightSink,
        config: RLConfig,
        stateful: Mapping[str, Stateful],
    ) -> None:
        self.model, self.config, self.weights = model, config, weights
        self.optimizer = make_optimizer(model.parameters(), config.optimizer)
        self.window = WindowState()
        self.vocab_size = chat_format.tokenizer.vocab_size
        self.tasks = tasks = TaskStream(mixture)
        self.critic = None if config.critic is None else CriticTrainer(model, config.critic)
        self.kept: dict[str, Stateful] = {"tasks": tasks, **stateful}
        if self.critic is not None:
            self.kept["critic"] = self.critic
        self.queue = RolloutQueue(tasks, group_player(policy, chat_format, config), config)
        self._waiting: list[dict[str, Any]] = []

    def state(self, done: int) -> dict[str, Any]:
        """Beside the model's weights, all of a run that has done so many steps."""
        return {
            "step": done,
            "window": self.window.to_dict(),
            "queue": self.queue.state(),
            "kept": {name: part.state() for name, part in self.kept.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, checkpoint: Path) -> int:
        """Returns the step to go on with."""
        state = resume(self.model, self.optimizer, checkpoint)
        self.window = WindowState.from_dict(state["window"])
        for name, part in self.kept.items():
            part.load_state(state["kept"][name])
        self._waiting = state["queue"]
        return state["step"]

    async def step(self, step: int) -> tuple[dict[str, float], list[RolloutGroup]]:
        config = self.config
        began = time.perf_counter()
        self.weights.load_weights(self.model.named_parameters(), version=step)
        self.tasks.begin_step(step)
        # Only now there are weights to play them with.
        self.queue.load_state(self._waiting, version=step)
        self._waiting = []
        tokens = window_tokens(config.growth, self.window, config.max_response_tokens)
        entries = await collect(self.queue, config, step=step, window_tokens=tokens)
        sampled = time.perf_counter()
        groups = [entry.group for entry in entries]
        metrics = rollout_metrics(groups) | signal_metrics(groups, config.batch, tokens)
        metrics |= {"rollout/window_tokens": tokens} | staleness_metrics(groups, step)
        assert metrics["rl/staleness_max"] <= config.max_staleness, "the queue broke its bound"
        metrics |= self.tasks.observe(groups)
        samples = _samples(entries, config, every=not config.dynamic_sampling)
        if samples:
            metrics |= await self._update(step, samples)
        elif unused := _samples(entries, config, every=True):
            plan = _plan(config, step, self.window, self.vocab_size)
            metrics |= measure_agreement(self.model, unused, plan)
        metrics |= _times(sampled - began, time.perf_counter() - sampled, groups, samples)
        if config.in_flight == "wait":
            await self.queue.settle()
        self.window = advance(
            config.growth,
            self.window,
            perplexity=metrics["rollout/perplexity"],
            length_p99_tokens=metrics["rollout/longest_reply_p99_tokens"],
            window_tokens=tokens,
        )
        return metrics, groups

    async def _update(self, step: int, samples: list[Sample]) -> dict[str, float]:
        rng = Random(f"{self.config.seed}/{step}/shuffle")
        plan = _plan(self.config, step, self.window, self.vocab_size)
        work = partial(self._learn, samples, plan, rng)
        self.model.train()
        # Rollouts of the steps after this one go on meanwhile.
        metrics = await asyncio.to_thread(work) if self.config.max_staleness else work()
        self.model.eval()
        return metrics

    def _learn(self, samples: list[Sample], plan: UpdatePlan, rng: Random) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if self.critic is not None:
            samples, metrics = self.critic.learn(samples, self.config.max_tokens)
        return metrics | update_policy(self.model, self.optimizer, samples, plan, rng)


def _samples(entries: list[Entry], config: RLConfig, *, every: bool) -> list[Sample]:
    """Those of groups with a signal, or of every group."""
    taught = [entry for entry in entries if every or has_signal(entry.group, config.batch)]
    return [
        sample
        for number, entry in enumerate(taught)
        for sample in group_samples(entry.group, number, config.batch, entry.window_tokens)
    ]


def _times(
    sample_s: float, train_s: float, groups: list[RolloutGroup], samples: list[Sample]
) -> dict[str, float]:
    """Sampled are replies' tokens; trained are those of whole samples, prompts included. Where
    rollouts run ahead, sampling is the time that was waited for them."""
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
