"""The demo's model: it knows chain arithmetic, unlearns to show it, and finds it again by CISPO."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from openm1.envs.curriculum import CurriculumConfig
from openm1.recipes.pass_rate import PassRateFilter
from openm1.recipes.runs import ModelShape, RLRun, SupervisedRun, TraceData
from openm1.rl.batch import BatchConfig
from openm1.rl.config import RLConfig
from openm1.rl.stages import WindowGrowth
from openm1.train.optim import AdamWConfig
from openm1.train.schedule import Schedule
from openm1.train.supervised import SupervisedConfig

FOLDER = Path("runs/chain")
FAMILIES = {"chain": 1.0}

# A few replies without a thought, so that an answer given at once is a guess and not a stumble.
DIRECT_SHARE = {"chain": 0.05}

PRETRAIN = SupervisedRun(
    folder=FOLDER / "pretrain",
    shape=ModelShape(num_hidden_layers=4, softmax_period=4),
    data=TraceData(
        families=FAMILIES, batch_tokens=2048, chain_full_share=0.7, direct_share=DIRECT_SHARE
    ),
    train=SupervisedConfig(
        num_steps=600,
        optimizer=AdamWConfig(learning_rate=4e-3),
        schedule=Schedule(warmup_steps=20, decay_share=0.4),
        save_every_steps=200,
    ),
)

COLD_START = SupervisedRun(
    folder=FOLDER / "sft",
    init=PRETRAIN.folder,
    data=replace(PRETRAIN.data, chain_full_share=0.15, seed=1),
    train=SupervisedConfig(
        num_steps=60,
        optimizer=AdamWConfig(learning_rate=1e-3),
        schedule=Schedule(decay_share=0.3),
        save_every_steps=60,
    ),
)
"""Mostly thoughts that take several operations at once, and so mostly fail."""

CISPO_RUN = RLRun(
    folder=FOLDER / "rl",
    init=COLD_START.folder,
    families=FAMILIES,
    rl=RLConfig(
        num_steps=24,
        max_response_tokens=20,
        # A full thought reaches into the last fifth of this window: it must not cost anything.
        batch=BatchConfig(overlong_share=0.0),
        optimizer=AdamWConfig(learning_rate=1e-4),
        schedule=Schedule(decay_share=0.4),
        save_every_steps=8,
    ),
)

WINDOWS_RUN = replace(
    CISPO_RUN,
    folder=FOLDER / "rl-windows",
    rl=replace(
        CISPO_RUN.rl,
        max_response_tokens=10,
        growth=WindowGrowth(
            later_tokens=(12, 14, 16, 18, 20), horizon_steps=2, perplexity_tolerance=0.1
        ),
    ),
)
"""M1's walk from 40K to 80K in small: at first only the full thoughts of two operations fit."""

CURRICULUM_RUN = replace(
    CISPO_RUN,
    folder=FOLDER / "rl-curriculum",
    curriculum=CurriculumConfig(raise_at=0.7, horizon_groups=16),
)
"""Two operations first, one more as soon as 70 % of a batch's answers are right."""

PASS_RATE_RUN = replace(
    CISPO_RUN, folder=FOLDER / "rl-pass-rate", pass_rate=PassRateFilter(num_prompts=512)
)
"""Only prompts that the cold start gets right in some of ten rollouts, but not in nine."""
