"""Pretraining and supervised fine-tuning: they differ in their data and in what it masks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from openm1.chat.tokenizer import Tokenizer
from openm1.common.track import Display, JsonlTracker
from openm1.data.packing import Example, pack, split_by_tokens
from openm1.model.m1 import M1ForCausalLM
from openm1.train.checkpoint import RunFolder, load_trainer_state
from openm1.train.loss import score_tokens, supervised_loss
from openm1.train.optim import AdamWConfig, make_optimizer
from openm1.train.parallel import ALONE, Processes
from openm1.train.schedule import Schedule
from openm1.train.step import optimizer_step

Source = Callable[[int], Sequence[Example]]
"""The examples of a step, a function of it alone: a resumed run sees the same data."""

SHOWN = ("train/loss", "train/grad_norm", "train/tokens_per_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedConfig:
    """A run over `num_steps` batches."""

    num_steps: int = 1000
    max_tokens: int = 8192
    """Tokens per forward pass; a larger batch is split into micro-batches of this size."""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    schedule: Schedule = field(default_factory=Schedule)
    save_every_steps: int = 500

    def __post_init__(self) -> None:
        for name in ("num_steps", "max_tokens", "save_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is at least 1")


def train_supervised(
    model: M1ForCausalLM,
    source: Source,
    config: SupervisedConfig,
    folder: RunFolder,
    *,
    tokenizer: Tokenizer | None = None,
    title: str = "train",
) -> Path:
    """Trains to the end, resuming from the folder's newest checkpoint; returns the last checkpoint.

    `model` is changed in place. Under torchrun its processes share every step; the first writes.
    """
    processes = Processes.joined()
    optimizer = make_optimizer(model, config.optimizer)
    first_step = 0
    if (latest := folder.latest()) is not None:
        first_step = resume(model, optimizer, latest)["step"]
    processes.wait()
    model.train()
    with _records(folder, title, config.num_steps, first_step, processes) as record:
        for step in range(first_step, config.num_steps):
            record(step, supervised_step(model, optimizer, source(step), config, step, processes))
            done = step + 1
            due = done % config.save_every_steps == 0 or done == config.num_steps
            if due and processes.is_first:
                state = {"step": done, "optimizer": optimizer.state_dict()}
                folder.save(done, model, tokenizer, state)
    model.eval()
    processes.wait()
    saved = folder.latest()
    assert saved is not None
    return saved


@contextmanager
def _records(
    folder: RunFolder, title: str, num_steps: int, first_step: int, processes: Processes
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """What takes a step's metrics: the first process writes and shows them."""
    if not processes.is_first:
        yield lambda step, metrics: None
        return
    tracker = JsonlTracker(folder.metrics, first_step=first_step)
    with Display(title, num_steps, SHOWN, first_step=first_step) as display:

        def record(step: int, metrics: dict[str, float]) -> None:
            tracker.log(step, metrics)
            display.log(step, metrics)

        yield record


def resume(
    model: M1ForCausalLM, optimizer: torch.optim.Optimizer, checkpoint: Path
) -> dict[str, Any]:
    """Loads weights and optimizer in place; returns what else the trainer saved."""
    saved = M1ForCausalLM.from_pretrained(checkpoint, dtype=model.dtype, device=model.device)
    model.load_state_dict(saved.state_dict())
    state = load_trainer_state(checkpoint)
    optimizer.load_state_dict(state.pop("optimizer"))
    return state


def supervised_step(
    model: M1ForCausalLM,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    config: SupervisedConfig,
    step: int,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Forward and backward over micro-batches, one optimizer step; the loss is a mean per token."""
    began = time.perf_counter()
    mine = split_by_tokens(processes.share(examples), config.max_tokens)
    batches = [pack(group, model.device) for group in mine]
    total = max(sum(sum(example.loss_mask[1:]) for example in examples), 1)
    loss_sum, aux = 0.0, 0.0
    for batch in batches:
        scores = score_tokens(model, batch)
        loss = supervised_loss(scores, model.config.router_aux_loss_coef)
        (loss / total).backward()
        loss_sum -= float(scores.logprobs.detach().sum())
        aux += float(scores.aux_loss.detach()) / len(batches) / processes.count
    processes.sum_gradients(model.parameters())
    loss_sum, aux = processes.sums([loss_sum, aux], model.device)
    learning_rate = config.optimizer.learning_rate * config.schedule.ratio(step, config.num_steps)
    grad_norm = optimizer_step(
        model,
        optimizer,
        learning_rate=learning_rate,
        max_grad_norm=config.optimizer.max_grad_norm,
    )
    num_tokens = sum(len(example.token_ids) - 1 for example in examples)
    return {
        "train/loss": loss_sum / total,
        "train/aux_loss": aux,
        "train/grad_norm": grad_norm,
        "train/learning_rate": learning_rate,
        "train/tokens": num_tokens,
        "train/tokens_per_s": num_tokens / (time.perf_counter() - began),
    }
