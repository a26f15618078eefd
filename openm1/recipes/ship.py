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
from openm1.envs.catalog import make_taskset
from openm1.envs.chain import ChainConfig
from openm1.envs.hop import HopConfig
from openm1.evals.metrics import TaskMetrics
from openm1.evals.run import EvalConfig, evaluate
from openm1.model.hf import SHIPPED
from openm1.recipes import nano
from openm1.recipes.card import CARD_FILE, Card
from openm1.recipes.runs import load_start
from openm1.types import Message, SamplingParams

PACKAGE_DEFAULT = "reasoning-gym's default"
CHAIN, HOP = ChainConfig(), HopConfig()
DIFFICULTY = {
    "chain": f"{CHAIN.min_operations} to {CHAIN.max_operations} operations",
    "hop": f"{HOP.min_hops} to {HOP.max_hops} hops over {HOP.num_pairs} pairs",
}
EXAMPLES = ("chain", "hop", "spell_backward", "count_bits", "chain")
"""The families of the card's five questions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShipConfig:
    """Measured greedily on held-out prompts; `seed` should be new."""

    checkpoint: Path
    """A checkpoint, or a run folder whose newest one is taken."""
    before: Path
    """What CISPO started from."""
    target: Path = SHIPPED["nano"]
    num_samples: int = 300
    seed: int = 101
    max_tokens: int = 320


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
    (config.target / CARD_FILE).write_text(json.dumps(asdict(card), indent=2) + "\n")
    (config.target / "README.md").write_text(card_page(card))


def make_card(config: ShipConfig) -> Card:
    final, before = (
        LLM(model, tokenizer=tokenizer)
        for model, tokenizer in map(load_start, (config.checkpoint, config.before))
    )
    families = {}
    for name in nano.FAMILIES:
        measured = _measure(final, name, config)
        half = int(measured.mean_reasoning_tokens / 2)
        families[name] = {
            "difficulty": DIFFICULTY.get(name, PACKAGE_DEFAULT),
            "held_out": asdict(measured),
            "held_out_before_cispo": asdict(_measure(before, name, config)),
            "sampled": asdict(_measure(final, name, config, temperature=1.0)),
            "sampled_before_cispo": asdict(_measure(before, name, config, temperature=1.0)),
            "half_thought": asdict(_measure(final, name, config, thinking_budget=half)),
            "second_question": _second_question_accuracy(final, name, config),
            "no_thought": asdict(_measure(final, name, config, thinking_budget=0)),
        }
    return Card(families=families, examples=_examples(config.seed), training=_training(config))


def _measure(llm: LLM, family: str, config: ShipConfig, **changes: Any) -> TaskMetrics:
    asked = EvalConfig(
        tasks=(family,),
        num_samples=config.num_samples,
        seed=config.seed,
        max_tokens=config.max_tokens,
    )
    return evaluate(llm.policy, llm.chat_format, replace(asked, **changes))[family]


def _second_question_accuracy(llm: LLM, family: str, config: ShipConfig) -> float:
    """Greedy accuracy on held-out questions asked after another, any family's, in one chat."""
    taskset = make_taskset(family)
    tasks = taskset.test(config.seed, config.num_samples)
    per_family = -(-len(tasks) // len(nano.FAMILIES))
    others = [make_taskset(name).test(config.seed + 1, per_family) for name in nano.FAMILIES]
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
    stages = {"pretrain": nano.PRETRAIN, "sft": nano.COLD_START, "rl": nano.CISPO_RUN}
    folder = config.before.parent
    tokens: dict[str, int] = {}
    seconds: dict[str, int] = {}
    for name in ("pretrain", "sft"):
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
        "recipe": {name: to_jsonable(stage) for name, stage in stages.items()},
        "evaluation": {"num_samples": config.num_samples, "seed": config.seed, "temperature": 0.0},
    }


def card_page(card: Card) -> str:
    """The card as Markdown."""
    rows = [_row(name, family) for name, family in card.families.items()]
    tokens, asked = card.training["tokens"], card.training["evaluation"]
    steps = card.training["recipe"]["rl"]["rl"]["num_steps"]
    minutes = round(sum(card.training["seconds"].values()) / 60)
    questions = "\n".join(f"- {e['question']} ({e['answer']})" for e in card.examples)
    return f"""# nano

A hybrid lightning-attention mixture of experts in M1's shape, trained from random weights on a CPU
by the recipe `openm1/recipes/nano.py`: {tokens["pretrain"]:,} tokens of pretraining,
{tokens["sft"]:,} tokens of cold start, {steps} steps of CISPO; {minutes} minutes on at most two
cores. It thinks in view, then answers.

Accuracy is greedy on {asked["num_samples"]} prompts per family that no training stream contains
(held out by prompt, seed {asked["seed"]}), with the 95 % interval. "Commonest" is what always
giving the commonest answer scores; "half" and "none" allow half the mean thought, and none.
"Second" is greedy accuracy on the same questions asked after another one in the same chat, and
"sampled" is at temperature 1, before and after CISPO.

| family | difficulty | accuracy | commonest | thought tokens | half | none | second | sampled |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Prompts of count_bits and spell_backward are exactly reasoning-gym's. Questions to try:

{questions}

What it cannot do: anything else. It has seen only these prompts in this wording; other phrasings,
longer chains and general language get nonsense, not a refusal. It knows no tool calls.

`card.json` holds the same numbers and the whole recipe. Measure it again with
`openm1 eval --model nano --num-samples 100 --seed 7`.
"""


def _row(name: str, family: dict[str, Any]) -> str:
    held_out = family["held_out"]
    interval = f"{held_out['accuracy_low']:.1%} to {held_out['accuracy_high']:.1%}"
    cells = (
        name,
        family["difficulty"],
        f"{_share(held_out)} ({interval})",
        f"{held_out['majority_accuracy']:.1%}",
        f"{held_out['mean_reasoning_tokens']:.1f}",
        _share(family["half_thought"]),
        _share(family["no_thought"]),
        f"{family['second_question']:.1%}",
        f"{_share(family['sampled_before_cispo'])} to {_share(family['sampled'])}",
    )
    return f"| {' | '.join(cells)} |"


def _share(metrics: dict[str, Any]) -> str:
    return f"{metrics['accuracy']:.1%}"


if __name__ == "__main__":
    main()
