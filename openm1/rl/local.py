"""The loop with an embedded engine that shares the trainer's weights."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from openm1.chat.template import chat_format_for
from openm1.chat.tokenizer import Tokenizer
from openm1.engine.client import EnginePolicy
from openm1.engine.config import EngineConfig
from openm1.engine.engine import InFlight
from openm1.engine.llm import LLM
from openm1.envs.mixture import Mixture
from openm1.model.m1 import M1ForCausalLM
from openm1.rl.config import RLConfig
from openm1.rl.loop import Stateful, StepHook, train_rl
from openm1.train.checkpoint import RunFolder


def train_rl_locally(
    model: M1ForCausalLM,
    tokenizer: Tokenizer,
    mixture: Mixture,
    config: RLConfig,
    folder: RunFolder,
    *,
    title: str = "rl",
    max_num_seqs: int = 256,
    on_step: StepHook | None = None,
    stateful: Mapping[str, Stateful] | None = None,
) -> Path:
    """`train_rl` on one machine; returns the last checkpoint."""
    # While rollouts run ahead the engine needs weights that are not being trained.
    played = deepcopy(model) if config.max_staleness else model
    engine = EngineConfig(max_num_seqs=max_num_seqs, record_experts=config.replay_experts)
    llm = LLM(played, tokenizer=tokenizer, config=engine)
    policy = llm.policy
    in_flight = "keep" if config.in_flight == "keep" else "recompute"
    return asyncio.run(
        train_rl(
            model,
            chat_format_for(tokenizer),
            mixture,
            policy,
            _Weights(policy, in_flight),
            config,
            folder,
            title=title,
            on_step=on_step,
            stateful=stateful,
        )
    )


@dataclass(frozen=True)
class _Weights:
    """`protocols.WeightSink` of an engine, with what becomes of requests under way."""

    policy: EnginePolicy
    in_flight: InFlight

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        self.policy.load_weights(tensors, version=version, in_flight=self.in_flight)
