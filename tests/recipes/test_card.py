from __future__ import annotations

import json
from pathlib import Path

import pytest

from openm1.recipes.card import read_card


def test_a_card_is_read_from_beside_the_weights(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    raw = {
        "families": {"chain": {"accuracy": 0.9}},
        "examples": [{"family": "chain", "question": "1 +1", "answer": "2"}],
        "training": {"tokens": 5},
    }
    (tmp_path / "card.json").write_text(json.dumps(raw))
    card = read_card(tmp_path)
    assert (card.families, card.examples, card.training) == tuple(raw.values())


def test_a_model_without_a_card_says_what_to_do(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="--tasks"):
        read_card(tmp_path)
