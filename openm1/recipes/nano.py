"""The recipe of nano: chain, hop and families of reasoning-gym, each with worked thoughts.

A drill teaches it to copy and to look up; pretraining shows every family's worked thought, some
questions in a person's words, and then several questions in one chat. The cold start shows two
ways, the thought and the hasty answer, mostly the hasty one; CISPO finds out by itself which of
them pays.
"""

from __future__ import annotations

from pathlib import Path

from openm1.recipes.runs import ModelShape, RLRun, SupervisedRun, TraceData
from openm1.rl.batch import BatchConfig
from openm1.rl.config import RLConfig
from openm1.train.optim import AdamWConfig
from openm1.train.schedule import Schedule
from openm1.train.supervised import SupervisedConfig

FOLDER = Path("runs/nano")

FAMILIES = {
    "chain": 0.10,
    "hop": 0.12,
    "count_bits": 0.09,
    "spell_backward": 0.06,
    "letter_counting": 0.10,
    "word_sequence_reversal": 0.06,
    "chain_sum": 0.15,
    "products": 0.10,
    "gcd": 0.07,
    "prime_factorization": 0.10,
    "leg_counting": 0.06,
    "simple_equations": 0.08,
    "simple_geometry": 0.07,
    "aiw": 0.03,
    "syllogism": 0.09,
    "family_relationships": 0.15,
}
"""Shares of conversations: more where thoughts are long or hold many digit facts."""

WITH_UNKNOWN = {**FAMILIES, "unknown": 0.03}

DRILL_FAMILIES = {"chain": 0.35, "hop": 0.4, "count_bits": 0.12, "spell_backward": 0.13}
"""To copy and to look up comes first, until it is learned: begun with everything at once, it never
was. Chain and hop are short, so that most conversations are nearly half of the tokens."""

# Some replies without a thought, so that switching thought off gives an answer, if a poor one.
DIRECT_SHARE = 0.04

SHAPE = ModelShape(
    hidden_size=128,
    num_hidden_layers=8,
    num_attention_heads=8,
    intermediate_size=128,
    # At this size one softmax layer in four learns faster than one in eight.
    softmax_period=4,
)

DRILL = SupervisedRun(
    folder=FOLDER / "drill",
    shape=SHAPE,
    data=TraceData(
        families=DRILL_FAMILIES,
        batch_tokens=2048,
        direct_share=dict.fromkeys(DRILL_FAMILIES, DIRECT_SHARE),
        seed=7,
    ),
    train=SupervisedConfig(
        num_steps=800,
        max_tokens=4096,
        optimizer=AdamWConfig(learning_rate=5e-3, matrices="muon"),
        schedule=Schedule(warmup_steps=50),
        save_every_steps=100,
    ),
)

PRETRAIN = SupervisedRun(
    folder=FOLDER / "pretrain",
    init=DRILL.folder,
    data=TraceData(
        families=WITH_UNKNOWN,
        direct_share=dict.fromkeys(FAMILIES, DIRECT_SHARE),
        easier_share=0.3,
        reworded_share=0.2,
        calculator_share=0.02,
    ),
    train=SupervisedConfig(
        num_steps=6300,
        max_tokens=4096,
        optimizer=AdamWConfig(learning_rate=5e-3, matrices="muon"),
        schedule=Schedule(warmup_steps=20, decay_share=0.9),
        save_every_steps=100,
    ),
)

MULTITURN = SupervisedRun(
    folder=FOLDER / "multiturn",
    init=PRETRAIN.folder,
    data=TraceData(
        # What must be copied from far away is learned slowest.
        families={
            **WITH_UNKNOWN,
            "chain": 0.14,
            "hop": 0.16,
            "spell_backward": 0.12,
            "word_sequence_reversal": 0.08,
            "family_relationships": 0.05,
        },
        max_turns=5,
        direct_share=dict.fromkeys(FAMILIES, DIRECT_SHARE),
        easier_share=0.2,
        reworded_share=0.3,
        calculator_share=0.02,
        seed=3,
    ),
    train=SupervisedConfig(
        num_steps=3200,
        max_tokens=4096,
        optimizer=AdamWConfig(learning_rate=4e-3, matrices="muon"),
        schedule=Schedule(warmup_steps=20, decay_share=0.9),
        save_every_steps=100,
    ),
)
"""One to five questions in a row: who has only ever seen one finds the second unreadable."""

COLD_START = SupervisedRun(
    folder=FOLDER / "sft",
    init=MULTITURN.folder,
    data=TraceData(
        families=WITH_UNKNOWN,
        batch_tokens=3072,
        max_turns=3,
        direct_share=dict.fromkeys(FAMILIES, 0.6),
        easier_share=0.3,
        reworded_share=0.3,
        calculator_share=0.03,
        seed=1,
    ),
    train=SupervisedConfig(
        num_steps=150,
        max_tokens=4096,
        optimizer=AdamWConfig(learning_rate=3e-4),
        schedule=Schedule(warmup_steps=10, decay_share=0.7),
        save_every_steps=50,
    ),
)
"""Three hasty answers to two thoughts, and up to three questions in a row."""

CISPO_RUN = RLRun(
    folder=FOLDER / "rl",
    init=COLD_START.folder,
    families={**FAMILIES, **{f"{name}:words": share / 3 for name, share in FAMILIES.items()}},
    rl=RLConfig(
        num_steps=80,
        num_prompts=32,
        group_size=8,
        num_updates=4,
        max_response_tokens=400,
        batch=BatchConfig(overlong_share=0.0),
        optimizer=AdamWConfig(learning_rate=1e-4),
        schedule=Schedule(decay_share=0.7),
        max_tokens=4096,
        save_every_steps=5,
    ),
)
"""A quarter of the questions come in other words."""
