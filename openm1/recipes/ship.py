"""Turns a trained checkpoint into the shipped nano: weights, tokenizer and a measured card.

python -m openm1.recipes.ship --checkpoint runs/nano/rl --before runs/nano/sft
"""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro

from openm1.common.config import to_jsonable
from openm1.common.track import read_metrics
from openm1.engine.llm import LLM
from openm1.envs.catalog import IN_OTHER_WORDS, make_taskset
from openm1.envs.chain import ChainConfig
from openm1.envs.hop import HopConfig
from openm1.envs.logic import REDUCED
from openm1.evals.metrics import TaskMetrics
from openm1.evals.run import EvalConfig, evaluate
from openm1.model.hf import SHIPPED
from openm1.recipes import nano
from openm1.recipes.card import CARD_FILE, Card
from openm1.recipes.catalog import RECIPES
from openm1.recipes.nano_page import card_page, draw_budgets, draw_cispo
from openm1.recipes.runs import SupervisedRun, load_start
from openm1.types import Message, SamplingParams

PACKAGE_DEFAULT = "reasoning-gym's default"
CHAIN, HOP = ChainConfig(), HopConfig()
DIFFICULTY = {
    "chain": f"{CHAIN.min_operations} to {CHAIN.max_operations} operations",
    "hop": f"{HOP.min_hops} to {HOP.max_hops} hops over {HOP.num_pairs} pairs",
    **{
        name: "reduced: " + ", ".join(f"{option} {value}" for option, value in options.items())
        for name, options in REDUCED.items()
    },
}
ALSO = ("unknown", "calculator")
"""Measured beside the families: neither is a skill that a thought or CISPO could improve."""
EXAMPLES = ("chain", "hop", "spell_backward", "count_bits", "chain_sum")
"""The families of the card's five questions."""
BUDGETS = (0, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
"""Thinking budgets of the curves, in tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShipConfig:
    """Measured greedily on held-out prompts; `seed` should be new."""

    checkpoint: Path
    """A checkpoint, or a run folder whose newest one is taken."""
    before: Path
    """What CISPO started from."""
    families: tuple[str, ...] = tuple(nano.FAMILIES)
    """What the card vouches for. The recipe's others are only measured: trained, not learned."""
    target: Path = SHIPPED["nano"]
    docs: Path = Path("docs")
    """Where the plots go."""
    num_samples: int = 100
    seed: int = 101
    max_tokens: int = 400
    processes: int = 1
    """How many the supervised stages were shared by; the card says so."""


def main() -> None:
    ship(tyro.cli(ShipConfig, prog="python -m openm1.recipes.ship"))


def ship(config: ShipConfig) -> None:
    """Writes the model folder in place of the one at `config.target`."""
    card = make_card(config)
    model, tokenizer = load_start(config.checkpoint)
    if config.target.exists():
        shutil.rmtree(config.target)
    model.save_pretrained(config.target)
    tokenizer.save_pretrained(config.target)
    (config.target / CARD_FILE).write_text(json.dumps(asdict(card), indent=1) + "\n")
    (config.target / "README.md").write_text(card_page(card))
    draw_budgets(config.docs / "nano-budgets.png", card)
    draw_cispo(config.docs / "nano-cispo.png", config.checkpoint / "metrics.jsonl")


def make_card(config: ShipConfig) -> Card:
    final, before = (
        LLM(model, tokenizer=tokenizer)
        for model, tokenizer in map(load_start, (config.checkpoint, config.before))
    )
    families = {name: _family(final, before, name, config) for name in config.families}
    return Card(
        families=families,
        also={name: asdict(_measure(final, name, config)) for name in _also(config)},
        examples=_examples(config.seed),
        training=_training(config),
    )


def _also(config: ShipConfig) -> list[str]:
    return [*ALSO, *(name for name in nano.FAMILIES if name not in config.families)]


def _family(final: LLM, before: LLM, name: str, config: ShipConfig) -> dict[str, Any]:
    measured = _measure(final, name, config)
    half = int(measured.mean_reasoning_tokens / 2)
    curve_config = replace(config, num_samples=max(1, config.num_samples // 2))
    return {
        "difficulty": DIFFICULTY.get(name, PACKAGE_DEFAULT),
        "held_out": asdict(measured),
        "held_out_before_cispo": asdict(_measure(before, name, config)),
        "half_thought": asdict(_measure(final, name, config, thinking_budget=half)),
        "no_thought": asdict(_measure(final, name, config, thinking_budget=0)),
        "in_other_words": asdict(_measure(final, name + IN_OTHER_WORDS, config)),
        "second_question": _second_question_accuracy(final, name, config),
        "accuracy_by_budget": {
            str(budget): _measure(final, name, curve_config, thinking_budget=budget).accuracy
            for budget in BUDGETS
        },
    }


def _eval(family: str, config: ShipConfig, **changes: Any) -> EvalConfig:
    asked = EvalConfig(
        tasks=(family,),
        num_samples=config.num_samples,
        seed=config.seed,
        max_tokens=config.max_tokens,
    )
    return replace(asked, **changes)


def _measure(llm: LLM, family: str, config: ShipConfig, **changes: Any) -> TaskMetrics:
    return evaluate(llm.policy, llm.chat_format, _eval(family, config, **changes))[family]


def _second_question_accuracy(llm: LLM, family: str, config: ShipConfig) -> float:
    """Greedy accuracy on held-out questions asked after another, any family's, in one chat."""
    taskset = make_taskset(family)
    tasks = taskset.test(config.seed, config.num_samples)
    per_family = -(-len(tasks) // len(config.families))
    others = [make_taskset(name).test(config.seed + 1, per_family) for name in config.families]
    first = [list(task.prompt) for group in zip(*others, strict=True) for task in group]
    chats = [
        [*opening, reply, *task.prompt]
        for task, opening, reply in zip(tasks, first, _replies(llm, first, config), strict=False)
    ]
    replies = _replies(llm, chats, config)
    envs = [taskset.make_env(task) for task in tasks]
    results = [asyncio.run(env.step(reply)) for env, reply in zip(envs, replies, strict=True)]
    return fmean(result.reward for result in results)


def _replies(llm: LLM, chats: list[list[Message]], config: ShipConfig) -> list[Message]:
    params = SamplingParams(max_tokens=config.max_tokens, temperature=0.0)
    groups = llm.generate([llm.chat_format.encode(chat) for chat in chats], params)
    return [
        Message(role="assistant", reasoning=completion.reasoning, content=completion.text)
        for (completion,) in groups
    ]


def _examples(seed: int) -> list[dict[str, str]]:
    """Held-out questions, taken blindly: the first ones of the seed after the measured one."""
    return [
        {"family": task.family, "question": task.prompt[-1].content, "answer": task.answer}
        for number, name in enumerate(EXAMPLES)
        for task in make_taskset(name).test(seed + 1 + number, 1)
    ]


def _training(config: ShipConfig) -> dict[str, Any]:
    """What it was trained with and on how much, from the run folders beside the checkpoint."""
    stages = RECIPES["nano"]
    folder = config.before.parent
    tokens: dict[str, int] = {}
    seconds: dict[str, int] = {}
    for name in (name for name, stage in stages.items() if isinstance(stage, SupervisedRun)):
        lines = read_metrics(folder / name / "metrics.jsonl")
        tokens[name] = int(sum(line["train/tokens"] for line in lines))
        seconds[name] = round(
            sum(line["train/tokens"] / line["train/tokens_per_s"] for line in lines)
        )
    lines = read_metrics(folder / "rl" / "metrics.jsonl")
    seconds["rl"] = round(sum(line["time/sample_s"] + line["time/train_s"] for line in lines))
    return {
        "tokens": tokens,
        "seconds": seconds,
        "processes": config.processes,
        "recipe": {name: to_jsonable(stage) for name, stage in stages.items()},
        "evaluation": {"num_samples": config.num_samples, "seed": config.seed, "temperature": 0.0},
    }


if __name__ == "__main__":
    main()
