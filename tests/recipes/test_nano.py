"""The shipped model against its recipe and its card."""

from __future__ import annotations

import pytest

from openm1.engine.llm import LLM, load_tokenizer
from openm1.evals.run import EvalConfig, evaluate
from openm1.model.config import PRESETS
from openm1.model.hf import SHIPPED, read_config
from openm1.recipes import nano
from openm1.recipes.card import read_card
from openm1.recipes.nano_page import card_page
from openm1.recipes.vocabulary import nano_tokenizer

CARD = read_card("nano")
FAMILIES = tuple(CARD.families)
# On 40 prompts four standard errors below what the card says: once in 30,000 for each family.
NUM_SAMPLES = 40


def lowest(accuracy: float) -> float:
    """At 100 % the error of the card's own 100 prompts is what is left."""
    spread = max(accuracy * (1 - accuracy), 0.02)
    return accuracy - 4 * (spread / NUM_SAMPLES) ** 0.5


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("nano")


def test_preset_and_shipped_config_are_one():
    assert PRESETS["nano"] == read_config("nano")


def test_the_folder_is_small():
    folder = SHIPPED["nano"]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12 * 2**20


def test_the_tokenizer_and_the_families_are_the_recipes():
    shipped = load_tokenizer(SHIPPED["nano"])
    assert shipped is not None
    assert [shipped.decode([i]) for i in range(768)] == [
        nano_tokenizer().decode([i]) for i in range(768)
    ]
    assert {*FAMILIES, *CARD.also} == {*nano.FAMILIES, "unknown", "calculator"}


def test_the_card_vouches_only_for_what_was_learned():
    assert len(FAMILIES) >= 12
    for family in CARD.families.values():
        held_out = family["held_out"]
        assert held_out["accuracy"] >= max(0.6, held_out["majority_accuracy"] + 0.2)
        assert family["second_question"] >= held_out["accuracy"] - 0.2


def test_the_page_is_the_cards():
    assert (SHIPPED["nano"] / "README.md").read_text() == card_page(CARD)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_held_out_questions(llm: LLM, family: str):
    config = EvalConfig(tasks=(family,), num_samples=NUM_SAMPLES, seed=555, max_tokens=400)
    result = evaluate(llm.policy, llm.chat_format, config)[family]
    assert result.accuracy >= lowest(CARD.families[family]["held_out"]["accuracy"])
