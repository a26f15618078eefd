"""Which prompts to learn from: those that the starting model sometimes gets right.

M1 kept prompts with a pass rate strictly between 0 and 0.9 (arXiv 2506.13585, section 4.1): what is
never right, or nearly always, teaches little.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from openm1.chat.tokenizer import Tokenizer
from openm1.common.errors import RunStopped
from openm1.common.track import JsonlTracker, read_metrics
from openm1.engine.config import EngineConfig
from openm1.engine.llm import LLM
from openm1.envs.base import stable_hash
from openm1.envs.mixture import Mixture, TaskList
from openm1.model.m1 import M1ForCausalLM
from openm1.rl.batch import pass_rate
from openm1.rl.config import RLConfig
from openm1.rollout.run import run_group
from openm1.types import SamplingParams

MEASURED_FILE = "pass-rates.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class PassRateFilter:
    """How pass rates are measured, before the first step, and which are kept."""

    num_prompts: int = 512
    num_samples: int = 10
    """Rollouts per prompt."""
    above: float = 0.0
    below: float = 0.9

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is at least 1")
        if not 0 <= self.above < self.below:
            raise ValueError(
                f"pass rates are kept between {self.above} and {self.below}; allowed is "
                "0 <= above < below"
            )


def keep_learnable(
    mixture: Mixture,
    config: PassRateFilter,
    model: M1ForCausalLM,
    tokenizer: Tokenizer,
    rl: RLConfig,
    folder: Path,
    *,
    max_num_seqs: int = 256,
) -> TaskList:
    """The first `num_prompts` of the mixture whose pass rate lies strictly between, for good.

    Rates are kept in the folder as they are measured: a run that was stopped measures the rest.
    Raises RunStopped when no prompt is left.
    """
    file = folder / MEASURED_FILE
    tracker = JsonlTracker(file, first_step=config.num_prompts)
    lines = read_metrics(file) if file.exists() else []
    rates = {line["step"]: line["pass_rate"] for line in lines}
    missing = [index for index in range(config.num_prompts) if index not in rates]
    if missing:
        llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(max_num_seqs=max_num_seqs))
        rates |= asyncio.run(_measure(llm, mixture, missing, config, rl, tracker))
    kept = [i for i in range(config.num_prompts) if config.above < rates[i] < config.below]
    if not kept:
        never = sum(rate <= config.above for rate in rates.values())
        raise RunStopped(
            f"of {config.num_prompts} prompts none passes between {config.above} and "
            f"{config.below}: {never} at or below, {config.num_prompts - never} at or above; give "
            "more prompts, or a start that can do some of them"
        )
    return TaskList([mixture.task(index) for index in kept], seed=mixture.seed)


async def _measure(
    llm: LLM,
    mixture: Mixture,
    indices: list[int],
    config: PassRateFilter,
    rl: RLConfig,
    tracker: JsonlTracker,
) -> dict[int, float]:
    """Each prompt's pass rate by its place in the stream, written as soon as it is known."""
    params = SamplingParams(
        max_tokens=rl.max_response_tokens,
        temperature=rl.temperature,
        repetition_stop_tokens=rl.repetition_stop_tokens,
    )

    async def one(index: int) -> tuple[int, float]:
        taskset, task = mixture.task(index)
        seeds = [stable_hash(f"{rl.seed}/{index}/{k}") % 2**63 for k in range(config.num_samples)]
        group = await run_group(
            llm.policy,
            taskset,
            task,
            llm.chat_format,
            params,
            seeds=seeds,
            env_timeout_s=rl.env_timeout_s,
        )
        rate = pass_rate(group)
        tracker.log(index, {"pass_rate": rate})
        return index, rate

    return dict(await asyncio.gather(*map(one, indices)))
