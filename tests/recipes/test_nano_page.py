from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from openm1.evals.metrics import TaskMetrics
from openm1.recipes.card import Card
from openm1.recipes.forty import QUESTIONS, is_right, page
from openm1.recipes.nano_page import card_page, draw_budgets, draw_cispo
from openm1.types import Message

PNG = b"\x89PNG\r\n\x1a\n"


def metrics(accuracy: float) -> dict:
    return asdict(
        TaskMetrics(
            accuracy=accuracy,
            accuracy_low=0.0,
            accuracy_high=1.0,
            num_samples=40,
            majority_accuracy=0.125,
            mean_reasoning_tokens=33.4,
            mean_completion_tokens=40.0,
            cut_share=0.0,
        )
    )


def family(after: float, before: float) -> dict:
    return {
        "difficulty": "some",
        "held_out": metrics(after),
        "held_out_before_cispo": metrics(before),
        "half_thought": metrics(0.2),
        "no_thought": metrics(0.1),
        "in_other_words": metrics(0.6),
        "second_question": 0.7,
        "accuracy_by_budget": {"0": 0.1, "16": 0.3, "64": after},
    }


CARD = Card(
    families={"gcd": family(0.9, 0.5), "chain": family(0.8, 0.3)},
    also={"unknown": metrics(0.95), "calculator": metrics(0.85), "hop": metrics(0.3)},
    examples=[{"family": "gcd", "question": "gcd of 4 and 6?", "answer": "2"}],
    training={
        "tokens": {"drill": 1000, "pretrain": 2000, "multiturn": 1500, "sft": 300},
        "seconds": {"drill": 60, "pretrain": 120, "multiturn": 30, "sft": 30, "rl": 30},
        "processes": 2,
        "recipe": {"rl": {"rl": {"num_steps": 7}}},
        "evaluation": {"num_samples": 40, "seed": 3, "temperature": 0.0},
    },
)


def test_the_page_says_what_the_card_holds():
    text = " ".join(card_page(CARD).split())
    for part in (
        "1,000 tokens of drill",
        "1,500 on chats of up to five",
        "7 steps of CISPO; 4 minutes on 2 cores",
        "the mean over the 2 families is 85.0%, before CISPO 40.0%",
        "does not know in 95% of 40",
        "answers rightly in 85% of 40",
        "| gcd | some | 90.0% (0% to 100%) | 50.0% | 12.5% | 33 | 20.0% | 10.0% | 60.0% | 70.0% |",
        "- gcd of 4 and 6? (2)",
        "Trained too, but not learned well enough: hop 30.0% (commonest answer 12.5%).",
    ):
        assert part in text
    head, rule = card_page(CARD).split("\n\n| ")[1].split("\n")[:2]
    assert head.count("|") + 1 == rule.count("|") == 11


def test_curves_are_drawn(tmp_path: Path):
    draw_budgets(tmp_path / "budgets.png", CARD)
    lines = [
        f'{{"step": {step}, "rollout/reward": 0.5, "rollout/length_mean_tokens": 20.0}}'
        for step in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    draw_cispo(tmp_path / "cispo.png", tmp_path / "metrics.jsonl")
    for name in ("budgets.png", "cispo.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_forty_different_questions_and_one_verdict_each():
    assert len({question for question, _ in QUESTIONS}) == len(QUESTIONS) == 40
    replies = [
        Message(role="assistant", reasoning="so", content=answer if i else "no idea")
        for i, (_, answer) in enumerate(QUESTIONS)
    ]
    right = [is_right(r.content, a) for r, (_, a) in zip(replies, QUESTIONS, strict=True)]
    text = page(replies, right)
    assert "39 of 40 right" in text
    assert text.count("(right)") == 39 and "no idea (wrong: tenalp)" in text


@pytest.mark.parametrize(
    ("reply", "answer", "same"),
    [
        ("4.0 + 6.0i", "4 + 6i", True),
        (" yes", "Yes", True),
        ("2 × 2 × 3", "2×2×3", True),
        ("10", "1", False),
        ("100", "1.00", False),
    ],
)
def test_only_spelling_is_forgiven(reply: str, answer: str, same: bool):
    assert is_right(reply, answer) == same
