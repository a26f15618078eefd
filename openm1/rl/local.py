"""The loop with an embedded engine that shares the trainer's weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

from openm1.chat.template import chat_format_for
from openm1.chat.tokenizer import Tokenizer
from openm1.engine.config import EngineConfig
from openm1.engine.llm import LLM
from openm1.envs.mixture import Mixture
from openm1.model.m1 import M1ForCausalLM
from openm1.rl.config import RLConfig
from openm1.rl.loop import StepHook, train_rl
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
) -> Path:
    """`train_rl` on one machine; returns the last checkpoint."""
    llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(max_num_seqs=max_num_seqs))
    policy = llm.policy
    return asyncio.run(
        train_rl(
            model,
            chat_format_for(tokenizer),
            mixture,
            policy,
            policy,
            config,
            folder,
            title=title,
            on_step=on_step,
        )
    )
