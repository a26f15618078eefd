"""The shipped model against its recipe and its card."""

from __future__ import annotations

import pytest

from openm1.engine.llm import LLM
from openm1.evals.run import EvalConfig, evaluate
from openm1.model.config import PRESETS
from openm1.model.hf import SHIPPED, read_config
from openm1.recipes.card import read_card
from openm1.recipes.nano import FAMILIES, SHAPE
from openm1.recipes.ship import card_page
from openm1.recipes.vocabulary import nano_tokenizer

# The card promises 90 %; on 40 samples a model right 97 times in 100 drops below it once in 2,000.
LOWEST_ACCURACY = 0.85


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("nano")


def test_preset_recipe_and_shipped_config_are_one():
    assert SHAPE.config(nano_tokenizer()) == PRESETS["nano"] == read_config("nano")


def test_shipped_tokenizer_is_the_recipes(llm: LLM):
    text = "2 +3 =5\nHow many 1 bits <think>(13)</think> a>f 5 hops"
    assert llm.tokenizer is not None
    assert llm.tokenizer.special_tokens == nano_tokenizer().special_tokens
    for special in (False, True):
        expected = nano_tokenizer().encode(text, allow_special=special)
        assert llm.tokenizer.encode(text, allow_special=special) == expected


def test_the_folder_is_small_and_its_page_is_its_cards():
    folder = SHIPPED["nano"]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12 * 2**20
    assert (folder / "README.md").read_text() == card_page(read_card("nano"))


def test_the_card_keeps_the_promise():
    families = read_card("nano").families
    assert set(families) == set(FAMILIES)
    for family in families.values():
        assert family["held_out"]["accuracy"] >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_held_out_questions(llm: LLM, family: str):
    config = EvalConfig(tasks=(family,), num_samples=40, seed=555, max_tokens=320)
    result = evaluate(llm.policy, llm.chat_format, config)[family]
    assert result.accuracy >= LOWEST_ACCURACY
    assert result.accuracy > result.majority_accuracy + 0.2
