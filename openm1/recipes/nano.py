"""The shipped model: a nano M1 on chain, hop and the reasoning-gym families learned quickest."""

from __future__ import annotations

from pathlib import Path

from openm1.recipes.runs import ModelShape, RLRun, SupervisedRun, TraceData
from openm1.rl.batch import BatchConfig
from openm1.rl.config import RLConfig
from openm1.train.optim import AdamWConfig
from openm1.train.schedule import Schedule
from openm1.train.supervised import SupervisedConfig

FOLDER = Path("runs/nano")

# Shares of conversations; count_bits has the longest thoughts and the most digit facts.
FAMILIES = {"chain": 0.15, "hop": 0.2, "count_bits": 0.35, "spell_backward": 0.3}
# spell_backward is learned first and chain, whose replies are short, last.
REBALANCED = {"chain": 0.4, "hop": 0.2, "count_bits": 0.3, "spell_backward": 0.1}
# Some replies without a thought, so that switching thought off gives an answer, if a poor one.
DIRECT_SHARE = dict.fromkeys(FAMILIES, 0.04)

SHAPE = ModelShape(
    hidden_size=128,
    num_hidden_layers=8,
    num_attention_heads=8,
    intermediate_size=128,
    # At this size one softmax layer in four learns faster than one in eight.
    softmax_period=4,
)

PRETRAIN = SupervisedRun(
    folder=FOLDER / "pretrain",
    shape=SHAPE,
    data=TraceData(
        families=FAMILIES, batch_tokens=2048, chain_full_share=0.9, direct_share=DIRECT_SHARE
    ),
    train=SupervisedConfig(
        num_steps=1000,
        max_tokens=1024,
        optimizer=AdamWConfig(learning_rate=2e-3),
        schedule=Schedule(warmup_steps=100),
        save_every_steps=250,
    ),
)

COLD_START = SupervisedRun(
    folder=FOLDER / "sft",
    init=PRETRAIN.folder,
    data=TraceData(
        families=REBALANCED,
        batch_tokens=2048,
        chain_full_share=1.0,
        max_turns=3,
        direct_share=DIRECT_SHARE,
        seed=1,
    ),
    train=SupervisedConfig(
        num_steps=1500,
        max_tokens=1024,
        optimizer=AdamWConfig(learning_rate=2e-3),
        schedule=Schedule(warmup_steps=20, decay_share=0.7),
        save_every_steps=250,
    ),
)
"""Only whole thoughts, rebalanced, up to three questions in a row, at a falling rate."""

CISPO_RUN = RLRun(
    folder=FOLDER / "rl",
    init=COLD_START.folder,
    families=FAMILIES,
    rl=RLConfig(
        num_steps=12,
        num_prompts=16,
        group_size=16,
        num_updates=8,
        max_response_tokens=200,
        batch=BatchConfig(overlong_share=0.0),
        optimizer=AdamWConfig(learning_rate=5e-5),
        schedule=Schedule(decay_share=0.5),
        max_tokens=4096,
        save_every_steps=4,
    ),
)
