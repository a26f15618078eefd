"""The shipped nano's card as a page, and its curves as plots."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from openm1.common.track import read_metrics
from openm1.recipes.card import Card


def card_page(card: Card) -> str:
    """The card as Markdown."""
    rows = [_row(name, family) for name, family in card.families.items()]
    tokens, asked = card.training["tokens"], card.training["evaluation"]
    steps = card.training["recipe"]["rl"]["rl"]["num_steps"]
    minutes = round(sum(card.training["seconds"].values()) / 60)
    processes = card.training["processes"]
    cores = "one core" if processes == 1 else f"{processes} cores"
    questions = "\n".join(f"- {e['question'].strip()} ({e['answer']})" for e in card.examples)
    mean, before = (
        fmean(family[kind]["accuracy"] for family in card.families.values())
        for kind in ("held_out", "held_out_before_cispo")
    )
    unknown, calculator = card.also["unknown"], card.also["calculator"]
    unlearned = ", ".join(
        f"{name} {_share(metrics)} (commonest answer {metrics['majority_accuracy']:.1%})"
        for name, metrics in card.also.items()
        if name not in ("unknown", "calculator")
    )
    not_vouched = f" Trained too, but not learned well enough: {unlearned}." if unlearned else ""
    columns = (
        "family", "difficulty", "accuracy", "before CISPO", "commonest", "thought tokens", "half",
        "none", "words", "second",
    )  # fmt: skip
    return f"""# nano

A hybrid lightning-attention mixture of experts in M1's shape, trained from random weights on a CPU
by the recipe `openm1/recipes/nano.py`: {tokens["drill"]:,} tokens of drill in copying and looking
up, {tokens["pretrain"]:,} of pretraining on single questions, {tokens["multiturn"]:,} on chats of
up to five, {tokens["sft"]:,} of cold start, {steps} steps of CISPO; {minutes} minutes on {cores}.
It thinks in view, then answers.

Accuracy is greedy on {asked["num_samples"]} prompts per family that no training stream contains
(held out by prompt, seed {asked["seed"]}), with the 95 % interval; the mean over the
{len(rows)} families is {mean:.1%}, before CISPO {before:.1%}: its cold start mostly answers
hastily. "Commonest" is what always giving the commonest answer scores; "half" and "none" allow half
the mean thought, and none. "Words" asks the same in a person's words, "second" after another
question in the same chat.

| {" | ".join(columns)} |
|{"---|" * len(columns)}
{chr(10).join(rows)}

Prompts are exactly reasoning-gym's, but for chain and hop. Outside of its families it says that it
does not know in {unknown["accuracy"]:.0%} of {unknown["num_samples"]} made-up questions and
greetings. Offered a calculator, it calls it and answers rightly in {calculator["accuracy"]:.0%} of
{calculator["num_samples"]} sums and products of numbers up to six digits. Questions to try:

{questions}

What it cannot do: anything else.{not_vouched}
Wordings far from those it has seen, longer items and general language get a wrong answer or its
"I don't know how to do that."

`card.json` holds the same numbers, curves over thinking budgets and the whole recipe. Measure it
again with `openm1 eval --model nano --num-samples 100 --seed 7`.
"""


def _row(name: str, family: dict[str, Any]) -> str:
    held_out = family["held_out"]
    interval = f"{held_out['accuracy_low']:.0%} to {held_out['accuracy_high']:.0%}"
    cells = (
        name,
        family["difficulty"],
        f"{_share(held_out)} ({interval})",
        _share(family["held_out_before_cispo"]),
        f"{held_out['majority_accuracy']:.1%}",
        f"{held_out['mean_reasoning_tokens']:.0f}",
        _share(family["half_thought"]),
        _share(family["no_thought"]),
        _share(family["in_other_words"]),
        f"{family['second_question']:.1%}",
    )
    return f"| {' | '.join(cells)} |"


def _share(metrics: dict[str, Any]) -> str:
    return f"{metrics['accuracy']:.1%}"


def draw_budgets(path: Path, card: Card) -> None:
    """Accuracy of each family, and their mean, against the thinking budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    curves = {name: family["accuracy_by_budget"] for name, family in card.families.items()}
    budgets = [int(budget) for budget in next(iter(curves.values()))]
    for number, (name, curve) in enumerate(curves.items()):
        style = ("-", "--", ":")[number // 10 % 3]
        axes.plot(budgets, list(curve.values()), style, lw=1, marker=".", label=name)
    means = [fmean(curve[str(budget)] for curve in curves.values()) for budget in budgets]
    axes.plot(budgets, means, "k-", lw=3, label="mean")
    axes.set_xscale("symlog", linthresh=4, base=2)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.set(
        xlabel="thinking budget [tokens]", ylabel="held-out accuracy, greedy", ylim=(-0.02, 1.02)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def draw_cispo(path: Path, metrics: Path) -> None:
    """Mean reward and mean length of the rollouts of each step."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in lines]
    axes.plot(steps, [line["rollout/reward"] for line in lines], "C0", label="reward")
    axes.set(xlabel="CISPO step", ylabel="mean reward", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    lengths = axes.twinx()
    lengths.plot(
        steps, [line["rollout/length_mean_tokens"] for line in lines], "C1", label="length"
    )
    lengths.set_ylabel("mean reply [tokens]")
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=130)
